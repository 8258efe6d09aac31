"""The whole training state of a rank: the right provider for each part of the user's dict."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from planaria.checkpoint.state import tree
from planaria.checkpoint.state.entries import Collector, KnownTensor, TensorEntry
from planaria.checkpoint.state.modules import ModuleProvider, named_parameters
from planaria.checkpoint.state.optim import OptimizerProvider
from planaria.checkpoint.state.provider import LoadPlan, Provider
from planaria.checkpoint.state.recall import StateLayout, Structure
from planaria.checkpoint.state.rng import RngProvider
from planaria.checkpoint.state.trees import Stateful, StatefulProvider, TreeProvider
from planaria.errors import ConfigError, CorruptError, StateError

#: Providers whose tensors can be recognised without a walk, see `recall`.
_RECALLABLE = ModuleProvider, OptimizerProvider


@dataclass(frozen=True)
class Collected:
    """What a rank holds.

    Attributes:
        tensors: Entries by name.
        objects: JSON data by name, or what makes it (`Late`).
    """

    tensors: Mapping[str, TensorEntry]
    objects: dict[str, Any]


class StateSet:
    """Providers for a state such as ``{"model": model, "optim": optim, "data": loader}``.

    The random number generators are always part of it, as ``rng``.

    Args:
        state: Name -> module, optimizer, object with a state_dict, tree of tensors and values, or
            a dict or list of these.
        watch_small: Whether small tensors, too, are captured in the background, and not copied at
            the call: only then a write behind the gate's back is noticed.

    Raises:
        ConfigError: Something in it cannot be saved or restored.
    """

    def __init__(self, state: Mapping[str, Any], *, watch_small: bool = False) -> None:
        if not isinstance(state, Mapping) or not state:
            raise ConfigError(
                f"state must be a dict such as {{'model': model, 'optim': optim}}, not "
                f"{type(state).__name__ if not isinstance(state, Mapping) else 'an empty one'}"
            )
        self.providers: list[Provider] = []
        self._watch_small = watch_small
        self._known: dict[str, KnownTensor] = {}
        self._last: tuple[Structure, StateLayout] | None = None
        for key, value in state.items():
            if not isinstance(key, str) or not key or key.startswith("_"):
                raise ConfigError(f"state key {key!r} must be a name that begins with a letter")
            self._add(key, value)
        if "rng" not in state:
            self.providers.append(RngProvider())
        elif not isinstance(state["rng"], RngProvider):
            raise ConfigError(
                "state key 'rng' is the name of the random number generators, which are always "
                "part of the state; give this part another name"
            )

    def collect(self) -> Collected:
        """What this rank holds now.

        Raises:
            StateError: Something in it cannot be saved.
        """
        return self._recall() or self._walk()

    def _recall(self) -> Collected | None:
        """What is held if all tensors are laid out as they were last time."""
        things = self._last[0].again() if self._last is not None else None
        if self._last is None or things is None:
            return None
        out = Collector()
        for provider in self.providers:
            if isinstance(provider, _RECALLABLE):
                provider.recollect(out)
            else:
                provider.collect(out)
        # After them: a state_dict may make a tensor show other memory, and give back what it had.
        found = self._last[1].find(things) if things and not out.tensors else None
        return None if found is None else Collected(found, out.objects)

    def _walk(self) -> Collected:
        out, self._last = Collector(before=self._known), None
        can_recall = True
        for provider in self.providers:
            before = len(out.tensors)
            provider.collect(out)
            if isinstance(provider, _RECALLABLE):
                can_recall = can_recall and provider.can_recall()
            else:  # tensors of its own make it be asked each time
                can_recall = can_recall and len(out.tensors) == before
        self._known = out.known
        _check_names(out.tensors)
        if can_recall:
            structure = Structure(self._look)
            things = structure.again()
            if things is not None:
                layout = StateLayout(
                    list(out.tensors.values()), things, watch_small=self._watch_small
                )
                self._last = (structure, layout) if layout.is_known else None
        return Collected(out.tensors, out.objects)

    def _look(self, signs: list[Any], things: list[Any]) -> None:
        for provider in self.providers:
            if isinstance(provider, _RECALLABLE):
                provider.look(signs, things)

    def plan_load(self, plan: LoadPlan) -> None:
        """Lets every provider say where the checkpoint's tensors and objects go.

        Raises:
            StateError: The state has no place for them.
            CorruptError: They make no sense.
        """
        plan.known = self._known
        for provider in self.providers:
            try:
                provider.load(plan)
            except (LookupError, TypeError, AttributeError, RecursionError) as error:
                raise CorruptError(
                    f"what step {plan.manifest.step} holds of {provider.key!r} makes no sense "
                    f"({error!r})"
                ) from error

    def _add(self, key: str, value: Any, depth: int = 0) -> None:
        if isinstance(value, nn.Module):
            self.providers.append(ModuleProvider(key, value))
        elif isinstance(value, Optimizer):
            if type(value).__name__ == "ZeroRedundancyOptimizer":
                raise ConfigError(
                    f"state[{key!r}] is a ZeroRedundancyOptimizer, which keeps its state in "
                    "an optimizer of its own, spread over ranks; use "
                    "torch.distributed.fsdp.fully_shard to shard optimizer state"
                )
            self.providers.append(OptimizerProvider(key, value, self._parameter_names))
        elif isinstance(value, Provider):
            self.providers.append(value)
        elif isinstance(value, Stateful) and not isinstance(value, type):
            self.providers.append(StatefulProvider(key, value))
        elif isinstance(value, dict | list) and _holds_stateful(key, value, depth):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for name, part in items:
                self._add(f"{key}.{name}", part, depth + 1)
        elif isinstance(value, dict | list | torch.Tensor | np.ndarray):
            self.providers.append(TreeProvider(key, value))
        else:
            raise ConfigError(
                f"state[{key!r}] is a {type(value).__name__}, which cannot be restored in place; "
                "pass a module, an optimizer, an object with state_dict and load_state_dict, a "
                "tensor, or a dict or list that holds the value"
            )

    def _parameter_names(self) -> dict[int, tuple[str, str]]:
        table: dict[int, tuple[str, str]] = {}
        for provider in self.providers:
            if isinstance(provider, ModuleProvider):
                provider.reshard()  # the optimizer knows the shards alone
                for name, parameter in named_parameters(provider.module):
                    table.setdefault(id(parameter), (provider.key, name))
        return table


def _check_names(names: Collection[str]) -> None:
    """Makes sure that files can hold these names of tensors.

    Raises:
        StateError: One of them is no text.
    """
    if "".join(names).isascii():
        return
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise StateError(
                f"tensor {name!r} has half of a character (a lone surrogate) in its name; rename it"
            ) from error


def _holds_stateful(key: str, value: Any, depth: int) -> bool:
    if isinstance(value, dict | list):
        if depth > tree.MAX_DEPTH:
            raise ConfigError(
                f"state[{key.partition('.')[0]!r}] contains itself, or is nested more than "
                f"{tree.MAX_DEPTH} deep; flatten it"
            )
        parts = value.values() if isinstance(value, dict) else value
        return any(_holds_stateful(key, part, depth + 1) for part in parts)
    return isinstance(value, nn.Module | Optimizer | Stateful | Provider)
