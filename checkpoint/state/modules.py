"""Modules: parameters (change in the optimizer's step), buffers (at any time), extra state."""

from collections.abc import Iterator
from functools import cache, partial
from itertools import repeat
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from planaria.checkpoint.state import tree
from planaria.checkpoint.state.entries import Collector
from planaria.checkpoint.state.provider import LoadPlan
from planaria.errors import StateError

# Wrappers, and the attribute that holds what they wrap: it adds nothing to a name.
_WRAPPED: list[tuple[type, str]] = [
    (DistributedDataParallel, "module"),
    (DataParallel, "module"),
    (AveragedModel, "module"),
]


def wrapped_child(module: nn.Module) -> str | None:
    """Name of the child that a wrapper wraps; None if the module is no wrapper."""
    return _wrapped_child(type(module))


@cache
def _wrapped_child(kind: type[nn.Module]) -> str | None:
    for wrapper, child in _WRAPPED:
        if issubclass(kind, wrapper):
            return child
    # Known by class name: importing their modules costs more than everything else here.
    names = {k.__name__ for k in kind.__mro__ if k.__module__.startswith("torch.")}
    if "OptimizedModule" in names:
        return "_orig_mod"
    if "ActivationWrapper" in names:
        return "_checkpoint_wrapped_module"
    return None


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All submodules with their names, wrappers' prefixes left out; shared ones under each name.

    Raises:
        StateError: The module is sharded by FSDP1, whose flat parameters have no boxes.
    """
    if isinstance(module, FullyShardedDataParallel):
        raise StateError(
            f"module {prefix or 'model'!r} is wrapped in FullyShardedDataParallel (FSDP1), whose "
            "flattened parameters cannot be saved by name; use torch.distributed.fsdp.fully_shard"
        )
    yield prefix, module
    skip = wrapped_child(module)
    for name, child in module._modules.items():
        if child is not None:
            yield from walk(child, prefix if name == skip else _join(prefix, name))


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters with their names; shared ones under each name."""
    for prefix, part in walk(module):
        for name, parameter in part._parameters.items():
            if parameter is not None:
                yield _join(prefix, name), parameter


def _named_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, part in walk(module):
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield _join(prefix, name), buffer


class ModuleProvider:
    """State of an nn.Module: plain, DDP, compiled, activation-checkpointed, FSDP2, averaged."""

    def __init__(self, key: str, module: nn.Module) -> None:
        self.key, self.module = key, module
        # Averages are updated after the optimizer's step, where no gate stands.
        self._lazy = not isinstance(module, AveragedModel)

    def collect(self, out: Collector) -> None:
        """See `Provider.collect`."""
        self.reshard()
        for prefix, part in walk(self.module):
            lazy = self._lazy and not _renormalises(part)
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    out.tensor(_join(self.key, _join(prefix, name)), parameter, lazy=lazy)
        for name, buffer in _named_buffers(self.module):
            out.tensor(_join(self.key, name), buffer, lazy=False, pinned_writer=True)
        for name, part in self._with_extra_state():

            def keep(path: str, tensor: torch.Tensor) -> bool:
                out.tensor(path, tensor, lazy=False, same_everywhere=True)
                return True

            extra = part.get_extra_state()
            bare = isinstance(extra, torch.Tensor | np.ndarray)
            out.object(name, tree.encode(extra, f"{name}.value" if bare else name, keep))

    def look(self, signs: list[Any], things: list[Any]) -> None:
        """See `Recallable.look`."""
        parts = [self.module]
        for part in parts:  # grows on the way
            kind = type(part)
            if _is_odd(kind):
                signs.append(_renormalises(part))
                if isinstance(part, FSDPModule):
                    part.reshard()
            children, parameters, buffers = part._modules, part._parameters, part._buffers
            signs += children
            signs += parameters
            things += parameters.values()
            if buffers:
                signs += buffers
                signs.append(frozenset(part._non_persistent_buffers_set))
                things += buffers.values()
            if children:
                there = [child for child in children.values() if child is not None]
                parts += there
                if len(there) < len(children):
                    signs += map(is_, children.values(), repeat(None))
            signs.append((kind, len(parts), len(children), len(parameters), len(buffers)))

    def can_recall(self) -> bool:
        """See `Recallable.can_recall`."""
        return not any(True for _ in self._with_extra_state())

    def recollect(self, out: Collector) -> None:
        """See `Recallable.recollect`: a module has tensors alone."""

    def load(self, plan: LoadPlan) -> None:
        """See `Provider.load`."""
        self.reshard()
        for name, tensor in (*named_parameters(self.module), *_named_buffers(self.module)):
            plan.tensor(_join(self.key, name), tensor)
        for name, part in self._with_extra_state():
            data = plan.object(name)
            made = None if data is None else fresh_tensors(plan, tree.references(data))
            if made is not None:
                extra = tree.decode(data, made.__getitem__)
                plan.then(partial(part.set_extra_state, extra))

    def _with_extra_state(self) -> Iterator[tuple[str, nn.Module]]:
        for name, part in walk(self.module):
            if type(part).get_extra_state is not nn.Module.get_extra_state:
                yield _join(self.key, _join(name, "_extra_state")), part

    def reshard(self) -> None:
        """Puts FSDP2's shards back where a forward without a backward left whole parameters."""
        for _, part in walk(self.module):
            if isinstance(part, FSDPModule):
                part.reshard()


@cache
def _is_odd(kind: type[nn.Module]) -> bool:
    """Whether more is to be looked at than parameters, buffers and children."""
    return issubclass(kind, nn.Embedding | nn.EmbeddingBag | FSDPModule)


def _renormalises(module: nn.Module) -> bool:
    """Whether a module writes its own weight in forward, where no gate stands."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None


def fresh_tensors(plan: LoadPlan, names: list[str]) -> dict[str, torch.Tensor] | None:
    """New host tensors for these names of the checkpoint, to be filled by the restore.

    None if one of them is not there: what needs them cannot be restored.
    """
    made: dict[str, torch.Tensor] = {}
    for name in names:
        source = plan.sources.get(name)
        if source is None:
            plan.missing.append(name)
            return None
        made[name] = torch.empty(source.shape, dtype=source.dtype.dtype)
        if not plan.tensor(name, made[name]):
            plan.skipped[name] = "not asked for"
            return None
    return made


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
