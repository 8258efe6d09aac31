"""How the rollout holds the weights, and the block table that follows from both sides' layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from planaria.checkpoint.format.dtypes import dtype_by_name
from planaria.checkpoint.layout.plan import SavePlan, make_plan
from planaria.checkpoint.layout.transforms import Part, SourceTensor, Transform
from planaria.core.box import Box, BoxIndex
from planaria.errors import ConfigError
from planaria.rl_sync.bits import BitFormat, format_of
from planaria.rl_sync.layout.table import Block, BlockTable, Segment, TableTensor

#: Elements of a block, about: enough for tables and counts to weigh little, few enough for a cache.
BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class RolloutLayout:
    """How the rollout names and cuts the weights.

    Attributes:
        transforms: From the trainer's names to the rollout's: `Rename`, `Fuse`, `Split`, `Pad` of
            `planaria.checkpoint`, applied in order.
        shards: Degree of the rollout's tensor parallelism.
        cuts: Pattern over rollout names (shell style) -> the dimension along which its shards cut
            it; the first that fits counts. Tensors that fit none are whole on every shard. A
            tensor that was fused along this dimension is cut part by part, as engines do it: a
            shard holds its rows of q, then of k, then of v.
    """

    transforms: Sequence[Transform] = ()
    shards: int = 1
    cuts: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.shards < 1:
            raise ConfigError(f"a rollout has at least one shard, not {self.shards}")

    def cut_dim(self, name: str, shape: tuple[int, ...]) -> int | None:
        """The dimension along which a tensor is cut, or None.

        Raises:
            ConfigError: The tensor does not have the dimension.
        """
        for pattern, dim in self.cuts.items():
            if fnmatchcase(name, pattern):
                if not -len(shape) <= dim < len(shape):
                    raise ConfigError(f"cuts[{pattern!r}]: {name} of shape {list(shape)} has no "
                                      f"dimension {dim}")  # fmt: skip
                return dim % len(shape) if self.shards > 1 else None
        return None


@dataclass(frozen=True)
class Origin:
    """Where the data of a segment comes from on the trainer.

    Attributes:
        name: The trainer's tensor; None for a constant.
        box: The box there, of the segment's extent, in coordinates of the whole tensor.
        fill: The constant.
    """

    name: str | None
    box: Box
    fill: float = 0.0


@dataclass(frozen=True)
class SyncPlan:
    """Who encodes what.

    Attributes:
        table: The block table.
        owners: For each block the trainer rank that encodes it.
        origins: For each block where its segments come from, in order.
    """

    table: BlockTable
    owners: tuple[int, ...]
    origins: tuple[tuple[Origin, ...], ...]


def plan_sync(
    announcements: list[list[Any]],
    layout: RolloutLayout,
    format_for: Callable[[str, str], BitFormat] | None = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> SyncPlan:
    """Makes the block table; equal arguments give an equal plan, on every rank.

    Args:
        announcements: What each trainer rank holds, see `planaria.checkpoint.layout.plan`.
        layout: How the rollout holds it.
        format_for: Gives the format in which a tensor is sent, from its rollout name and the name
            of the trainer's dtype; by default the trainer's.
        block_elements: Elements of a block, about.

    Raises:
        StateError: The ranks do not hold all of a tensor, or differ about it.
        ConfigError: The layout does not fit the trainer's tensors.
    """
    held = make_plan(announcements)
    sources = {
        name: SourceTensor(
            held.dtypes[name], shape, (Part(Box.full(shape), name, (0,) * len(shape)),)
        )
        for name, shape in held.shapes.items()
        if name not in held.aliases
    }  # fmt: skip
    aliases = dict(held.aliases)
    if layout.transforms:
        # Tied weights are transformed under each of their names, and found to be the same again.
        for alias, name in held.aliases.items():
            sources[alias] = sources[name]
        for transform in layout.transforms:
            sources = transform(sources)
        first: dict[Any, str] = {}
        aliases = {}
        for name, source in sources.items():
            key = (source.shape, source.parts)
            if key in first and source.parts:
                aliases[name] = first[key]
            first.setdefault(key, name)
    boxes = _owned(held)
    index = {name: BoxIndex([box for _, box in found]) for name, found in boxes.items()}
    tensors: list[TableTensor] = []
    groups: dict[tuple[int, str, tuple[int, ...]], list[tuple[Segment, Origin]]] = {}
    for name in sorted(sources):
        if name in aliases:
            continue
        source = sources[name]
        fmt = (format_for or _same)(name, source.dtype.name)
        dim = layout.cut_dim(name, source.shape)
        tensor = TableTensor(name, source.shape, fmt, dim, _sections(source, dim))
        number = len(tensors)
        tensors.append(tensor)
        for owner, box, origin in _regions(source, boxes, index):
            for part, audience in _audiences(tensor, box, layout.shards):
                inner = part.relative_to(box)
                moved = Box(inner.shifted(origin.box.offset).offset, part.extent)
                group = groups.setdefault((owner, fmt.name, audience), [])
                group.append((Segment(number, part), Origin(origin.name, moved, origin.fill)))
    blocks: list[Block] = []
    owners: list[int] = []
    origins: list[tuple[Origin, ...]] = []
    for (owner, fmt, audience), found in groups.items():
        for chunk in _chunks(found, block_elements):
            blocks.append(Block(format_of(fmt), tuple(s for s, _ in chunk), audience))
            owners.append(owner)
            origins.append(tuple(o for _, o in chunk))
    table = BlockTable(tuple(tensors), tuple(blocks), layout.shards, aliases)
    return SyncPlan(table, tuple(owners), tuple(origins))


def _same(name: str, dtype: str) -> BitFormat:
    return format_of(dtype_by_name(dtype).name, name)


def _owned(held: SavePlan) -> dict[str, list[tuple[int, Box]]]:
    found: dict[str, list[tuple[int, Box]]] = {}
    for rank, entries in held.entries.items():
        for entry in entries:
            found.setdefault(entry.name, []).append((rank, entry.box))
    return found


def _regions(
    source: SourceTensor, boxes: dict[str, list[tuple[int, Box]]], index: dict[str, BoxIndex]
) -> list[tuple[int, Box, Origin]]:
    """Owner, box in the rollout's tensor, and origin of everything that one rank holds of it."""
    found = []
    for part in source.parts:
        if part.box.volume == 0:
            continue
        if part.stored is None:
            found.append((0, part.box, Origin(None, part.box, part.fill)))
            continue
        wanted = Box(part.offset, part.box.extent)
        for i, common in index[part.stored].overlapping(wanted):
            owner, _ = boxes[part.stored][i]
            here = common.relative_to(wanted).shifted(part.box.offset)
            found.append((owner, here, Origin(part.stored, common)))
    return found


def _sections(source: SourceTensor, dim: int | None) -> tuple[int, ...]:
    """Sizes of the parts that a tensor was fused from along a dimension; none if it was not."""
    if dim is None or len(source.parts) < 2 or any(part.stored is None for part in source.parts):
        return ()
    whole = source.shape[:dim] + source.shape[dim + 1 :]
    for part in source.parts:
        if part.box.extent[:dim] + part.box.extent[dim + 1 :] != whole:
            return ()
    return tuple(part.box.extent[dim] for part in source.parts)


def _audiences(tensor: TableTensor, box: Box, shards: int) -> list[tuple[Box, tuple[int, ...]]]:
    if tensor.cut_dim is None or shards == 1:
        return [(box, tuple(range(shards)))]
    found = []
    for shard in range(shards):
        for held in tensor.shard_boxes(shard, shards):
            common = box.intersect(held)
            if common is not None:
                found.append((common, (shard,)))
    return found


def _chunks(
    found: list[tuple[Segment, Origin]], block_elements: int
) -> list[list[tuple[Segment, Origin]]]:
    """Large boxes cut, small ones put together."""
    chunks: list[list[tuple[Segment, Origin]]] = []
    room = 0
    for segment, origin in found:
        parts = -(-segment.box.volume // block_elements)
        dim = next((d for d, n in enumerate(segment.box.extent) if n > 1), 0)
        for slab in segment.box.split_rows(parts, dim):
            delta = slab.relative_to(segment.box).offset
            there = Box(origin.box.shifted(delta).offset, slab.extent)
            if not chunks or slab.volume > room:
                chunks.append([])
                room = block_elements
            chunks[-1].append(
                (Segment(segment.tensor, slab), Origin(origin.name, there, origin.fill))
            )
            room -= slab.volume
    return chunks
