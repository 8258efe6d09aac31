"""From one partition to another: who sends which block to whom."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from planaria.core.box import Box, Layout
from planaria.elastic.partition.blocks import Block
from planaria.elastic.partition.owners import Partition
from planaria.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Move:
    """One block that one rank sends to another.

    Attributes:
        index: The block's index in the partition.
        block: The block.
        source: The rank that sends it: its old owner, or who stands in for that one.
        target: The rank that owns it now.
    """

    index: int
    block: Block
    source: int
    target: int


@dataclass(frozen=True)
class TransferPlan:
    """What happens between two partitions.

    Attributes:
        moves: What ranks send each other; no block twice, none to where it is.
        recovered: What a lost rank had and no other holds, as (index, block, new owner): it comes
            from a snapshot. A stand-in that becomes the owner needs no move.
    """

    moves: tuple[Move, ...]
    recovered: tuple[tuple[int, Block, int], ...]

    @property
    def nbytes(self) -> int:
        """Bytes that change their owner."""
        blocks = [move.block for move in self.moves] + [block for _, block, _ in self.recovered]
        return sum(block.nbytes for block in blocks)


def plan_moves(
    old: Partition, new: Partition, stand_ins: Mapping[int, int] | None = None
) -> TransferPlan:
    """Plans what is sent from one partition of the same blocks to another: a pure function.

    Args:
        old: What was.
        new: What will be.
        stand_ins: For ranks that are lost, the rank that holds what they had, too.

    Raises:
        ConfigError: The blocks differ, or a stand-in is no rank of the new partition.
    """
    if old.blocks != new.blocks:
        raise ConfigError("the two partitions are not of the same blocks: cut the model once")
    there, stand_ins = set(new.ranks), stand_ins or {}
    if not there.issuperset(stand_ins.values()):
        raise ConfigError(f"stand-ins {dict(stand_ins)} are not all among ranks {new.ranks}")
    moves: list[Move] = []
    recovered: list[tuple[int, Block, int]] = []
    pairs = zip(old.blocks, old.owners, new.owners, strict=True)
    for i, (block, before, after) in enumerate(pairs):
        source = before if before in there else stand_ins.get(before)
        if source is None:
            recovered.append((i, block, after))
        elif source != after:
            moves.append(Move(i, block, source, after))
    return TransferPlan(tuple(moves), tuple(recovered))


def layouts(partition: Partition, names: Collection[str] | None = None) -> dict[str, Layout]:
    """The same partition as one layout a parameter, for moves to or from layouts of another kind.

    `planaria.core.box.plan_transfers` takes them: FSDP's shards become blocks, blocks become those
    of a checkpoint.

    Args:
        partition: The partition.
        names: The parameters; None for all.
    """
    holders: dict[str, list[tuple[int, Box]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for block, owner in _chosen(partition, names):
        holders.setdefault(block.name, []).append((owner, block.box))
        shapes[block.name] = block.shape
    return {name: Layout(shapes[name], tuple(held)) for name, held in holders.items()}


def _chosen(partition: Partition, names: Collection[str] | None) -> Iterable[tuple[Block, int]]:
    pairs = zip(partition.blocks, partition.owners, strict=True)
    return ((b, o) for b, o in pairs if names is None or b.name in names)
