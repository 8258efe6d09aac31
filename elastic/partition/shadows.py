"""Which ranks keep a second copy of a block: shadows.

What is held already stays where it is; what is missing goes to ranks that have little, spread over
the pairs (owner, shadow), so that an owner's blocks have many shadows and those that are left after
a loss own about equally much. Ranks of one node are often lost together: the copies of a block go
to different nodes, as long as no rank has more than `MOST_SHARES` times its share already.
"""

import heapq
from collections.abc import Collection, Iterable, Mapping

from planaria.elastic.partition.owners import Partition
from planaria.errors import ConfigError

#: Shadows of a rank on a small node, in shares that all ranks would have alike.
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
    there = [set(held.get(i, ())) for i in range(len(partition.blocks))]
    for i, ranks in enumerate(there):
        choice.keep(i, ranks)
    heap = [(load, rank) for rank, load in choice.loads.items()]
    heapq.heapify(heap)
    for i, ranks in enumerate(there):
        while len(choice.holders[i]) <= choice.count:
            choice.fill(i, ranks, heap)
    return tuple(tuple(sorted(holders[1:])) for holders in choice.holders)


class _Choice:
    """Shadows as far as they are chosen.

    Attributes:
        count: Shadows that each block is to have.
        holders: Of each block, its owner first.
        loads: Bytes of shadows of each rank.
    """

    def __init__(self, partition: Partition, count: int, nodes: Mapping[int, str]) -> None:
        self.count, self._blocks = count, partition.blocks
        self.holders = [[owner] for owner in partition.owners]
        self.loads = dict.fromkeys(partition.ranks, 0)
        self._nodes = {rank: nodes.get(rank, "") for rank in partition.ranks}
        self._labels = len(set(self._nodes.values()))
        self._total = sum(block.nbytes for block in partition.blocks) * count
        self._pairs: dict[tuple[int, int], int] = {}

    def keep(self, index: int, ranks: Iterable[int]) -> None:
        """Ranks that hold a block go on holding it, but not above their share.

        What they hold would grow for ever.
        """
        known = (r for r in ranks if r in self.loads and r not in self.holders[index])
        for rank in sorted(known, key=lambda r: (self.loads[r], r)):
            if len(self.holders[index]) > self.count:
                return
            if not self._above(rank, 1) and not self._clash(index, rank):
                self._add(index, rank)

    def fill(self, index: int, ranks: Collection[int], heap: list[tuple[int, int]]) -> None:
        """One more shadow of a block.

        Args:
            index: The block.
            ranks: Those that have its state.
            heap: All ranks with their loads.
        """
        seen: list[int] = []
        fitting = 0
        while heap and fitting < NEAREST:
            load, rank = heapq.heappop(heap)
            if load != self.loads[rank]:  # it was given something in between
                heapq.heappush(heap, (self.loads[rank], rank))
                continue
            seen.append(rank)
            if len(seen) > len(self.holders[index]) and self._above(rank, MOST_SHARES):
                break  # so are all others
            fitting += rank not in self.holders[index] and not self._clash(index, rank)
        others = {*seen, *(r for r in ranks if r in self.loads)}.difference(self.holders[index])
        owner = self.holders[index][0]
        costs = {
            rank: (
                self._above(rank, MOST_SHARES),
                self._clash(index, rank),
                self._above(rank, 1),
                rank not in ranks,
                self._pairs.get((owner, rank), 0),
                self.loads[rank],
                rank,
            )
            for rank in others
        }
        chosen = min(costs, key=costs.__getitem__)
        self._add(index, chosen)
        for rank in seen:
            heapq.heappush(heap, (self.loads[rank], rank))

    def _add(self, index: int, rank: int) -> None:
        owner, nbytes = self.holders[index][0], self._blocks[index].nbytes
        self._pairs[owner, rank] = self._pairs.get((owner, rank), 0) + nbytes
        self.loads[rank] += nbytes
        self.holders[index].append(rank)

    def _above(self, rank: int, shares: int) -> bool:
        return self.loads[rank] * len(self.loads) > self._total * shares

    def _clash(self, index: int, rank: int) -> bool:
        """Whether a copy is on the rank's node, and none on another one."""
        if self._labels == 1:
            return False
        taken = {self._nodes[holder] for holder in self.holders[index]}
        return self._nodes[rank] in taken and len(taken) < self._labels
