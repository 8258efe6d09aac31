"""Boxes: the one geometry behind saving, restoring, resharding and weight sync.

A *box* is an axis-aligned block of a tensor's index space. What a rank holds of a logical tensor
is a box; who holds what of it is a `Layout`; moving data from one layout to another is a list of
`Transfer`s, the intersections of the boxes of both.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from operator import add, sub

from planaria.errors import ConfigError


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """A block of an index space.

    Attributes:
        offset: First index in each dimension.
        extent: Number of indices in each dimension; a 0-dimensional box holds one element.
    """

    offset: tuple[int, ...]
    extent: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.offset) != len(self.extent):
            raise ConfigError(
                f"box offset {self.offset} and extent {self.extent} differ in length; "
                "give one number of each per dimension"
            )
        if self.offset and (min(self.offset) < 0 or min(self.extent) < 0):
            raise ConfigError(f"box offset {self.offset} and extent {self.extent} must be >= 0")

    @classmethod
    def full(cls, shape: Sequence[int]) -> "Box":
        """The box that covers a whole tensor of this shape."""
        return _full(tuple(shape))

    @property
    def end(self) -> tuple[int, ...]:
        """One past the last index in each dimension."""
        return tuple(map(add, self.offset, self.extent))

    @property
    def volume(self) -> int:
        """Number of elements."""
        return prod(self.extent)

    def intersect(self, other: "Box") -> "Box | None":
        """The common part, or None where there is none (empty boxes have none)."""
        offset, extent = [], []
        for a, n, b, m in zip(self.offset, self.extent, other.offset, other.extent, strict=True):
            start = a if a > b else b
            size = min(a + n, b + m) - start
            if size <= 0:
                return None
            offset.append(start)
            extent.append(size)
        return Box(tuple(offset), tuple(extent))

    def contains(self, other: "Box") -> bool:
        """Whether every element of `other` lies in this box."""
        return other.volume == 0 or self.intersect(other) == other

    def shifted(self, delta: Sequence[int]) -> "Box":
        """This box moved by `delta`."""
        return Box(tuple(map(add, self.offset, delta)), self.extent)

    def relative_to(self, origin: "Box") -> "Box":
        """This box in coordinates that start at the offset of `origin`."""
        return Box(tuple(map(sub, self.offset, origin.offset)), self.extent)

    def slices(self) -> tuple[slice, ...]:
        """Index expression that selects this box from a tensor of the whole index space."""
        return tuple(slice(o, o + e) for o, e in zip(self.offset, self.extent, strict=True))

    def subtract(self, other: "Box") -> list["Box"]:
        """What is left of this box without `other`, as disjoint boxes (at most two a dimension)."""
        if self.volume == 0:
            return []
        common = self.intersect(other)
        if common is None:
            return [self]
        rest, offset, extent = [], list(self.offset), list(self.extent)
        for dim, (start, size) in enumerate(zip(common.offset, common.extent, strict=True)):
            before, after = start - offset[dim], offset[dim] + extent[dim] - start - size
            for first, count in ((offset[dim], before), (start + size, after)):
                if count:
                    part_offset, part_extent = list(offset), list(extent)
                    part_offset[dim], part_extent[dim] = first, count
                    rest.append(Box(tuple(part_offset), tuple(part_extent)))
            offset[dim], extent[dim] = start, size
        return rest

    def split_rows(self, parts: int, dim: int = 0) -> list["Box"]:
        """Cuts along a dimension into at most `parts` non-empty slabs of like size."""
        if not self.extent or parts <= 1 or self.volume == 0:
            return [self]
        rows, slabs = self.extent[dim], []
        for i in range(parts):
            start, stop = rows * i // parts, rows * (i + 1) // parts
            if stop > start:
                offset, extent = list(self.offset), list(self.extent)
                offset[dim], extent[dim] = offset[dim] + start, stop - start
                slabs.append(Box(tuple(offset), tuple(extent)))
        return slabs


@lru_cache(maxsize=1 << 12)
def _full(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


def row_major_blocks(extent: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Cuts elements [start, stop) of a row-major array of this extent into boxes.

    Each box is contiguous in row-major order; together, in order, they are the range. At most
    2 * ndim - 1 boxes, so a range of any length costs only a few strided copies.
    """
    if start >= stop:
        return
    if len(extent) == 0:
        yield Box((), ())
        return
    row = prod(extent[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # both ends lie in one row
        yield from _inside_row(extent, start // row, start % row, stop - start // row * row)
        return
    if start % row:
        yield from _inside_row(extent, start // row, start % row, row)
    if last > first:
        yield Box((first, *(0 for _ in extent[1:])), (last - first, *extent[1:]))
    if stop % row:
        yield from _inside_row(extent, last, 0, stop % row)


def _inside_row(extent: Sequence[int], row: int, start: int, stop: int) -> Iterator[Box]:
    for box in row_major_blocks(extent[1:], start, stop):
        yield Box((row, *box.offset), (1, *box.extent))


class BoxIndex:
    """Finds which of many boxes overlap a box in about O(log n + matches).

    It sorts along the dimension in which the boxes differ most, so that row shards and column
    shards are both found quickly.
    """

    def __init__(self, boxes: Sequence[Box]) -> None:
        self.boxes = boxes
        ndim = len(boxes[0].offset) if boxes else 0
        spread = [len({b.offset[d] for b in boxes}) for d in range(ndim)]
        self._dim = max(range(ndim), key=spread.__getitem__) if ndim else None
        if self._dim is None:
            return
        dim = self._dim
        self._order = sorted(range(len(boxes)), key=lambda i: boxes[i].offset[dim])
        self._starts = [boxes[i].offset[dim] for i in self._order]
        self._max_end, end = [], 0
        for i in self._order:
            end = max(end, boxes[i].offset[dim] + boxes[i].extent[dim])
            self._max_end.append(end)

    def overlapping(self, box: Box) -> Iterator[tuple[int, Box]]:
        """Yields (position in `boxes`, intersection) for every box that overlaps `box`."""
        if self._dim is None:
            candidates: Iterable[int] = range(len(self.boxes))
        else:
            low = box.offset[self._dim]
            high = low + box.extent[self._dim]
            # Ends are a running maximum, hence sorted: everything before `first` ends too early.
            first = bisect_right(self._max_end, low)
            candidates = self._order[first : bisect_left(self._starts, high)]
        for i in candidates:
            common = self.boxes[i].intersect(box)
            if common is not None:
                yield i, common

    def cover(self, box: Box) -> tuple[list[tuple[int, Box]], list[Box]]:
        """Covers `box` by parts of the indexed boxes, each element exactly once.

        Returns:
            The parts as (position in `boxes`, sub-box), and what no indexed box holds.
        """
        missing = [box] if box.volume else []
        parts: list[tuple[int, Box]] = []
        for i, _ in self.overlapping(box):
            if not missing:
                break
            left: list[Box] = []
            for hole in missing:
                common = self.boxes[i].intersect(hole)
                if common is None:
                    left.append(hole)
                else:
                    parts.append((i, common))
                    left.extend(hole.subtract(common))
            missing = left
        return parts, missing


@dataclass(frozen=True)
class Layout:
    """Which rank holds which boxes of one logical tensor.

    Attributes:
        shape: Global shape.
        holders: (rank, box) pairs; several ranks may hold the same box (replicas).
    """

    shape: tuple[int, ...]
    holders: tuple[tuple[int, Box], ...]

    def __post_init__(self) -> None:
        whole = Box.full(self.shape)
        for rank, box in self.holders:
            if len(box.offset) != len(self.shape) or not whole.contains(box):
                raise ConfigError(f"rank {rank} holds {box}, outside of a tensor of {self.shape}")

    def replicas(self) -> dict[Box, list[int]]:
        """The distinct non-empty boxes, each with the ranks that hold it, in order."""
        ranks: dict[Box, list[int]] = {}
        for rank, box in self.holders:
            if box.volume:
                ranks.setdefault(box, []).append(rank)
        return ranks

    def missing(self) -> list[Box]:
        """The parts of the tensor that no rank holds."""
        return BoxIndex(list(self.replicas())).cover(Box.full(self.shape))[1]


@dataclass(frozen=True, slots=True)
class Transfer:
    """One box that rank `source` sends to rank `target` (both may be the same)."""

    source: int
    target: int
    box: Box


def plan_transfers(source: Layout, target: Layout) -> list[Transfer]:
    """Moves a tensor from one layout to another.

    Every element of every target box arrives exactly once, from the receiver itself where it has
    it already, else from the replica that has sent the least so far.

    Raises:
        ConfigError: The shapes differ, or the source does not hold what the target needs.
    """
    if source.shape != target.shape:
        raise ConfigError(f"cannot move a tensor of {source.shape} into one of {target.shape}")
    replicas = source.replicas()
    boxes, own = list(replicas), {}
    for rank, box in source.holders:
        own.setdefault(rank, []).append(box)
    index, own_index = BoxIndex(boxes), {rank: BoxIndex(b) for rank, b in own.items()}
    sent: dict[int, int] = {}
    transfers: list[Transfer] = []
    for rank, box in target.holders:
        wanted = [box]
        if rank in own_index:
            kept, wanted = own_index[rank].cover(box)
            transfers += [Transfer(rank, rank, part) for _, part in kept]
        for need in wanted:
            parts, missing = index.cover(need)
            if missing:
                raise ConfigError(f"no rank holds {missing[0]} of a tensor of {source.shape}")
            for i, part in parts:
                sender = min(replicas[boxes[i]], key=lambda r: (sent.get(r, 0), r))
                sent[sender] = sent.get(sender, 0) + part.volume
                transfers.append(Transfer(sender, rank, part))
    return transfers
