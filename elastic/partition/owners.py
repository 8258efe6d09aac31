"""Who owns which block: balanced by bytes, and with as few bytes moved as possible on a change.

Blocks of one layer are spread over all ranks, ZeRO style. When ranks go or come, what the lost ones
had is given to those that have least; a rank gives something away only while it is above the
average. Nothing else moves.
"""

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from planaria.elastic.partition.blocks import Block
from planaria.errors import ConfigError


@dataclass(frozen=True)
class Partition:
    """The owner of each block.

    Attributes:
        blocks: The blocks.
        ranks: The ranks that there are, in ascending order; names that a rank keeps for its life.
        owners: For each block its rank.
    """

    blocks: tuple[Block, ...]
    ranks: tuple[int, ...]
    owners: tuple[int, ...]

    def of(self, rank: int) -> list[int]:
        """The blocks of a rank, as indices, in order."""
        return [i for i, owner in enumerate(self.owners) if owner == rank]

    def owned(self) -> dict[int, list[int]]:
        """The blocks of each rank, as by `of`."""
        found: dict[int, list[int]] = {rank: [] for rank in self.ranks}
        for i, owner in enumerate(self.owners):
            found[owner].append(i)
        return found

    def loads(self) -> dict[int, int]:
        """Bytes of each rank."""
        loads = dict.fromkeys(self.ranks, 0)
        for block, owner in zip(self.blocks, self.owners, strict=True):
            loads[owner] += block.nbytes
        return loads


def spread(blocks: Sequence[Block], ranks: Collection[int]) -> Partition:
    """Gives every block an owner, from nothing: a pure function.

    No rank has more than the average and one block. Runs in O(n log n).

    Raises:
        ConfigError: There are no ranks, or one is named twice.
    """
    ranks = _checked(ranks)
    owners = [-1] * len(blocks)
    _give(blocks, range(len(blocks)), dict.fromkeys(ranks, 0), owners)
    return Partition(tuple(blocks), ranks, tuple(owners))


def respread(old: Partition, ranks: Collection[int]) -> Partition:
    """Gives the blocks owners among other ranks: a pure function of both.

    Never more bytes change hands than :func:`least_moved` says, and no rank has more than the
    average and one block. Runs in O(n log n).

    Args:
        old: What was.
        ranks: The ranks that there are now. Those that are new have nothing yet.

    Raises:
        ConfigError: There are no ranks, or one is named twice.
    """
    ranks = _checked(ranks)
    if ranks == old.ranks:
        return old
    blocks, there = old.blocks, set(ranks)
    loads = dict.fromkeys(ranks, 0)
    homeless: list[int] = []
    held: dict[int, list[int]] = {rank: [] for rank in ranks}
    for i, owner in enumerate(old.owners):
        if owner in there:
            loads[owner] += blocks[i].nbytes
            held[owner].append(i)
        else:
            homeless.append(i)
    layers: dict[str, int] = {}
    for block in blocks:
        layers[block.layer] = layers.get(block.layer, 0) + block.nbytes
    total = sum(layers.values())
    for rank in ranks:
        for i in _offered(blocks, held[rank], layers):
            # Integers: n * load is compared with the sum.
            if (loads[rank] - blocks[i].nbytes) * len(ranks) >= total:
                loads[rank] -= blocks[i].nbytes
                homeless.append(i)
    owners = list(old.owners)
    _give(blocks, homeless, loads, owners)
    return Partition(blocks, ranks, tuple(owners))


def least_moved(old: Partition, ranks: Collection[int]) -> float:
    """The bytes that must change hands at least, for ranks that are balanced to the last byte.

    What lost ranks had, and what the others have above the average.
    """
    there = set(ranks)
    total = sum(block.nbytes for block in old.blocks)
    average = total / len(there)
    lost, loads = 0, dict.fromkeys(there, 0)
    for block, owner in zip(old.blocks, old.owners, strict=True):
        if owner in there:
            loads[owner] += block.nbytes
        else:
            lost += block.nbytes
    return lost + sum(max(0.0, load - average) for load in loads.values())


def _give(
    blocks: Sequence[Block], homeless: Collection[int], loads: dict[int, int], owners: list[int]
) -> None:
    """Gives blocks away layer by layer, the largest first, each to the rank that has least."""
    place: dict[str, int] = {}
    for block in blocks:
        place.setdefault(block.layer, len(place))
    heap = [(load, rank) for rank, load in loads.items()]
    heapq.heapify(heap)
    for i in sorted(homeless, key=lambda i: (place[blocks[i].layer], -blocks[i].nbytes, i)):
        load, rank = heap[0]
        owners[i] = rank
        heapq.heapreplace(heap, (load + blocks[i].nbytes, rank))


def _offered(blocks: Sequence[Block], held: Sequence[int], layers: Mapping[str, int]) -> list[int]:
    """A rank's blocks in the order that it parts with them: of what it has the largest share first.

    So its shares of all layers come to be alike. Large blocks first: fewer have to go.

    Args:
        blocks: All blocks.
        held: The rank's.
        layers: Bytes of each layer.
    """
    left: dict[str, int] = {}
    for i in held:
        left[blocks[i].layer] = left.get(blocks[i].layer, 0) + blocks[i].nbytes
    offers: list[tuple[float, int, int]] = []
    for i in sorted(held, key=lambda i: (-blocks[i].nbytes, i)):
        layer = blocks[i].layer
        offers.append((-left[layer] / max(1, layers[layer]), len(offers), i))
        left[layer] -= blocks[i].nbytes
    return [i for _, _, i in sorted(offers)]


def _checked(ranks: Collection[int]) -> tuple[int, ...]:
    ordered = tuple(sorted(set(ranks)))
    if not ordered or len(ordered) != len(ranks):
        raise ConfigError(f"blocks need one rank or more, each named once, not {list(ranks)}")
    return ordered
