"""Everything else: objects with a state_dict, and plain trees of tensors and values."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from planaria.checkpoint.state import tree
from planaria.checkpoint.state.entries import Collector
from planaria.checkpoint.state.modules import fresh_tensors
from planaria.checkpoint.state.provider import LoadPlan

#: Tensors of a state_dict up to this size stand in the manifest; they may differ between ranks.
INLINE_NBYTES = 64 * 1024


@runtime_checkable
class Stateful(Protocol):
    """Anything with the usual two methods: schedulers, GradScaler, data loaders."""

    def state_dict(self) -> dict[str, Any]:
        """The state as a tree of plain values and tensors."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Takes over a state."""
        ...


class StatefulProvider:
    """State of an object with `state_dict` and `load_state_dict`; copied at once when saving."""

    def __init__(self, key: str, target: Stateful) -> None:
        self.key, self.target = key, target

    def collect(self, out: Collector) -> None:
        """See `Provider.collect`."""

        def keep(path: str, tensor: torch.Tensor) -> bool:
            if tensor.numel() * tensor.element_size() <= INLINE_NBYTES:
                return False
            out.tensor(path, tensor, lazy=False, same_everywhere=True)
            return True

        out.object(self.key, tree.encode(self.target.state_dict(), self.key, keep))

    def load(self, plan: LoadPlan) -> None:
        """See `Provider.load`."""
        data = plan.object(self.key)
        made = None if data is None else fresh_tensors(plan, tree.references(data))
        if made is not None:
            loaded = tree.decode(data, made.__getitem__)
            plan.then(lambda: self.target.load_state_dict(loaded))


class TreeProvider:
    """A dict, list, tensor or array of the user's own, restored in place; copied at once."""

    def __init__(self, key: str, value: Any) -> None:
        self.key, self.value = key, value

    def collect(self, out: Collector) -> None:
        """See `Provider.collect`."""

        def keep(path: str, tensor: torch.Tensor) -> bool:
            out.tensor(path, tensor, lazy=False, same_everywhere=True)
            return True

        encoded = tree.encode(self.value, self.key, keep)
        if not isinstance(self.value, torch.Tensor | np.ndarray):
            out.object(self.key, encoded)

    def load(self, plan: LoadPlan) -> None:
        """See `Provider.load`."""
        live: dict[str, torch.Tensor] = {}

        def note(path: str, tensor: torch.Tensor) -> bool:
            live[path] = tensor
            return True

        as_it_is = tree.encode(self.value, self.key, note)
        if isinstance(self.value, torch.Tensor):
            plan.tensor(self.key, self.value)
            return
        if isinstance(self.value, np.ndarray):
            self._load_array(plan, self.value)
            return
        data = plan.object(self.key)
        if data is None:  # there may still be tensors in it that are asked for
            data = as_it_is
        names = tree.references(data)
        fresh = fresh_tensors(plan, [n for n in names if n not in live])
        plan.missing += [n for n in live if n not in names and plan.wanted(n)]
        # A live tensor that does not fit keeps its place; the plan notes the misfit.
        for name in names:
            if name in live:
                plan.tensor(name, live[name])
        if fresh is not None:
            new = tree.decode(data, {**fresh, **live}.__getitem__)
            only_here = tree.unmatched(self.value, new, self.key)
            told = tree.with_parents(plan.missing)
            plan.missing += [n for n in only_here if n not in told and plan.wanted(n)]
            # Where this is carried out at all, the caller has agreed to go on without them.
            keep = tree.with_parents((*plan.missing, *only_here))
            plan.then(
                lambda: tree.update_in_place(self.value, new, path=self.key, keep=keep) and None
            )

    def _load_array(self, plan: LoadPlan, array: np.ndarray) -> None:
        made = torch.empty(array.shape, dtype=torch.from_numpy(array.reshape(-1)[:0]).dtype)
        if plan.tensor(self.key, made):
            plan.then(lambda: np.copyto(array, made.numpy()))
