"""Moving parts of a sum between ranks: what is needed of torch.distributed, and no more.

Every exchange involves every pair of ranks that has something for each other, point to point: a
rank that is gone is noticed by all that wait for it. gloo's own reduce_scatter and all_gather are
slower than this.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from planaria.checkpoint.memory.communicating import communicating
from planaria.core.deadline import Deadline
from planaria.elastic.reduction.waiting import Waits
from planaria.errors import CollectiveError, DeadlineError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from planaria.elastic.reduction.gloo import GlooGroup

#: Tensors for or from each rank, in rank order; one's own place stays empty.
Parts = Sequence[Sequence["torch.Tensor"]]
Wait = Callable[[Deadline], None]
"""Waits for what was started. Raises CollectiveError or DeadlineError."""

Complete = Callable[[Deadline], Wait | None]
"""Waits for what was sent and adds up; may return what waits for the last that there is to do."""


class Transport(Protocol):
    """The ranks that add up together, seen from one of them.

    Exchanges are told apart by their tags and may be started in any order; all-reduces in the same
    one on all ranks. After an error a transport is of no more use; close it.
    """

    rank: int
    size: int

    def exchange(self, tag: int, outgoing: Parts, incoming: Parts) -> Wait:
        """Starts sending tensors to each rank and receiving others from each.

        Args:
            tag: What the ranks know this exchange by, below 2**31; no two at a time have the same.
            outgoing: Contiguous tensors for each rank; they must stay as they are until it is done.
            incoming: Tensors to receive into, of the shapes and dtypes that the others send.
        """
        ...

    def all_reduce(self, tensor: "torch.Tensor") -> Wait:
        """Starts a plain sum over ranks, in place, in an order of the library's own."""
        ...

    def close(self) -> None:
        """Ends it, also while something hangs in it. It may be called again."""
        ...


@runtime_checkable
class OwnGroup(Protocol):
    """A process group that can be ended by any thread, whatever waits in it.

    Attributes:
        group: What torch made, None once it is closed.
    """

    group: Any

    def close(self) -> None:
        """Ends all waits here, and by that on other ranks. It may be called again."""
        ...


class Alone:
    """The transport of one rank."""

    rank, size = 0, 1

    def exchange(self, tag: int, outgoing: Parts, incoming: Parts) -> Wait:
        """Does nothing: there is nobody else."""
        return _done

    def all_reduce(self, tensor: "torch.Tensor") -> Wait:
        """Does nothing: the sum over one rank is there."""
        return _done

    def close(self) -> None:
        """Does nothing."""


def _done(deadline: Deadline) -> None:
    pass


class GroupTransport:
    """A transport over a process group that nobody else uses.

    It may be used by another thread than the one that trains, whose collectives go through groups
    of their own; :func:`own_group` makes one.

    Args:
        group: An :class:`OwnGroup`, or a `torch.distributed.ProcessGroup`.
    """

    def __init__(self, group: "OwnGroup | ProcessGroup") -> None:
        self._owned = group if isinstance(group, OwnGroup) else None
        made: Any = group.group if isinstance(group, OwnGroup) else group
        if made is None:
            raise CollectiveError("the group was given up before it was used")
        self._group: Any = made
        self.rank, self.size = made.rank(), made.size()
        self._waits = Waits()

    def exchange(self, tag: int, outgoing: Parts, incoming: Parts) -> Wait:
        """Starts an exchange, see :class:`Transport`."""
        works = []
        # Each rank begins with another one, so that they do not all send to the same.
        for step in range(1, self.size):
            peer = (self.rank - step) % self.size
            works += [self._start("recv", t, peer, tag) for t in incoming[peer] if t.numel()]
        for step in range(1, self.size):
            peer = (self.rank + step) % self.size
            works += [self._start("send", t, peer, tag) for t in outgoing[peer] if t.numel()]

        def wait(deadline: Deadline) -> None:
            self._wait(works, deadline, "an exchange")

        return wait

    def all_reduce(self, tensor: "torch.Tensor") -> Wait:
        """Starts a plain sum, see :class:`Transport`."""
        work = self._guard("all_reduce", lambda: self._open.allreduce([tensor]))
        return lambda deadline: self._wait([work], deadline, "an all-reduce")

    def close(self) -> None:
        """Ends all waits here, and by that on others; drops the group.

        Of a group that was not made by :func:`own_group` the connections end with the last
        reference to it.
        """
        if self._owned is not None:
            self._owned.close()
        self._waits.close()
        self._group = None

    def _start(self, verb: str, tensor: "torch.Tensor", peer: int, tag: int) -> Any:
        group = self._open
        return self._guard(
            f"{verb} with rank {peer}", lambda: getattr(group, verb)([tensor], peer, tag)
        )

    @property
    def _open(self) -> Any:
        if self._group is None:
            raise CollectiveError(f"rank {self.rank} of {self.size}: the transport was closed")
        return self._group

    def _wait(self, works: Sequence[Any], deadline: Deadline, what: str) -> None:
        if not works:
            return
        try:
            with communicating():  # snapshots in memory give way
                self._waits.wait(works, max(deadline.remaining(), 0.001))
        except RuntimeError as error:
            raise self._error(error, deadline, what) from error

    def _guard(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:
            raise self._error(error, None, what) from error

    def _error(
        self, error: RuntimeError, deadline: Deadline | None, what: str
    ) -> CollectiveError | DeadlineError:
        if deadline is not None and deadline.expired:
            return deadline.error(f"{what} of rank {self.rank} of {self.size} in a reduction")
        return CollectiveError(
            f"rank {self.rank} of {self.size}: {what} in a reduction failed "
            f"({str(error).splitlines()[0]}); another rank has probably died: see its log"
        )


def own_group(store: Any, rank: int, size: int, timeout_s: float) -> "GlooGroup":
    """Makes a gloo group on a store, outside torch's registry of groups.

    It can so be made and dropped by some ranks alone, at any time.

    Args:
        store: A store under a prefix that no earlier group had.
        rank: This rank's number in the group.
        size: Number of ranks.
        timeout_s: Seconds to wait for all of them to turn up.

    Raises:
        CollectiveError: Some rank did not.
    """
    from planaria.elastic.reduction.gloo import GlooGroup

    return GlooGroup(store, rank, size, timeout_s).make()
