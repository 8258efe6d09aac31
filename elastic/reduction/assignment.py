"""Which rank computes which leaves, so that ranks are busy alike and little has to be sent.

A rank sends one partial sum for each complete node that it holds (see `tree`): the fewer nodes
cover a rank's leaves, the fewer gradients travel. Any assignment gives the same bits; this one
gives the ranks as few leaves as possible at most, and as few nodes as possible in all.
"""

from bisect import insort
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from planaria.elastic.reduction.tree import Node, complete_nodes, cover, root
from planaria.errors import ConfigError


@dataclass(frozen=True)
class Assignment:
    """Who computes which leaves of a step.

    Attributes:
        leaves: Number of leaves of the tree.
        nodes: For each rank the nodes that it computes, in the order that it computes them in;
            none for a rank that computes nothing and only takes part in the sum.

    Raises:
        ConfigError: Some leaf is nobody's, or more than one rank's.
    """

    leaves: int
    nodes: tuple[tuple[Node, ...], ...]

    def __post_init__(self) -> None:
        cover(self.leaves, [node for own in self.nodes for node in own])

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.nodes)

    def leaves_of(self, rank: int) -> list[int]:
        """The leaves of a rank, in the order that it computes them in."""
        return [leaf for node in self.nodes[rank] for leaf in range(node.start, node.stop)]

    @cached_property
    def owners(self) -> list[int]:
        """The rank of each leaf."""
        owners = [0] * self.leaves
        for rank in range(self.world_size):
            for leaf in self.leaves_of(rank):
                owners[leaf] = rank
        return owners

    @property
    def longest(self) -> int:
        """Leaves of the rank that has the most."""
        return max(sum(node.size for node in own) for own in self.nodes)

    @property
    def balance(self) -> float:
        """The speed that is left: leaves of a rank on average, over those of the busiest one."""
        return self.leaves / sum(map(bool, self.nodes)) / self.longest

    @property
    def sent(self) -> float:
        """Gradients that all ranks together send to reduce and scatter a step's sum once."""
        total = sum(len(own) for own in self.nodes)
        return total * (self.world_size - 1) / self.world_size

    @property
    def least_sent(self) -> float:
        """The least that any sum over these ranks sends: each one its own part, once."""
        return self.world_size - 1.0

    @property
    def volume(self) -> float:
        """What is sent over the least there is, scatter and gather together; 1 is plain."""
        if self.world_size == 1:
            return 1.0
        return (self.sent + self.least_sent) / (2 * self.least_sent)


def assign(
    leaves: int, world_size: int, *, slack: int = 0, idle: Collection[int] = ()
) -> Assignment:
    """Spreads the leaves of a step over ranks: a pure function.

    No rank gets more than ceil(leaves / world_size) + `slack` leaves, and none gets nothing. Whole
    nodes are given out, the largest first, each to the rank with the most room; one that fits
    nowhere is halved. If `leaves` is a power of two, no other way with
    that many leaves at most needs fewer nodes.

    Args:
        leaves: Number of leaves of the step.
        world_size: Number of ranks.
        slack: By how many leaves a rank may be above the best balance: less is sent, but others
            wait for it.
        idle: Ranks that compute nothing: those that have just come, or that are not needed.

    Raises:
        ConfigError: There are fewer leaves than ranks that compute, or an argument makes no sense.
    """
    if idle:
        busy = [rank for rank in range(world_size) if rank not in idle]
        some = assign(leaves, len(busy), slack=slack)
        own = dict(zip(busy, some.nodes, strict=True))
        return Assignment(leaves, tuple(own.get(rank, ()) for rank in range(world_size)))
    if world_size < 1 or slack < 0:
        raise ConfigError(f"cannot assign leaves to {world_size} ranks with a slack of {slack}")
    if leaves < world_size:
        raise ConfigError(
            f"{leaves} leaves cannot keep {world_size} ranks busy: make the micro-batches or the "
            "groups of them smaller, or use fewer ranks"
        )
    capacity = -(-leaves // world_size) + slack
    room = [capacity] * world_size
    held: list[list[Node]] = [[] for _ in range(world_size)]
    # Sorted by size, smallest first, and from right to left within a size.
    pool = [root(leaves)]
    while pool:
        node = pool.pop()
        rank = max(range(world_size), key=lambda r: (room[r], -r))
        if node.size <= room[rank]:
            held[rank].append(node)
            room[rank] -= node.size
        else:
            for child in node.children():
                insort(pool, child, key=lambda n: (n.size, -n.start))
    _feed_idle(held)
    merged = [complete_nodes(leaves, _leaves(own)) for own in held]
    merged.sort(key=lambda own: own[0])
    # Large nodes first: then fewer partial sums are open at a time.
    return Assignment(
        leaves, tuple(tuple(sorted(own, key=lambda n: (-n.size, n.start))) for own in merged)
    )


def contiguous(leaves: int, world_size: int) -> Assignment:
    """The plain way, to compare with: runs of leaves whose lengths differ by 1 at most."""
    cuts = [leaves * r // world_size for r in range(world_size + 1)]
    return Assignment(
        leaves,
        tuple(tuple(complete_nodes(leaves, range(a, b))) for a, b in pairwise(cuts)),
    )


def _feed_idle(held: list[list[Node]]) -> None:
    """Gives every rank without a node one of the busiest rank's, or half of one."""
    for own in held:
        if own:
            continue
        busiest = max(held, key=lambda other: sum(n.size for n in other))
        node = min(busiest, key=lambda n: (n.size, -n.start))
        busiest.remove(node)
        if not busiest:
            kept, node = node.children()
            busiest.append(kept)
        own.append(node)


def _leaves(nodes: list[Node]) -> list[int]:
    return [leaf for node in nodes for leaf in range(node.start, node.stop)]
