"""Reading boxes: which chunks of which files hold what is wanted, verified, straight into place.

Reading has two passes. The first reads and verifies every chunk that is needed and changes nothing,
keeping what it read up to a limit; only when all ranks have all they need does the second one copy
into the targets (and read again what was not kept).
"""

import os
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from planaria.checkpoint.capture.aligned import aligned_bytes
from planaria.checkpoint.capture.kernels import place_pieces
from planaria.checkpoint.capture.pool import Buffer, BufferPool
from planaria.checkpoint.capture.sources import is_plain
from planaria.checkpoint.format.checksum import checksum
from planaria.checkpoint.format.manifest import FileInfo, Manifest, StoredBox
from planaria.checkpoint.state.provider import Target
from planaria.checkpoint.storage.base import Mapped, Storage, reading
from planaria.checkpoint.storage.names import data_path
from planaria.core.box import Box, BoxIndex, row_major_blocks
from planaria.errors import CorruptError

#: Bytes that are read in one go, where a chunk has no more: several such reads are under way.
SPAN_NBYTES = 4 << 20
_THREADS = min(8, 2 * (os.cpu_count() or 1))


@dataclass(slots=True)
class _Piece:
    """A part of a stored box that goes into a part of a target.

    Attributes:
        start: First byte of the stored box in the data section.
        stored: Extent of the stored box.
        wanted: The part that is wanted, in the stored box's own coordinates.
        target: Where it goes: a view of the target, of shape `wanted.extent`.
        first: First byte of the stored box that is needed.
        last: One past the last.
        address: Where the bytes go as they are: a whole stored box into plain host memory; or None.
    """

    start: int
    stored: tuple[int, ...]
    wanted: Box
    target: torch.Tensor
    first: int
    last: int
    address: int | None = None

    @classmethod
    def of(cls, stored: StoredBox, wanted: Box, target: torch.Tensor) -> "_Piece":
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
class _Span:
    """Adjacent chunks of one file, and the pieces that they hold parts of."""

    file: FileInfo
    first_chunk: int
    chunks: int
    pieces: list[_Piece] = field(default_factory=list)
    kept: "tuple[Buffer, int] | None" = None
    mapped: torch.Tensor | None = None  # where it lies in memory already, verified

    @property
    def start(self) -> int:
        return self.first_chunk * self.file.chunk_nbytes

    @property
    def nbytes(self) -> int:
        return min(self.chunks * self.file.chunk_nbytes, self.file.data_nbytes - self.start)


class Reader:
    """Reads targets from one step.

    Args:
        storage: The root.
        manifest: The step.
        targets: What to read, and where to.
        pool: Where what the first pass read may stay for the second; the rest is read again.

    Raises:
        CorruptError: The step does not hold all of what it should.
    """

    def __init__(
        self, storage: Storage, manifest: Manifest, targets: Iterable[Target], pool: BufferPool
    ) -> None:
        self._storage, self._manifest, self._pool = storage, manifest, pool
        self._targets = [_Destination(t) for t in targets]
        self._indexes: dict[str, BoxIndex] = {}
        # Of each reading thread: for what the pool has no room, memory that has been touched.
        self._scratch = threading.local()
        self._spans = list(self._make_spans())

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return sum(span.nbytes for span in self._spans)

    def verify(self) -> None:
        """First pass: everything needed is there and is what was written.

        Raises:
            CorruptError: It is not; names file, chunk and tensors.
        """
        for span in self._spans:
            if span.nbytes <= self._pool.buffer_nbytes and self._view(span) is None:
                buffer = self._pool.try_acquire()
                if buffer is None:
                    break
                span.kept = buffer, buffer.generation
        try:
            self._each(self._read)
        except BaseException:
            self.close()
            raise

    def load(self) -> None:
        """Second pass: fills the targets.

        Raises:
            CorruptError: The data changed between the passes; the targets are half filled.
        """
        try:
            for target in self._targets:
                target.fill()
            self._each(self._place)
            for target in self._targets:
                target.finish()
        finally:
            self.close()

    def close(self) -> None:
        """Gives back what was kept."""
        for span in self._spans:
            self._release(span)

    def _view(self, span: _Span) -> torch.Tensor | None:
        """The span's bytes where they lie in memory, None where they must be read."""
        if not isinstance(self._storage, Mapped):
            return None
        path, start = data_path(self._manifest, span.file), span.file.data_start + span.start
        view = self._storage.view(path, start, span.nbytes)
        return None if view is None else torch.frombuffer(view, dtype=torch.uint8)

    def _release(self, span: _Span) -> None:
        span.mapped = None
        if span.kept is not None:
            self._pool.release(*span.kept)
            span.kept = None

    def _place(self, span: _Span) -> None:
        if span.mapped is not None:
            data = span.mapped
        else:
            data = span.kept[0].tensor if span.kept is not None else self._read(span)
        plain = [p for p in span.pieces if p.address is not None]
        if plain:
            _copy_plain(plain, data, span)
        for piece in span.pieces:
            if piece.address is None:
                piece.fill(data[: span.nbytes], span.start)
        self._release(span)

    def _each(self, work: Callable[[_Span], object]) -> None:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="planaria-read") as pool:
            # A future holds what its call returned: nothing, or all that was read would stay.
            for future in [pool.submit(_call, work, span) for span in self._spans]:
                future.result()

    def _read(self, span: _Span) -> torch.Tensor:
        path = data_path(self._manifest, span.file)
        mapped = self._view(span)
        if mapped is not None:
            data, count = mapped, span.nbytes
            view = data.numpy().data
        else:
            data = self._own_memory(span.nbytes) if span.kept is None else span.kept[0].tensor
            view = data.numpy().data[: span.nbytes]
            start_at = span.file.data_start + span.start
            count = reading(
                f"{self._storage.url}/{path}", lambda: self._storage.read_into(path, start_at, view)
            )
        for i in range(span.chunks):
            chunk = span.first_chunk + i
            start, nbytes = span.file.chunk_range(chunk)
            inside = view[start - span.start :][:nbytes]
            cut = start - span.start + nbytes > count
            if (
                cut
                or checksum(inside, self._manifest.checksum) != (span.file.chunk_checksums[chunk])
            ):
                raise CorruptError(describe_chunk(
                    self._storage.url, self._manifest, span.file, chunk, cut=cut
                ))  # fmt: skip
        span.mapped = mapped
        return data

    def _own_memory(self, nbytes: int) -> torch.Tensor:
        """Memory of this thread, good until it asks for some again."""
        data = getattr(self._scratch, "data", None)
        if data is None or data.numel() < nbytes:
            data = self._scratch.data = aligned_bytes(nbytes)
        return data

    def _make_spans(self) -> Iterator[_Span]:
        by_file: dict[int, list[_Piece]] = {}
        for target in self._targets:
            for file, piece in self._pieces(target):
                by_file.setdefault(file, []).append(piece)
        for number, pieces in sorted(by_file.items()):
            file = self._manifest.files[number]
            size, spans, end = file.chunk_nbytes, list[_Span](), 0
            most = max(1, SPAN_NBYTES // size)
            for piece in sorted(pieces, key=lambda p: p.first):
                # What lies before `end` is read already: it begins no later than this piece.
                if piece.last <= end * size:
                    continue
                for chunk in range(max(piece.first // size, end), -(-piece.last // size)):
                    if spans and chunk == end and spans[-1].chunks < most:
                        spans[-1].chunks += 1
                    else:
                        spans.append(_Span(file, chunk, 1))
                    end = chunk + 1
            starts = [span.start for span in spans]
            ends = [span.start + span.nbytes for span in spans]
            for piece in pieces:
                # Pieces may overlap: several targets can want the same bytes.
                first = bisect_right(starts, piece.first) - 1
                spans[first].pieces.append(piece)
                if piece.last > ends[first]:
                    for span in spans[first + 1 : bisect_left(starts, piece.last)]:
                        span.pieces.append(piece)
            yield from spans

    def _pieces(self, target: "_Destination") -> Iterator[tuple[int, _Piece]]:
        """Cuts a target into parts of stored boxes."""
        whole = self._whole(target)
        if whole is not None:
            yield whole
            return
        covered = 0
        for part in target.source.parts:
            here = target.box.intersect(part.box)
            if here is None:
                continue
            covered += here.volume
            if part.stored is None:
                continue
            shift = [o - b for o, b in zip(part.offset, part.box.offset, strict=True)]
            boxes = self._manifest.tensors[part.stored].boxes
            if part.stored not in self._indexes:
                self._indexes[part.stored] = BoxIndex([b.box for b in boxes])
            found, missing = self._indexes[part.stored].cover(here.shifted(shift))
            if missing:
                raise CorruptError(
                    f"step {self._manifest.step} holds no {missing[0]} of tensor {part.stored!r}"
                )
            for i, box in found:
                place = box.shifted([-s for s in shift]).relative_to(target.box)
                stored = boxes[i]
                wanted = box.relative_to(stored.box)
                yield stored.file, _Piece.of(stored, wanted, target.data[place.slices()])
        if covered < target.box.volume:
            raise CorruptError(f"step {self._manifest.step} holds only a part of {target.name!r}")

    def _whole(self, target: "_Destination") -> tuple[int, _Piece] | None:
        """The one piece that a target is, in the common case that it is one stored box."""
        part = target.source.parts[0] if len(target.source.parts) == 1 else None
        if part is None or part.stored is None or part.box.offset != part.offset:
            return None
        boxes = self._manifest.tensors[part.stored].boxes
        if len(boxes) != 1:
            return None
        stored, box = boxes[0], target.box
        if not _same(stored.box, box) or not _same(part.box, box) or not box.volume:
            return None
        return stored.file, _Piece.of(stored, Box.full(box.extent), target.data)


def _call(work: Callable[[_Span], object], span: _Span) -> None:
    work(span)


def _copy_plain(pieces: list[_Piece], data: torch.Tensor, span: _Span) -> None:
    """Copies whole boxes, or what of them lies in a span, in one go."""
    begin, end = span.start, span.start + span.nbytes
    table = [(p.address, p.first, p.last) for p in pieces]
    addresses, firsts, lasts = np.array(table, dtype=np.int64).T
    starts, stops = np.maximum(firsts, begin), np.minimum(lasts, end)
    place_pieces(addresses + starts - firsts, data.data_ptr() + starts - begin, stops - starts)


class _Destination:
    """A target, by way of a plain copy where several of its elements share memory."""

    def __init__(self, target: Target) -> None:
        self.name, self.box, self.source = target.name, target.box, target.source
        self._local = target.local
        self._shared = _may_share_elements(target.local)
        self.data = (
            torch.empty(target.local.shape, dtype=target.local.dtype)
            if self._shared
            else target.local
        )

    def fill(self) -> None:
        """Sets what the checkpoint has no data for."""
        for part in self.source.parts:
            here = part.box.intersect(self.box) if part.stored is None else None
            if here is not None:
                self.data[here.relative_to(self.box).slices()].fill_(part.fill)

    def finish(self) -> None:
        """Copies back where the data went into a plain copy."""
        if not self._shared or not self._local.numel():
            return
        index = torch.zeros((), dtype=torch.int64)
        for dim, (size, stride) in enumerate(
            zip(self._local.shape, self._local.stride(), strict=True)
        ):
            shape = [1] * self._local.dim()
            shape[dim] = size
            index = index + (torch.arange(size) * stride).reshape(shape)
        index = index.reshape(-1).to(self._local.device)
        memory = self._local.as_strided((int(index.max()) + 1,), (1,))
        memory[index] = self.data.reshape(-1).to(self._local.device)


def _same(a: Box, b: Box) -> bool:
    return a is b or a == b


def _may_share_elements(t: torch.Tensor) -> bool:
    """Whether two indices of a tensor may lead to the same memory (expanded, overlapping views)."""
    if t.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _flat(extent: tuple[int, ...], index: tuple[int, ...]) -> int:
    flat = 0
    for size, i in zip(extent, index, strict=True):
        flat = flat * size + i
    return flat


def describe_chunk(
    url: str, manifest: Manifest, file: FileInfo, chunk: int, *, cut: bool = False
) -> str:
    """One line that says which chunk is bad, and what it holds."""
    names = tensors_in_chunk(manifest, file, chunk)
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    what = "is cut off" if cut else "is damaged (its checksum does not match)"
    return f"{url}/{data_path(manifest, file)}: chunk {chunk} {what}; holds {shown}"


def tensors_in_chunk(manifest: Manifest, file: FileInfo, chunk: int) -> list[str]:
    """Names of the tensors with bytes in a chunk."""
    number = manifest.files.index(file)
    start, nbytes = file.chunk_range(chunk)
    return [
        name
        for name, info in manifest.tensors.items()
        for b in info.boxes
        if b.file == number
        and b.start < start + nbytes
        and b.start + b.box.volume * info.dtype.itemsize > start
    ]
