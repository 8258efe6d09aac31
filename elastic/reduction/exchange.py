"""Adding up between ranks: the sums of every rank's nodes become the one of the root.

Each rank owns a part of every bucket. It gets that part of all nodes that others hold, adds them
along the tree, and has the result (reduce-scatter); where everybody wants all of it, the parts are
then sent to everybody (all-reduce). What goes in is never written to: if a peer dies, the sums that
a rank has computed are as they were.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.elastic.reduction.assignment import Assignment
from planaria.elastic.reduction.memory import Memory
from planaria.elastic.reduction.transport import Complete, Transport, Wait
from planaria.elastic.reduction.tree import Add, Node, additions, root
from planaria.errors import ConfigError

if TYPE_CHECKING:
    import torch

SCATTER = points.declare("elastic.reduction.scatter", "before a bucket's sums are sent")
COMBINE = points.declare("elastic.reduction.combine", "before a bucket's sums are added up")
GATHER = points.declare("elastic.reduction.gather", "before a bucket's result is sent to all")
SHADOW = points.declare("elastic.reduction.shadow", "before a bucket's result goes to its shadows")


@dataclass(frozen=True)
class Mirror:
    """What shadows get of a bucket's result.

    Attributes:
        outgoing: For each rank the parts of this rank's result that it is a shadow of.
        incoming: For each rank where the parts go that it owns and this rank is a shadow of.
    """

    outgoing: "list[list[torch.Tensor]]"
    incoming: "list[list[torch.Tensor]]"


class Exchange:
    """Adds up buckets over ranks along the tree of an assignment.

    Args:
        assignment: Which rank holds which nodes; its ranks are the transport's.
        transport: The ranks.
        memory: Where memory for what others send is taken from.

    Raises:
        ConfigError: The two differ in the number of ranks.
    """

    def __init__(
        self, assignment: Assignment, transport: Transport, memory: Memory | None = None
    ) -> None:
        if assignment.world_size != transport.size:
            raise ConfigError(
                f"an assignment for {assignment.world_size} ranks on a transport of "
                f"{transport.size}"
            )
        self._assignment, self._transport = assignment, transport
        self._memory = memory or Memory()
        self._own = set(assignment.nodes[transport.rank])
        everyone = [node for own in assignment.nodes for node in own]
        self._additions: list[Add] = list(additions(assignment.leaves, everyone))
        # Two numbers give the same sum either way round: then any all-reduce adds along the tree.
        self._commutes = transport.size == 2 and len(self._additions) == 1
        self._spare: dict[tuple[int, torch.dtype], list[torch.Tensor]] = defaultdict(list)

    def start(
        self,
        bucket: int,
        sums: "Mapping[Node, torch.Tensor]",
        bounds: Sequence[int],
        result: "torch.Tensor",
        *,
        whole: bool,
        mirror: Mirror | None = None,
    ) -> Complete:
        """Starts to add up a bucket.

        Args:
            bucket: Its number.
            sums: A flat tensor for each node of this rank; not changed, and not to be changed.
            bounds: Where each rank's part begins, and at last the end: elements.
            result: Where the result is written: all of it, or this rank's part.
            whole: Whether every rank gets all of it.
            mirror: Who gets copies of parts of it, where not all do.
        """
        if whole and self._commutes:
            result.copy_(next(iter(sums.values())))
            points.point(SCATTER)
            wait = self._transport.all_reduce(result)
            return lambda deadline: wait(deadline)
        rank = self._transport.rank
        finish = self.scatter(bucket, sums, bounds, like=result)

        def complete(deadline: Deadline) -> Wait | None:
            finish(deadline, result[bounds[rank] : bounds[rank + 1]] if whole else result)
            if whole:
                return self.gather(bucket, result, bounds)
            if mirror is None:
                return None
            points.point(SHADOW)
            return self._transport.exchange(2 * bucket + 1, mirror.outgoing, mirror.incoming)

        return complete

    def scatter(
        self,
        bucket: int,
        sums: "Mapping[Node, torch.Tensor]",
        bounds: Sequence[int],
        *,
        like: "torch.Tensor | None" = None,
    ) -> "Callable[[Deadline, torch.Tensor], None]":
        """Starts to send and receive the parts of a bucket's sums.

        Args:
            bucket: Its number.
            sums: A flat tensor for each node of this rank. They must not change until it is done.
            bounds: Where each rank's part begins, and at last the end: elements.
            like: A tensor of their dtype and device; needed on a rank that has none.

        Returns:
            What waits for the others' sums and adds all up: called with a deadline, and with a flat
            tensor that this rank's part of the result is written into. It raises CollectiveError or
            DeadlineError, and the tensor then holds nothing of use.
        """
        points.point(SCATTER)
        rank, size = self._transport.rank, self._transport.size
        like = next(iter(sums.values())) if like is None else like
        part = bounds[rank + 1] - bounds[rank]
        outgoing = [
            [s[bounds[r] : bounds[r + 1]] for s in sums.values()] if r != rank else []
            for r in range(size)
        ]
        own = slice(bounds[rank], bounds[rank + 1])
        there = {node: tensor[own] for node, tensor in sums.items()}
        spare = self._spare[part, like.dtype]
        incoming: list[list[torch.Tensor]] = [[] for _ in range(size)]
        for peer in range(size):
            for node in self._assignment.nodes[peer] if peer != rank else ():
                there[node] = self._take(spare, part, like)
                incoming[peer].append(there[node])
        wait = self._transport.exchange(2 * bucket, outgoing, incoming)

        def finish(deadline: Deadline, out: "torch.Tensor") -> None:
            wait(deadline)
            points.point(COMBINE)
            self._combine(there, out)
            spare.extend(tensor for parts in incoming for tensor in parts)

        return finish

    def leave(self, memory: Memory) -> None:
        """Leaves its memory to others; it must not be used any more.

        Whoever is still at it in another thread has other pieces: each is popped once.
        """
        for spare in list(self._spare.values()):
            while True:
                try:
                    memory.give(spare.pop())
                except IndexError:
                    break

    def _take(self, spare: "list[torch.Tensor]", part: int, like: "torch.Tensor") -> "torch.Tensor":
        """Memory for a part that another rank sends."""
        try:
            return spare.pop()
        except IndexError:
            return self._memory.take(part, like.dtype, like.device, grows=True)

    def gather(self, bucket: int, out: "torch.Tensor", bounds: Sequence[int]) -> Wait:
        """Starts to send this rank's part of a result to all, and to receive theirs.

        Args:
            bucket: Its number.
            out: The flat result, with this rank's part filled in; the others are written to.
            bounds: As for :meth:`scatter`.
        """
        points.point(GATHER)
        rank, size = self._transport.rank, self._transport.size
        parts = [out[a:b] for a, b in pairwise(bounds)]
        return self._transport.exchange(
            2 * bucket + 1,
            [[parts[rank]] if r != rank else [] for r in range(size)],
            [[parts[r]] if r != rank else [] for r in range(size)],
        )

    def _combine(self, there: "dict[Node, torch.Tensor]", out: "torch.Tensor") -> None:
        """Adds along the tree: left plus right, into received memory, at last into `out`."""
        import torch

        top = root(self._assignment.leaves)
        if not self._additions:
            out.copy_(there[top])
            return
        for node, left, right in self._additions:
            a, b = there.pop(left), there.pop(right)
            if node == top:
                target = out
            elif left not in self._own:
                target = a
            else:
                target = b if right not in self._own else torch.empty_like(a)
            torch.add(a, b, out=target)
            there[node] = target


def even_bounds(numel: int, size: int) -> list[int]:
    """Cuts a bucket into parts of like size, one a rank."""
    return [numel * r // size for r in range(size + 1)]
