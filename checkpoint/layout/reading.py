"""Reading boxes: which chunks of which files hold what is wanted, verified, straight into place.

Reading has two passes. The first reads and verifies every chunk that is needed, keeping what it
read up to a limit; only when all ranks have all they need does the second one copy into the targets
(and read again what was not kept). While the first one waits for the disk the processor has time:
so what it keeps already changes places with what the targets hold. Unless the second pass follows,
that is put back, bit for bit.
"""

import os
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from planaria.checkpoint.capture.aligned import aligned_bytes
from planaria.checkpoint.capture.pool import NEIGHBOURS, Buffer, BufferPool
from planaria.checkpoint.format.checksum import checksum
from planaria.checkpoint.format.manifest import FileInfo, Manifest
from planaria.checkpoint.layout.pieces import Piece, Span, find_alone, runs_of
from planaria.checkpoint.state.provider import Target
from planaria.checkpoint.storage.base import Mapped, Storage, reading
from planaria.checkpoint.storage.names import data_path
from planaria.core.box import Box, BoxIndex
from planaria.core.interrupts import uninterrupted
from planaria.errors import CorruptError

#: Bytes that are read in one go, where a chunk has no more: several such reads are under way.
SPAN_NBYTES = 4 << 20
_THREADS = min(8, 2 * (os.cpu_count() or 1))
#: Threads that check what was read; they do not wait for the disk.
_CHECKING = min(8, os.cpu_count() or 1)
#: Spans that are read in one go where a storage has them in memory of its own meanwhile.
_FAR_NEIGHBOURS = 2


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
        self._mapped = storage if isinstance(storage, Mapped) else None
        self._targets = [_Destination(t) for t in targets]
        # What is not read is set at the end, whatever else lies there.
        self._exchanges = all(p.stored is not None for t in self._targets for p in t.source.parts)
        self._indexes: dict[str, BoxIndex] = {}
        # Of each reading thread: for what the pool has no room, memory that has been touched.
        self._scratch = threading.local()
        self._stopped = threading.Event()
        self._spans = list(self._make_spans())

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return sum(span.nbytes for span in self._spans)

    def verify(self) -> None:
        """First pass: everything needed is there and is what was written.

        Until `load` follows, the targets are in use: only then, or after `close`, they hold all of
        what was read, or all of what they held.

        Raises:
            CorruptError: It is not; names file, chunk and tensors.
        """
        try:
            uninterrupted(self._read_all, self._stopped.set)
        except BaseException:
            self.close()
            raise

    def load(self) -> None:
        """Second pass: fills the targets.

        Raises:
            CorruptError: The data changed between the passes; the targets are half filled.
        """
        try:
            left = [span for span in self._spans if not span.exchanged]
            for span in self._spans:
                span.exchanged = False  # for good
            for target in self._targets:
                target.fill()
            with _threads("read") as readers:
                for placed in [readers.submit(self._place, span) for span in left]:
                    placed.result()
            for target in self._targets:
                target.finish()
        finally:
            self.close()

    def close(self) -> None:
        """Gives back what was kept; unless `load` was called, first what was in the targets."""
        uninterrupted(self._give_back)

    def _give_back(self) -> None:
        for span in self._spans:
            if span.exchanged:
                span.exchange()
            self._release(span)

    def _view(self, span: Span) -> torch.Tensor | None:
        """The span's bytes where they lie in memory, None where they must be read."""
        if self._mapped is None:
            return None
        path, start = data_path(self._manifest, span.file), span.file.data_start + span.start
        view = self._mapped.view(path, start, span.nbytes)
        return None if view is None else torch.frombuffer(view, dtype=torch.uint8)

    def _release(self, span: Span) -> None:
        span.mapped = None
        if span.kept is not None:
            self._pool.release(*span.kept)
            span.kept = None

    def _keep(self) -> None:
        """Takes buffers for as many spans as it gets some for, neighbours for neighbours."""
        wanted = [
            span
            for span in self._spans
            if span.nbytes <= self._pool.buffer_nbytes and self._view(span) is None
        ]
        buffers: list[Buffer] = []
        try:
            while len(buffers) < len(wanted) and (buffer := self._pool.try_acquire()) is not None:
                buffers.append(buffer)
        except BaseException:  # there is no memory for one more
            for buffer in buffers:
                self._pool.release(buffer, buffer.generation)
            raise
        buffers.sort(key=lambda b: b.tensor.data_ptr())
        for span, buffer in zip(wanted, buffers, strict=False):
            span.kept = buffer, buffer.generation

    def _read_all(self) -> None:
        """Reads and checks every span, until one of them is bad or it is told to stop."""
        self._keep()
        most = NEIGHBOURS if self._storage.local is not None else _FAR_NEIGHBOURS
        runs = runs_of(self._spans, most, _THREADS)
        with _threads("check", _CHECKING) as checking, _threads("read") as readers:
            try:
                for read in [readers.submit(self._take, run, checking) for run in runs]:
                    if (checked := read.result()) is not None:
                        checked.result()
            except BaseException:  # what else there is need not be read
                self._stopped.set()
                raise

    def _take(self, run: list[Span], checking: ThreadPoolExecutor) -> "Future[None] | None":
        """Reads spans of the first pass in one go; what is kept is then checked by others.

        A thread that reads should read: the disk has nothing to do while it does not.
        """
        kept = run[0].kept
        if self._stopped.is_set():
            return None
        if kept is None:
            self._read(run[0])
            return None
        nbytes = sum(span.nbytes for span in run)
        memory = kept[0].tensor
        memory = memory.as_strided((nbytes,), (1,), memory.storage_offset())
        return checking.submit(self._check_and_exchange, run, self._fetch(run[0], memory))

    def _check_and_exchange(self, run: list[Span], count: int) -> None:
        for span in run:
            if self._stopped.is_set():
                return
            assert span.kept is not None
            self._check(span, span.kept[0].tensor, count + run[0].start - span.start)
            if self._exchanges and span.may_exchange():
                span.exchange()

    def _place(self, span: Span) -> None:
        if span.mapped is not None:
            data = span.mapped
        else:
            data = span.kept[0].tensor if span.kept is not None else self._read(span)
        span.place(data)
        self._release(span)

    def _read(self, span: Span) -> torch.Tensor:
        """The bytes of a span that is not kept, verified: a view, or memory of this thread."""
        mapped = self._view(span)
        if mapped is not None:
            data, count = mapped, span.nbytes
        else:
            data = self._own_memory(span.nbytes)
            count = self._fetch(span, data[: span.nbytes])
        self._check(span, data, count)
        span.mapped = mapped
        return data

    def _fetch(self, span: Span, memory: torch.Tensor) -> int:
        """Fills memory with what lies from a span's first byte on; returns how much there was."""
        path, start = data_path(self._manifest, span.file), span.file.data_start + span.start
        view = memory.numpy().data
        return reading(
            f"{self._storage.url}/{path}", lambda: self._storage.read_into(path, start, view)
        )

    def _check(self, span: Span, data: torch.Tensor, count: int) -> None:
        view = data.numpy().data
        for chunk in range(span.first_chunk, span.first_chunk + span.chunks):
            start, nbytes = span.file.chunk_range(chunk)
            inside = view[start - span.start :][:nbytes]
            cut = start - span.start + nbytes > count
            if (
                cut
                or checksum(inside, self._manifest.checksum) != (span.file.chunk_checksums[chunk])
            ):
                raise CorruptError(
                    describe_chunk(self._storage.url, self._manifest, span.file, chunk, cut=cut)
                )

    def _own_memory(self, nbytes: int) -> torch.Tensor:
        """Memory of this thread, good until it asks for some again."""
        data = getattr(self._scratch, "data", None)
        if data is None or data.numel() < nbytes:
            data = self._scratch.data = aligned_bytes(nbytes)
        return data

    def _make_spans(self) -> Iterator[Span]:
        by_file: dict[int, list[Piece]] = {}
        for target in self._targets:
            for file, piece in self._pieces(target):
                by_file.setdefault(file, []).append(piece)
        find_alone(by_file.values())
        for number, pieces in sorted(by_file.items()):
            file = self._manifest.files[number]
            size, spans, end = file.chunk_nbytes, list[Span](), 0
            most = max(1, SPAN_NBYTES // size)
            for piece in sorted(pieces, key=lambda p: p.first):
                # What lies before `end` is read already: it begins no later than this piece.
                if piece.last <= end * size:
                    continue
                for chunk in range(max(piece.first // size, end), -(-piece.last // size)):
                    if spans and chunk == end and spans[-1].chunks < most:
                        spans[-1].chunks += 1
                    else:
                        spans.append(Span(file, chunk, 1))
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

    def _pieces(self, target: "_Destination") -> Iterator[tuple[int, Piece]]:
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
                yield stored.file, Piece.of(stored, wanted, target.data[place.slices()])
        if covered < target.box.volume:
            raise CorruptError(f"step {self._manifest.step} holds only a part of {target.name!r}")

    def _whole(self, target: "_Destination") -> tuple[int, Piece] | None:
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
        return stored.file, Piece.of(stored, Box.full(box.extent), target.data)


def _threads(name: str, count: int | None = None) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count or _THREADS, thread_name_prefix=f"planaria-{name}")


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
