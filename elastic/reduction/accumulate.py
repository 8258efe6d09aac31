"""The open sums of a bucket on one rank, and its result.

Memory is not cleared: a leaf's first gradient is written over what is there, a result is written
wholly.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from planaria.elastic.reduction.buckets import Bucket, Segment
from planaria.elastic.reduction.exchange import Mirror
from planaria.elastic.reduction.memory import Memory
from planaria.elastic.reduction.partial import LeafPlan, SlotPlan
from planaria.elastic.reduction.tree import Node

if TYPE_CHECKING:
    import torch


class BucketSums:
    """One flat tensor for each slot of a plan, and one for the result.

    Args:
        bucket: The bucket.
        parameters: Name -> parameter.
        plan: What is added to what.
        rank: This rank.
        whole: Whether the whole result is kept; else only this rank's part of it.
        memory: Where memory is taken from.

    Attributes:
        waiting: Parameters whose gradient of this micro-batch is not in yet.
        result: The result, flat.
        sent: Whether the step's sums have been handed over; they must not change then.
    """

    def __init__(
        self,
        bucket: Bucket,
        parameters: "Mapping[str, torch.Tensor]",
        plan: SlotPlan,
        rank: int,
        *,
        whole: bool,
        memory: Memory,
    ) -> None:
        self._bucket, self._plan, self._memory = bucket, plan, memory
        self.number, self.bounds, self.names = bucket.number, bucket.bounds, bucket.names
        device = parameters[bucket.segments[0][0].name].device
        self._slots = [memory.take(bucket.numel, bucket.dtype, device) for _ in range(plan.slots)]
        self._views: dict[str, list[tuple[Segment, list[torch.Tensor]]]] = {}
        for segment, at in bucket.segments:
            size = segment.stop - segment.start
            views = [slot[at : at + size] for slot in self._slots]
            self._views.setdefault(segment.name, []).append((segment, views))
        mine = bucket.bounds[rank], bucket.bounds[rank + 1]
        self._first, self._last = (0, bucket.numel) if whole else mine
        self.result = memory.take(self._last - self._first, bucket.dtype, device, grows=not whole)
        self._shadowed: dict[Segment, torch.Tensor] = {}
        self.mirror = None if whole else self._make_mirror(rank)
        self.waiting: set[str] = set()
        self.sent = False

    def leave(self, memory: Memory) -> None:
        """Leaves its memory to others; it must not be used any more.

        Not the result's where the step's sums have been handed over: links that break may still
        write into that.
        """
        for slot in self._slots:
            memory.give(slot)
        self._slots = []
        if not self.sent:
            for result in self.results():
                memory.give(result)

    def begin(self) -> None:
        """Begins a step."""
        self.waiting, self.sent = set(self.names), False

    def add(self, name: str, grad: "torch.Tensor | None", plan: LeafPlan, *, first: bool) -> None:
        """Takes in what a micro-batch has of a parameter; None counts as zeros.

        Args:
            name: The parameter's name.
            grad: Its gradient, in the parameter's dtype; added in the bucket's.
            plan: What happens to the leaf.
            first: Whether it is the leaf's first micro-batch.
        """
        flat = None if grad is None else grad.reshape(-1)
        fresh = first and not plan.onto
        for segment, views in self._views[name]:
            view = views[plan.slot]
            if flat is None:
                # Adding 0 turns -0 into 0, as it would where the leaf had a sum of its own.
                view.zero_() if fresh else view.add_(0.0)
            elif fresh:
                view.copy_(flat[segment.start : segment.stop])
            else:
                view.add_(flat[segment.start : segment.stop])
        self.waiting.discard(name)

    def complete(self, plan: LeafPlan, *, leaf_done: bool) -> None:
        """Ends a micro-batch: where it ends its leaf, siblings that are complete are added."""
        if leaf_done:
            for to, source in plan.merges:
                self._slots[to].add_(self._slots[source])
        self.waiting = set(self.names)

    def sums(self) -> "dict[Node, torch.Tensor]":
        """The sums of this rank's nodes, at the end of its leaves."""
        return {node: self._slots[slot] for node, slot in self._plan.results.items()}

    def segments(self) -> "dict[Segment, torch.Tensor]":
        """The parts of the result that are here, by segment."""
        return {
            segment: self.result[at - self._first : at - self._first + segment.stop - segment.start]
            for segment, at in self._bucket.segments
            if self._first <= at and at + segment.stop - segment.start <= self._last
        } | self._shadowed

    def results(self) -> "list[torch.Tensor]":
        """What holds the parts of the result that are here, flat."""
        return (
            [self.result, *(t for parts in self.mirror.incoming for t in parts)]
            if (self.mirror is not None)
            else [self.result]
        )

    def _make_mirror(self, rank: int) -> "Mirror | None":
        """What this rank sends of its part to shadows, and gets of others' as a shadow of them."""
        if not any(segment.shadows for segment, _ in self._bucket.segments):
            return None
        size = len(self.bounds) - 1
        outgoing: list[list[tuple[int, int]]] = [[] for _ in range(size)]
        incoming: list[list[torch.Tensor]] = [[] for _ in range(size)]
        runs: list[tuple[int | None, list[tuple[Segment, int]]]] = []
        for segment, at in self._bucket.segments:
            if segment.owner == rank:
                for peer in segment.shadows:
                    start, stop = at - self._first, at - self._first + segment.stop - segment.start
                    if outgoing[peer] and outgoing[peer][-1][1] == start:
                        start = outgoing[peer].pop()[0]
                    outgoing[peer].append((start, stop))
            elif rank in segment.shadows:
                joined = runs and runs[-1][0] == segment.owner and _follows(runs[-1][1][-1], at)
                if not joined:
                    runs.append((segment.owner, []))
                runs[-1][1].append((segment, at))
        for owner, items in runs:
            size_ = sum(s.stop - s.start for s, _ in items)
            flat = self._memory.take(size_, self.result.dtype, self.result.device, grows=True)
            incoming[owner or 0].append(flat)
            first = items[0][1]
            for segment, at in items:
                end = at - first + segment.stop - segment.start
                self._shadowed[segment] = flat[at - first : end]
        return Mirror([[self.result[a:b] for a, b in parts] for parts in outgoing], incoming)


def _follows(before: tuple[Segment, int], at: int) -> bool:
    return before[1] + before[0].stop - before[0].start == at
