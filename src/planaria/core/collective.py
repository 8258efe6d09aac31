"""Small agreements between ranks: JSON over a gloo group, never pickled objects.

Every `Ranks` owns a process group of its own, so that it can be used from a background thread
while training's collectives run, as long as one thread at a time uses it.

The group is made on the store of its parent, under a name that no earlier one had. torch's
`new_group` would need all ranks of the job, or else name groups by their members alone: closed and
made again, such a group finds the addresses of the old one and hangs.
"""

import json
import os
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from planaria.errors import CollectiveError, ConfigError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

T = TypeVar("T")

#: How many groups were made on each parent; its ranks make them in the same order.
_made: "weakref.WeakKeyDictionary[ProcessGroup, int]" = weakref.WeakKeyDictionary()


class Ranks:
    """The ranks of a job, seen from one of them.

    Args:
        parent: Group whose ranks take part; the default group if None. Where torch.distributed is
            not initialised there is one rank, and every call is local.
        timeout_s: How long a collective waits for the slowest rank.

    Raises:
        ConfigError: This rank is not one of the parent's.
        CollectiveError: Another rank of the parent did not turn up.
    """

    def __init__(self, parent: "ProcessGroup | None" = None, *, timeout_s: float = 1800.0) -> None:
        import torch.distributed as dist

        self.rank, self.size = 0, 1
        self._group: Any = None  # torch's stubs leave out what a backend can do
        self._timeout_s = timeout_s
        if dist.is_available() and dist.is_initialized():
            parent = dist.group.WORLD if parent is None else parent
            self.rank, self.size = dist.get_rank(parent), dist.get_world_size(parent)
            if self.rank < 0:
                raise ConfigError(
                    f"rank {dist.get_rank()} is not in this process_group; only its members may "
                    "use it"
                )
            if self.size > 1:
                assert parent is not None  # we are one of its members
                self._group = self._guard("making a group", self._make_group, parent)

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in rank order, on every rank."""
        if self.size == 1:
            return [_round_trip(value)]
        return self._guard("all_gather", self._all_gather, value)

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's JSON value in rank order on rank 0, None elsewhere."""
        if self.size == 1:
            return [_round_trip(value)]
        return self._guard("gather", self._gather, value)

    def broadcast(self, value: Any) -> Any:
        """The JSON value of rank 0, on every rank."""
        if self.size == 1:
            return _round_trip(value)
        return self._guard("broadcast", self._broadcast, value)

    def max_async(self, values: Sequence[int]) -> Callable[[], list[int]]:
        """Starts an element-wise maximum over ranks; the result is the call of what it returns."""
        if self.size == 1:
            return lambda: list(values)
        import torch
        import torch.distributed as dist

        buffer = torch.tensor(values, dtype=torch.int64)
        work = self._guard(
            "all_reduce", lambda: self._own.allreduce([buffer], op=dist.ReduceOp.MAX)
        )

        def finish() -> list[int]:
            self._guard("all_reduce", work.wait, timedelta(seconds=self._timeout_s))
            return [int(v) for v in buffer]

        return finish

    def close(self) -> None:
        """Ends the group; harmless when a peer is gone. Of several ranks none goes on alone."""
        self._group = None

    def _make_group(self, parent: "ProcessGroup") -> Any:
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _get_process_group_store

        number = _made[parent] = _made.get(parent, 0) + 1
        # torchrun keeps its store over restarts of the group, and with it what is stale.
        life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"planaria/{life}/{number}", _get_process_group_store(parent))
        timeout = timedelta(seconds=self._timeout_s)
        return dist.ProcessGroupGloo(store, self.rank, self.size, timeout)

    @property
    def _own(self) -> Any:
        if self._group is None:
            raise CollectiveError(
                f"rank {self.rank} of {self.size}: the group was closed, after an earlier failure "
                "or at the end"
            )
        return self._group

    def _all_gather(self, value: Any) -> list[Any]:
        padded, parts, sizes = self._padded(value)
        self._own.allgather(parts, padded).wait()
        return [_decode(p[:n]) for p, n in zip(parts, sizes, strict=True)]

    def _gather(self, value: Any) -> list[Any] | None:
        padded, parts, sizes = self._padded(value)
        here = self.rank == 0
        self._own.gather(parts if here else [], padded, 0).wait()
        return [_decode(p[:n]) for p, n in zip(parts, sizes, strict=True)] if here else None

    def _padded(self, value: Any) -> "tuple[torch.Tensor, list[torch.Tensor], list[int]]":
        """The encoded value at the length of the longest, room for all of them, their lengths."""
        import torch

        data = _encode(value)
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._own.allgather(counts, torch.tensor([data.numel()])).wait()
        sizes = [int(c) for c in counts]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: data.numel()] = data
        return padded, [torch.empty_like(padded) for _ in sizes], sizes

    def _broadcast(self, value: Any) -> Any:
        import torch

        data = _encode(value) if self.rank == 0 else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([data.numel()])
        self._own.broadcast(size, 0).wait()
        if self.rank != 0:
            data = torch.empty(int(size), dtype=torch.uint8)
        self._own.broadcast(data, 0).wait()
        return _decode(data)

    def _guard(self, what: str, call: Callable[..., T], *args: Any) -> T:
        try:
            return call(*args)
        except RuntimeError as error:
            raise CollectiveError(
                f"rank {self.rank} of {self.size}: {what} failed or found no answer within "
                f"{self._timeout_s:g} s ({str(error).splitlines()[0]}); another rank has "
                "probably died: see its log"
            ) from error


def _encode(value: Any) -> "torch.Tensor":
    import torch

    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(data: "torch.Tensor") -> Any:
    return json.loads(data.numpy().tobytes())


def _round_trip(value: Any) -> Any:
    # One rank must see what several would: tuples become lists, keys become strings.
    return json.loads(json.dumps(value))
