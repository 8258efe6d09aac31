"""What is read of a file: pieces of boxes, each with its place, and the spans that hold them."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from planaria.checkpoint.capture.kernels import exchange_pieces, place_pieces
from planaria.checkpoint.capture.pool import Buffer
from planaria.checkpoint.capture.sources import is_plain
from planaria.checkpoint.format.manifest import FileInfo, StoredBox
from planaria.core.box import Box, row_major_blocks


@dataclass(slots=True)
class Piece:
    """A part of a stored box that goes into a part of a target.

    Attributes:
        start: First byte of the stored box in the data section.
        stored: Extent of the stored box.
        wanted: The part that is wanted, in the stored box's own coordinates.
        target: Where it goes: a view of the target, of shape `wanted.extent`.
        first: First byte of the stored box that is needed.
        last: One past the last.
        address: Where the bytes go as they are: a whole stored box into plain host memory; or None.
        alone: Whether no other piece has any of its bytes, nor any of the memory that they go to,
            nor another process that memory.
    """

    start: int
    stored: tuple[int, ...]
    wanted: Box
    target: torch.Tensor
    first: int
    last: int
    address: int | None = None
    alone: bool = False

    @property
    def memory(self) -> tuple[int, int]:
        """First byte in memory, and one past the last, where that is known."""
        assert self.address is not None
        return self.address, self.address + self.last - self.first

    @classmethod
    def of(cls, stored: StoredBox, wanted: Box, target: torch.Tensor) -> "Piece":
        """The part `wanted` of a stored box."""
        size, extent = target.element_size(), stored.box.extent
        if wanted.extent == extent:
            first, last = stored.start, stored.start + stored.box.volume * size
            address = target.data_ptr() if is_plain(target) else None
            return cls(stored.start, extent, wanted, target, first, last, address)
        corner = tuple(e - 1 for e in wanted.end)
        first = stored.start + _flat(extent, wanted.offset) * size
        last = stored.start + (_flat(extent, corner) + 1) * size
        return cls(stored.start, extent, wanted, target, first, last)

    def fill(self, data: torch.Tensor, data_start: int) -> None:
        """Takes what it can from bytes of the data section that begin at `data_start`."""
        size = self.target.element_size()
        begin = max(self.first, data_start)
        end = min(self.last, data_start + data.numel())
        done = (begin - self.start) // size
        for block in row_major_blocks(self.stored, done, (end - self.start) // size):
            at = self.start + done * size - data_start
            done += block.volume
            common = block.intersect(self.wanted)
            if common is None:
                continue
            values = data[at : at + block.volume * size].view(self.target.dtype)
            values = values.view(block.extent)[common.relative_to(block).slices()]
            self.target[common.relative_to(self.wanted).slices()].copy_(values)


@dataclass(slots=True)
class Span:
    """Adjacent chunks of one file, and the pieces that they hold parts of.

    Attributes:
        file: The file.
        first_chunk: Number of the first chunk.
        chunks: How many there are.
        pieces: What is wanted of them.
        kept: Where their bytes are kept between the passes, and the generation of that buffer.
        mapped: Where they lie in memory already, verified.
        exchanged: Whether what was kept is in place, and what was there is kept.
    """

    file: FileInfo
    first_chunk: int
    chunks: int
    pieces: list[Piece] = field(default_factory=list)
    kept: "tuple[Buffer, int] | None" = None
    mapped: torch.Tensor | None = None
    exchanged: bool = False

    @property
    def start(self) -> int:
        """First byte in the data section."""
        return self.first_chunk * self.file.chunk_nbytes

    @property
    def nbytes(self) -> int:
        """Their length."""
        return min(self.chunks * self.file.chunk_nbytes, self.file.data_nbytes - self.start)

    def may_exchange(self) -> bool:
        """Whether what is read can change places with what is where it goes, and back again."""
        return self.kept is not None and all(p.alone for p in self.pieces)

    def exchange(self) -> None:
        """Lets what was kept change places with what is where it goes."""
        assert self.kept is not None
        self._move(exchange_pieces, self.pieces, self.kept[0].tensor)
        self.exchanged = not self.exchanged

    def place(self, data: torch.Tensor) -> None:
        """Copies the bytes of all of it to where they go."""
        plain = [p for p in self.pieces if p.address is not None]
        if plain:
            self._move(place_pieces, plain, data)
        for piece in self.pieces:
            if piece.address is None:
                piece.fill(data[: self.nbytes], self.start)

    def _move(
        self,
        move: Callable[[np.ndarray, np.ndarray, np.ndarray], None],
        pieces: list[Piece],
        data: torch.Tensor,
    ) -> None:
        # Whole boxes, or what of them lies here, in one go.
        begin, end = self.start, self.start + self.nbytes
        table = [(p.address, p.first, p.last) for p in pieces]
        addresses, firsts, lasts = np.array(table, dtype=np.int64).T
        starts, stops = np.maximum(firsts, begin), np.minimum(lasts, end)
        move(addresses + starts - firsts, data.data_ptr() + starts - begin, stops - starts)


def runs_of(spans: Sequence[Span], most: int, threads: int) -> Iterator[list[Span]]:
    """Spans that can be read in one go: neighbours in a file, kept in neighbouring memory.

    Runs get shorter towards the end, so that all threads end at once, and little is left to be
    checked when the last byte was read.

    Args:
        spans: In order.
        most: How many may be read in one go.
        threads: How many runs are read at a time.
    """
    run: list[Span] = []
    for number, span in enumerate(spans):
        longest = min(most, max(1, (len(spans) - number + len(run)) // (2 * threads)))
        if run and not (len(run) < longest and _follows(span, run[-1])):
            yield run
            run = []
        run.append(span)
    if run:
        yield run


def _follows(span: Span, before: Span) -> bool:
    if span.kept is None or before.kept is None or span.file is not before.file:
        return False
    memory, memory_before = span.kept[0].tensor, before.kept[0].tensor
    return (
        span.start == before.start + before.nbytes
        and memory.data_ptr() == memory_before.data_ptr() + before.nbytes
        and memory.untyped_storage().data_ptr() == memory_before.untyped_storage().data_ptr()
    )


def find_alone(by_file: Collection[list[Piece]]) -> None:
    """Finds the pieces that share nothing with another; those of each file are in one list."""
    plain = [p for pieces in by_file for p in pieces if p.address is not None]
    for piece, alone in zip(plain, _disjoint([p.memory for p in plain]), strict=True):
        piece.alone = bool(alone) and not piece.target.untyped_storage().is_shared()
    for pieces in by_file:
        in_file = _disjoint([(p.first, p.last) for p in pieces])
        for piece, alone in zip(pieces, in_file, strict=True):
            piece.alone &= bool(alone)


def _disjoint(intervals: list[tuple[int, int]]) -> np.ndarray:
    """Which half-open intervals overlap with no other, bool[n]."""
    starts, ends = np.array(intervals, dtype=np.int64).reshape(-1, 2).T
    order = np.argsort(starts, kind="stable")
    reach = np.maximum.accumulate(ends[order])
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = starts[order][1:] >= reach[:-1]
    groups = np.cumsum(begins) - 1
    found = np.empty_like(begins)
    found[order] = np.bincount(groups)[groups] == 1
    return found


def _flat(extent: tuple[int, ...], index: tuple[int, ...]) -> int:
    flat = 0
    for size, i in zip(extent, index, strict=True):
        flat = flat * size + i
    return flat
