"""The sums of one rank: leaves come in one by one, complete nodes are left over.

Only a few sums are open at a time. A leaf goes into a free slot, or straight onto its left sibling
where that is what it is added to next; then every pair of siblings that is complete is added. Which
slot is used when depends on the rank's nodes alone, so it is worked out once, before training.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from planaria.elastic.reduction.tree import Node


@dataclass(frozen=True)
class LeafPlan:
    """What happens to one leaf.

    Attributes:
        leaf: Its number.
        slot: The slot that it is written to, or added to.
        onto: Whether it is added to what is there: its left sibling.
        merges: Pairs (to, from) of slots: the second is added to the first, in this order.
    """

    leaf: int
    slot: int
    onto: bool
    merges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class SlotPlan:
    """What happens to all leaves of a rank.

    Attributes:
        leaves: One plan a leaf, in the order that they are computed in.
        results: Node -> the slot that holds its sum at the end.
        slots: How many slots that takes.
    """

    leaves: tuple[LeafPlan, ...]
    results: dict[Node, int]
    slots: int


def plan_slots(nodes: Sequence[Node], *, direct: bool = True) -> SlotPlan:
    """Plans the sums of a rank: a pure function.

    Args:
        nodes: The complete nodes of the rank, in the order that they are computed in.
        direct: Whether a leaf may be added to its left sibling at once. A leaf of several
            micro-batches may not: it has a sum of its own first.
    """
    free: list[int] = []
    plans: list[LeafPlan] = []
    results: dict[Node, int] = {}
    slots = 0

    def take() -> int:
        nonlocal slots
        if free:
            return free.pop()
        slots += 1
        return slots - 1

    def visit(node: Node, sibling: int | None) -> int:
        """Computes a node and returns its slot; `sibling`: that of its left one, if it has one."""
        if node.size == 1:
            onto = direct and sibling is not None
            slot = sibling if onto and sibling is not None else take()
            plans.append(LeafPlan(node.start, slot, onto, ()))
            return slot
        left, right = node.children()
        to = visit(left, None)
        last = visit(right, to)
        if last != to:
            plan = plans[-1]
            plans[-1] = LeafPlan(plan.leaf, plan.slot, plan.onto, (*plan.merges, (to, last)))
            free.append(last)
        return to

    for node in nodes:
        results[node] = visit(node, None)
    return SlotPlan(tuple(plans), results, slots)
