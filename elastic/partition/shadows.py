"""Which ranks keep a second copy of a block: shadows.

What is held already stays where it is; what is missing goes to ranks that have little, spread over
the pairs (owner, shadow), so that an owner's blocks have many shadows and those that are left after
a loss own about equally much. Ranks of one node are often lost together: the copies of a block go
to different nodes, as long as no rank has more than `MOST_SHARES` times its share already.
"""

import heapq
from collections import Counter
from collections.abc import Collection, Mapping

from planaria.elastic.partition.owners import Partition
from planaria.errors import ConfigError

#: Shadows of a rank on a small node, in shares that all ranks would have alike: so a node may have
#: two thirds of all ranks.
MOST_SHARES = 2
#: So many ranks of those that have least are looked at for each shadow: that the time does not
#: grow with the ranks.
NEAREST = 8


def choose_shadows(
    partition: Partition,
    held: Mapping[int, Collection[int]],
    redundancy: int,
    nodes: Mapping[int, str],
) -> tuple[tuple[int, ...], ...]:
    """Chooses the shadows of each block: a pure function, O(n log ranks) for n blocks.

    Args:
        partition: The blocks and their owners.
        held: Ranks that have the state of a block already, by its index.
        redundancy: Shadows of a block; fewer where there are too few ranks.
        nodes: Labels of ranks' nodes; those without one are on a node together.

    Returns:
        For each block its shadows, ascending.

    Raises:
        ConfigError: `redundancy` is below 0.
    """
    if redundancy < 0:
        raise ConfigError(
            f"redundancy={redundancy}: give the number of losses to survive, 0 or more"
        )
    choice = _Choice(partition, min(redundancy, len(partition.ranks) - 1), nodes)
    ranks = frozenset(partition.ranks)
    there = [ranks.intersection(held.get(i, ())) for i in range(len(partition.blocks))]
    order = choice.order()
    for i in order:
        choice.keep(i, there[i])
    choice.sort()
    for i in order:
        while len(choice.holders[i]) <= choice.count:
            choice.fill(i, there[i])
    return tuple(tuple(sorted(holders[1:])) for holders in choice.holders)


class _Choice:
    """Shadows as far as they are chosen.

    Attributes:
        count: Shadows that each block is to have.
        holders: Of each block, its owner first.
    """

    def __init__(self, partition: Partition, count: int, nodes: Mapping[int, str]) -> None:
        self.count, self._blocks = count, partition.blocks
        self.holders = [[owner] for owner in partition.owners]
        self._loads = dict.fromkeys(partition.ranks, 0)
        self._nodes = {rank: nodes.get(rank, "") for rank in partition.ranks}
        self._sizes = Counter(self._nodes.values())
        # Limits for a rank, times the ranks. Blocks have a size: what is held stays where it is a
        # little above the share, and two thirds of all ranks may own a little more than that.
        total = sum(block.nbytes for block in partition.blocks) * count
        block = max((block.nbytes for block in partition.blocks), default=0) * len(self._loads)
        self._share, self._kept, self._most = total, total + block, total * MOST_SHARES + block
        self._pairs: dict[tuple[int, int], int] = {}
        # Ranks of each node, and nodes by the least of their ranks. Loads may have grown since.
        self._ranks: dict[str, list[tuple[int, int]]] = {}
        self._heads: list[tuple[int, str]] = []

    def order(self) -> list[int]:
        """The blocks, those first that have the least choice: of owners on the largest nodes."""
        sizes = [self._sizes[self._nodes[owner]] for owner, *_ in self.holders]
        return sorted(range(len(sizes)), key=lambda i: -sizes[i])

    def keep(self, index: int, ranks: Collection[int]) -> None:
        """Ranks that hold a block go on holding it, but not above their share.

        What they hold would grow for ever.
        """
        known = (rank for rank in ranks if rank not in self.holders[index])
        for rank in sorted(known, key=lambda r: (self._loads[r], r)):
            if len(self.holders[index]) > self.count:
                return
            if not self._above(rank, self._share) and not self._clash(index, rank):
                self._add(index, rank)

    def sort(self) -> None:
        """Puts ranks and nodes in order; `fill` comes afterwards, `keep` no more."""
        for rank, node in self._nodes.items():
            self._ranks.setdefault(node, []).append((self._loads[rank], rank))
        for ranks in self._ranks.values():
            heapq.heapify(ranks)
        self._heads = [(ranks[0][0], node) for node, ranks in self._ranks.items()]
        heapq.heapify(self._heads)

    def fill(self, index: int, ranks: Collection[int]) -> None:
        """One more shadow of a block.

        Args:
            index: The block.
            ranks: Those that have its state.
        """
        holders = self.holders[index]
        taken = {self._nodes[holder] for holder in holders}
        found = [] if len(taken) == len(self._ranks) else self._nearest(holders, taken)
        if not found or self._above(found[0], self._most):
            found += self._nearest(holders, ())
        costs = {
            rank: (
                self._above(rank, self._most),
                self._clash(index, rank),
                self._above(rank, self._kept if rank in ranks else self._share),
                rank not in ranks,
                self._pairs.get((holders[0], rank), 0),
                self._loads[rank],
                rank,
            )
            for rank in {*found, *ranks}.difference(holders)
        }
        self._add(index, min(costs, key=costs.__getitem__))

    def _nearest(self, holders: Collection[int], taken: Collection[str]) -> list[int]:
        """Ranks that have least, on nodes that are not taken and no holders yet; least first."""
        found: list[int] = []
        seen: list[tuple[int, int]] = []
        opened: list[str] = []
        nearest: list[tuple[int, str]] = []  # of the opened nodes, by the least rank not seen yet
        while len(found) < NEAREST:
            if self._heads and not (nearest and nearest[0] < self._heads[0]):
                _, node = heapq.heappop(self._heads)
                opened.append(node)
                if node not in taken:
                    heapq.heappush(nearest, (self._ranks[node][0][0], node))
                continue
            if not nearest:
                break
            _, node = heapq.heappop(nearest)
            ranks = self._ranks[node]
            load, rank = heapq.heappop(ranks)
            if load == self._loads[rank]:
                seen.append((load, rank))
                if rank not in holders:
                    found.append(rank)
            else:  # it was given something in between
                heapq.heappush(ranks, (self._loads[rank], rank))
            if ranks:
                heapq.heappush(nearest, (ranks[0][0], node))
        for load, rank in seen:
            heapq.heappush(self._ranks[self._nodes[rank]], (load, rank))
        for node in opened:
            heapq.heappush(self._heads, (self._ranks[node][0][0], node))
        return found

    def _add(self, index: int, rank: int) -> None:
        owner, nbytes = self.holders[index][0], self._blocks[index].nbytes
        self._pairs[owner, rank] = self._pairs.get((owner, rank), 0) + nbytes
        self._loads[rank] += nbytes
        self.holders[index].append(rank)

    def _above(self, rank: int, limit: int) -> bool:
        """Whether a rank has more than one of the limits."""
        return self._loads[rank] * len(self._loads) > limit

    def _clash(self, index: int, rank: int) -> bool:
        """Whether a copy is on the rank's node, and none on another one."""
        if len(self._sizes) == 1:
            return False
        taken = {self._nodes[holder] for holder in self.holders[index]}
        return self._nodes[rank] in taken and len(taken) < len(self._sizes)
