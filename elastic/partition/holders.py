"""Who holds which block: its owner, and shadows that keep a second copy.

A shadow has the same master copy and slots as the owner, gets the same reduced gradient and makes
the same update, so it has the same bits. When the owner is lost a shadow becomes the owner, and
nothing has to be moved. The shadows of a rank's blocks are spread over all other ranks: those that
are left then own about equally much.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from planaria.elastic.partition.blocks import Block
from planaria.elastic.partition.moves import Move, TransferPlan
from planaria.elastic.partition.owners import Partition, respread, spread
from planaria.elastic.partition.shadows import choose_shadows
from planaria.elastic.reduction.buckets import Segment


@dataclass(frozen=True)
class Placement:
    """Owners and shadows.

    Attributes:
        partition: The blocks and their owners.
        shadows: For each block the ranks that hold it beside its owner, ascending.
    """

    partition: Partition
    shadows: tuple[tuple[int, ...], ...]

    @classmethod
    def plain(cls, partition: Partition) -> "Placement":
        """Owners alone."""
        return cls(partition, ((),) * len(partition.blocks))

    def holders(self, index: int) -> tuple[int, ...]:
        """Who holds a block, its owner first."""
        return (self.partition.owners[index], *self.shadows[index])

    def of(self, rank: int) -> list[int]:
        """All that a rank holds, as indices, in order."""
        pairs = enumerate(zip(self.partition.owners, self.shadows, strict=True))
        return [i for i, (owner, others) in pairs if rank == owner or rank in others]

    def held(self) -> dict[int, list[int]]:
        """What each rank holds, as by `of`."""
        found: dict[int, list[int]] = {rank: [] for rank in self.partition.ranks}
        for i in range(len(self.shadows)):
            for rank in self.holders(i):
                found[rank].append(i)
        return found

    def segments(self) -> list[Segment]:
        """The blocks as a `GradientReducer` wants them; ranks are places in `partition.ranks`."""
        place = {rank: i for i, rank in enumerate(self.partition.ranks)}
        return [
            Segment(b.name, b.start, b.stop, place[owner], tuple(sorted(map(place.get, others))))  # pyright: ignore[reportArgumentType]
            for b, owner, others in zip(
                self.partition.blocks, self.partition.owners, self.shadows, strict=True
            )
        ]


def place(
    blocks: Sequence[Block],
    ranks: Collection[int],
    redundancy: int = 0,
    nodes: Mapping[int, str] | None = None,
) -> Placement:
    """Gives every block an owner and shadows, from nothing: a pure function.

    Args:
        blocks: The blocks.
        ranks: The ranks.
        redundancy: Shadows of a block; fewer where there are too few ranks.
        nodes: Labels of ranks' nodes; by default all are on one.

    Raises:
        ConfigError: There are no ranks, or one is named twice, or `redundancy` is below 0.
    """
    partition = spread(blocks, ranks)
    return Placement(partition, choose_shadows(partition, {}, redundancy, nodes or {}))


def replace(
    blocks: Sequence[Block],
    ranks: Collection[int],
    redundancy: int,
    owned: Mapping[int, Collection[int]],
    held: Mapping[int, Collection[int]],
    *,
    spare: Collection[int] = (),
    nodes: Mapping[int, str] | None = None,
) -> Placement:
    """Gives every block an owner and shadows, close to what there is: a pure function.

    A lost owner's block goes to a rank that holds it; then ranks give away only what they have
    above the average. What a rank holds already it goes on holding where that is of use.

    Args:
        blocks: The blocks.
        ranks: The ranks that there are now.
        redundancy: Shadows of a block.
        owned: The blocks that ranks say are theirs, as indices. Where two do, the lower rank is
            believed; where none does, a holder that owns little gets it.
        held: All blocks that ranks have the state of.
        spare: Ranks that are to hold nothing: they have just come, or are about to go.
        nodes: Labels of ranks' nodes; by default all are on one.

    Raises:
        ConfigError: As for :func:`place`; or no rank may hold anything.
    """
    everyone, ranks = ranks, [rank for rank in ranks if rank not in spare]
    holders: list[list[int]] = [[] for _ in blocks]
    owners: list[int | None] = [None] * len(blocks)
    loads = dict.fromkeys(ranks, 0)
    for rank in sorted(ranks):
        for i in held.get(rank, ()):
            holders[i].append(rank)
        for i in owned.get(rank, ()):
            if owners[i] is None:
                owners[i] = rank
                loads[rank] += blocks[i].nbytes
    for i, block in enumerate(blocks):
        if owners[i] is None:
            chosen = min(holders[i] or loads, key=lambda r: (loads[r], r))
            owners[i] = chosen
            loads[chosen] += block.nbytes
    _swap(blocks, owners, holders, loads)
    # A partition of ranks that includes one that owns nothing is put in order as after a change.
    there = tuple(sorted(ranks))
    before = Partition(
        tuple(blocks), (*there, there[-1] + 1), tuple(o for o in owners if o is not None)
    )
    partition = respread(before, ranks)
    shadows = choose_shadows(partition, dict(enumerate(holders)), redundancy, nodes or {})
    return Placement(Partition(tuple(blocks), tuple(sorted(everyone)), partition.owners), shadows)


def _swap(
    blocks: Sequence[Block],
    owners: list[int | None],
    holders: Sequence[Collection[int]],
    loads: dict[int, int],
) -> None:
    """Who owns more than the average changes places with shadows that own less: nothing is sent."""
    total = sum(loads.values())
    for i, block in enumerate(blocks):
        owner = owners[i]
        if owner is None or (loads[owner] - block.nbytes) * len(loads) < total:
            continue
        other = min((rank for rank in holders[i] if rank != owner), key=loads.__getitem__,
                    default=None)  # fmt: skip
        if other is not None and loads[other] * len(loads) < total:
            owners[i] = other
            loads[owner] -= block.nbytes
            loads[other] += block.nbytes


def fills(placement: Placement, held: Mapping[int, Collection[int]]) -> TransferPlan:
    """Plans what is sent so that every holder has what it is to hold: a pure function.

    Args:
        placement: What shall be.
        held: What ranks have now.

    Returns:
        The moves, balanced over those who can send; `recovered` names the blocks that nobody has.
    """
    having: list[list[int]] = [[] for _ in placement.shadows]
    for rank in placement.partition.ranks:
        for i in held.get(rank, ()):
            having[i].append(rank)
    sent = dict.fromkeys(placement.partition.ranks, 0)
    moves: list[Move] = []
    lost: list[tuple[int, Block, int]] = []
    for i, block in enumerate(placement.partition.blocks):
        if not having[i]:
            lost.append((i, block, placement.partition.owners[i]))
            continue
        for target in placement.holders(i):
            if target not in having[i]:
                source = min(having[i], key=lambda r: (sent[r], r))
                sent[source] += block.nbytes
                moves.append(Move(i, block, source, target))
    return TransferPlan(tuple(moves), tuple(lost))
