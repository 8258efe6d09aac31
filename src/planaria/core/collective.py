"""Small agreements between ranks: JSON over a gloo group, never pickled objects.

Every `Ranks` owns a process group of its own, so that it can be used from a background thread
while training's collectives run, as long as one thread at a time uses it.

The group is made on the store of its parent, under a name that no earlier one had. torch's
`new_group` would need all ranks of the job, or else name groups by their members alone: closed and
made again, such a group finds the addresses of the old one and hangs.
"""

import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from planaria.errors import CollectiveError, ConfigError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

T = TypeVar("T")

#: A wait looks so often whether its group was abandoned: nothing wakes what waits in gloo.
_SLICE_S = 0.05


@dataclass(frozen=True, eq=False)
class Meeting:
    """Where ranks meet that have no process group of torch.distributed.

    Attributes:
        store: A `torch.distributed.Store`, under a prefix that these ranks alone use.
        rank: This rank's number among them.
        size: How many they are.
    """

    store: Any
    rank: int
    size: int


def rank_in(parent: "ProcessGroup | Meeting | None") -> int:
    """This rank's number among those of a parent, see `Ranks`; -1 where it is not one of them."""
    if isinstance(parent, Meeting):
        return parent.rank
    import torch.distributed as dist

    return dist.get_rank(parent) if dist.is_available() and dist.is_initialized() else 0


#: How many groups were made on each parent; its ranks make them in the same order.
_made: "weakref.WeakKeyDictionary[ProcessGroup | Meeting, int]" = weakref.WeakKeyDictionary()


class Ranks:
    """The ranks of a job, seen from one of them.

    Args:
        parent: Group whose ranks take part, or where they meet; the default group if None. Where
            torch.distributed is not initialised, None stands for one rank, and every call is local.
        timeout_s: How long a collective waits for the slowest rank.
        within_s: How long to wait for the others to turn up; by default as long.

    Raises:
        ConfigError: This rank is not one of the parent's.
        CollectiveError: Another rank of the parent did not turn up.
    """

    def __init__(
        self,
        parent: "ProcessGroup | Meeting | None" = None,
        *,
        timeout_s: float = 1800.0,
        within_s: float | None = None,
    ) -> None:
        import torch.distributed as dist

        self.rank, self.size = 0, 1
        self._group: Any = None  # torch's stubs leave out what a backend can do
        self._timeout_s = timeout_s
        self._abandoned = False
        within_s = timeout_s if within_s is None else max(within_s, 0.001)
        if isinstance(parent, Meeting):
            self.rank, self.size = parent.rank, parent.size
            if self.size > 1:
                self._group = self._guard("making a group", self._make_group, parent, within_s)
        elif dist.is_available() and dist.is_initialized():
            parent = dist.group.WORLD if parent is None else parent
            self.rank, self.size = dist.get_rank(parent), dist.get_world_size(parent)
            if self.rank < 0:
                raise ConfigError(
                    f"rank {dist.get_rank()} is not in this process_group; only its members may "
                    "use it"
                )
            if self.size > 1:
                assert parent is not None  # we are one of its members
                self._group = self._guard("making a group", self._make_group, parent, within_s)

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
            self._guard("all_reduce", self._wait, work)
            return [int(v) for v in buffer]

        return finish

    @contextmanager
    def patience(self, timeout_s: float) -> Iterator[None]:
        """While the block lasts, the slowest rank is waited for no longer than this, in seconds."""
        before = self._timeout_s
        try:
            self._set_timeout(min(before, max(timeout_s, 0.001)))
            yield
        finally:
            self._set_timeout(before)

    def _set_timeout(self, timeout_s: float) -> None:
        group = self._group
        if timeout_s != self._timeout_s and group is not None:
            group.set_timeout(timedelta(seconds=timeout_s))
        self._timeout_s = timeout_s

    def close(self) -> None:
        """Ends the group; harmless when a peer is gone. Of several ranks none goes on alone."""
        self._group = None

    def abandon(self) -> None:
        """Ends the group at once, from any thread: who waits in it gets a CollectiveError.

        Peers that wait for this rank get one, too, as soon as its connections are closed.
        """
        self._abandoned = True
        group = [self._group]
        self._group = None
        if group[0] is not None:
            # gloo first waits for what is under way, until the peers have closed theirs as well.
            threading.Thread(target=group.clear, name="ranks-abandoned", daemon=True).start()

    def _make_group(self, parent: "ProcessGroup | Meeting", within_s: float) -> Any:
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _get_process_group_store

        number = _made[parent] = _made.get(parent, 0) + 1
        if isinstance(parent, Meeting):
            store = dist.PrefixStore(f"planaria/{number}", parent.store)
        else:
            # torchrun keeps its store over restarts of the group, and with it what is stale.
            life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"planaria/{life}/{number}", _get_process_group_store(parent))
        made: Any = dist.ProcessGroupGloo(store, self.rank, self.size, timedelta(seconds=within_s))
        if within_s != self._timeout_s:
            made.set_timeout(timedelta(seconds=self._timeout_s))
        return made

    @property
    def _own(self) -> Any:
        if self._group is None:
            raise CollectiveError(
                f"rank {self.rank} of {self.size}: the group was closed, after an earlier failure "
                "or at the end"
            )
        return self._group

    def _wait(self, work: Any) -> None:
        until = time.monotonic() + self._timeout_s
        while True:
            try:
                work.wait(timedelta(seconds=_SLICE_S))
                return
            except RuntimeError:
                if work.is_completed():
                    work.wait()  # raises what went wrong, if anything has
                    return
                if self._abandoned:
                    raise CollectiveError(
                        f"rank {self.rank} of {self.size}: the group was given up, because its "
                        "ranks change"
                    ) from None
                if time.monotonic() > until:
                    raise

    def _all_gather(self, value: Any) -> list[Any]:
        padded, parts, sizes = self._padded(value)
        self._wait(self._own.allgather(parts, padded))
        return [_decode(p[:n]) for p, n in zip(parts, sizes, strict=True)]

    def _gather(self, value: Any) -> list[Any] | None:
        padded, parts, sizes = self._padded(value)
        here = self.rank == 0
        self._wait(self._own.gather(parts if here else [], padded, 0))
        return [_decode(p[:n]) for p, n in zip(parts, sizes, strict=True)] if here else None

    def _padded(self, value: Any) -> "tuple[torch.Tensor, list[torch.Tensor], list[int]]":
        """The encoded value at the length of the longest, room for all of them, their lengths."""
        import torch

        data = _encode(value)
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._wait(self._own.allgather(counts, torch.tensor([data.numel()])))
        sizes = [int(c) for c in counts]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: data.numel()] = data
        return padded, [torch.empty_like(padded) for _ in sizes], sizes

    def _broadcast(self, value: Any) -> Any:
        import torch

        data = _encode(value) if self.rank == 0 else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([data.numel()])
        self._wait(self._own.broadcast(size, 0))
        if self.rank != 0:
            data = torch.empty(int(size), dtype=torch.uint8)
        self._wait(self._own.broadcast(data, 0))
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
