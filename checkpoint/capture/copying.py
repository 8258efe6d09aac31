"""Filling pool buffers with the chunks of a file, checksummed while the bytes are hot.

A chunk is a fixed range of the file's data section, whatever tensors fall into it: small tensors
are coalesced, large ones are cut, and each buffer becomes one large write.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from planaria.checkpoint.capture.audit import Audit
from planaria.checkpoint.capture.kernels import has_nan
from planaria.checkpoint.capture.pool import Buffer, BufferPool
from planaria.checkpoint.capture.sources import Source
from planaria.checkpoint.format.checksum import checksum
from planaria.checkpoint.format.safetensors import FileEntry
from planaria.checkpoint.state.entries import TensorEntry
from planaria.core.deadline import Deadline


@dataclass(slots=True)
class Chunk:
    """One captured chunk.

    Attributes:
        buffer: Where it is.
        generation: The buffer's generation while it is ours.
        nbytes: Its length.
        checksum: Its checksum.
    """

    buffer: Buffer
    generation: int
    nbytes: int
    checksum: int


@dataclass(slots=True)
class _Piece:
    """Bytes [start, stop) of an entry, which lie from byte `at` on in a chunk.

    The entry begins at byte `origin` of what this rank holds of its tensor; None if it is not one
    run of bytes there.
    """

    entry: FileEntry
    source: Source
    start: int
    stop: int
    at: int
    origin: int | None


class ChunkCopier:
    """Copies one file's data section.

    Args:
        layout: The file's entries, in order.
        entries: The live tensors by name.
        pool: Memory to copy into; its buffer size is the chunk size.
        ready: For each CUDA device, an event after which its memory may be read.
        timeout_s: Longest wait for a buffer, in seconds.
        audit: Is shown what was captured.
    """

    def __init__(
        self,
        layout: list[FileEntry],
        entries: dict[str, TensorEntry],
        pool: BufferPool,
        ready: dict[torch.device, torch.Event],
        timeout_s: float,
        audit: Audit | None = None,
    ) -> None:
        self._pool, self._timeout_s, self._audit = pool, timeout_s, audit
        self._origins = [_origin(item, entries[item.name]) for item in layout]
        self._sources = [Source(_local_part(item, entries[item.name])) for item in layout]
        self._layout = layout
        # Copies from a device overlap with its computing, on a stream of their own.
        self._streams: list[torch.cuda.Stream] = []
        for device in sorted({s.data.device for s in self._sources if s.data.is_cuda}, key=str):
            stream = torch.cuda.Stream(device=device)
            if device in ready:
                stream.wait_event(ready[device])
            self._streams.append(stream)
        self.nan_names: set[str] = set()

    def chunks(self, before_each: Callable[[], None]) -> Iterator[Chunk]:
        """Copies chunk after chunk; a device's copy of one overlaps with the check of the last."""
        last: tuple[Buffer, int, list[_Piece], list[torch.Event]] | None = None
        try:
            for pieces in self._cut():
                before_each()
                if last is not None and (self._pool.limit == 1 or not self._streams):
                    # Nothing overlaps on the host, and a pool of one buffer could not serve two.
                    done, last = last, None
                    yield self._finish(*done)
                buffer = self._pool.acquire(Deadline(self._timeout_s))
                try:
                    now = (buffer, buffer.generation, pieces, self._copy(buffer, pieces))
                except BaseException:
                    self._pool.release(buffer, buffer.generation)
                    raise
                if last is not None:
                    done, last = last, now
                    yield self._finish(*done)
                else:
                    last = now
            if last is not None:
                done, last = last, None
                yield self._finish(*done)
        finally:
            if last is not None:  # the copying failed: nobody else knows of this buffer
                for event in last[3]:
                    event.synchronize()
                self._pool.release(last[0], last[1])

    def _cut(self) -> Iterator[list[_Piece]]:
        size, pieces = self._pool.buffer_nbytes, []
        for entry, source, origin in zip(self._layout, self._sources, self._origins, strict=True):
            start = 0
            while start < entry.nbytes:
                at = (entry.start + start) % size
                stop = min(entry.nbytes, start + size - at)
                pieces.append(_Piece(entry, source, start, stop, at, origin))
                if at + stop - start == size:
                    yield pieces
                    pieces = []
                start = stop
        if pieces:
            yield pieces

    def _copy(self, buffer: Buffer, pieces: list[_Piece]) -> list[torch.Event]:
        """Queues the copies; the buffer is filled once all events have passed."""
        with contextlib.ExitStack() as streams:
            for stream in self._streams:
                streams.enter_context(torch.cuda.stream(stream))
            for p in pieces:
                p.source.copy_to(buffer.tensor, p.at, p.start, p.stop)
        return [stream.record_event() for stream in self._streams]

    def _finish(
        self, buffer: Buffer, generation: int, pieces: list[_Piece], copied: list[torch.Event]
    ) -> Chunk:
        for event in copied:
            event.synchronize()
        nbytes = pieces[-1].at + pieces[-1].stop - pieces[-1].start
        view = buffer.view(nbytes)
        self._look_for_nan(view, pieces)
        if self._audit is not None:
            for p in pieces:
                if p.origin is None:
                    continue
                part = view[p.at : p.at + p.stop - p.start]
                self._audit.captured(p.entry.name, p.origin + p.start, part)
        return Chunk(buffer, generation, nbytes, checksum(view))

    def _look_for_nan(self, view: memoryview, pieces: list[_Piece]) -> None:
        # Entries are sorted by dtype: neighbours are looked at in one go, apart only if it hits.
        first = 0
        for i, piece in enumerate(pieces):
            last = i + 1 == len(pieces)
            if not last and pieces[i + 1].entry.dtype == piece.entry.dtype:
                continue
            end = piece.at + piece.stop - piece.start
            if has_nan(view[pieces[first].at : end], piece.entry.dtype):
                for p in pieces[first : i + 1]:
                    if has_nan(view[p.at : p.at + p.stop - p.start], p.entry.dtype):
                        self.nan_names.add(p.entry.name)
            first = i + 1


def _origin(item: FileEntry, entry: TensorEntry) -> int | None:
    """First byte of an entry in what this rank holds of its tensor; None if it is no one run."""
    if not entry.local.numel():
        return None
    inner, held = item.box.relative_to(entry.box), entry.box.extent
    cut = next((d for d, n in enumerate(inner.extent) if n != 1), len(held))
    if inner.extent[cut + 1 :] != held[cut + 1 :]:
        return None
    first = 0
    for size, offset in zip(held, inner.offset, strict=True):
        first = first * size + offset
    return first * item.dtype.itemsize


def _local_part(item: FileEntry, entry: TensorEntry) -> torch.Tensor:
    if item.box == entry.box or entry.local.dim() == 0 or not entry.local.numel():
        return entry.local
    return entry.local[item.box.relative_to(entry.box).slices()]
