"""Filling pool buffers with the chunks of a file, checksummed while the bytes are hot."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from planaria.checkpoint.capture.audit import Audit
from planaria.checkpoint.capture.cutting import ChunkLayout, cut
from planaria.checkpoint.capture.kernels import copy_pieces, has_nan
from planaria.checkpoint.capture.pool import Buffer, Buffers
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


class ChunkCopier:
    """Copies one file's data section.

    Args:
        layout: The file's entries, in order.
        entries: The live tensors by name.
        pool: Memory to copy into; its buffer size is the chunk size.
        ready: For each CUDA device, an event after which its memory may be read.
        timeout_s: Longest wait for a buffer, in seconds.
        audit: Is shown what was captured.
        chunks: The file's chunks, where they are known already.

    Attributes:
        nan_names: Tensors in which a NaN was seen.
    """

    def __init__(
        self,
        layout: list[FileEntry],
        entries: dict[str, TensorEntry],
        pool: Buffers,
        ready: dict[torch.device, torch.Event],
        timeout_s: float,
        audit: Audit | None = None,
        chunks: Sequence[ChunkLayout] | None = None,
    ) -> None:
        self._pool, self._timeout_s, self._audit = pool, timeout_s, audit
        self._layout, self._entries = layout, entries
        self._chunks = cut(layout, pool.buffer_nbytes) if chunks is None else chunks
        self._sources = [source_of(item, entries[item.name]) for item in layout]
        self._addresses = np.array([s.address or 0 for s in self._sources], dtype=np.int64)
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
        last: tuple[Buffer, int, ChunkLayout, list[torch.Event]] | None = None
        try:
            for layout in self._chunks:
                before_each()
                if last is not None and (self._pool.limit == 1 or not self._streams):
                    # Nothing overlaps on the host, and a pool of one buffer could not serve two.
                    done, last = last, None
                    yield self._finish(*done)
                buffer = self._pool.acquire(Deadline(self._timeout_s))
                try:
                    now = (buffer, buffer.generation, layout, self._copy(buffer, layout))
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

    def _copy(self, buffer: Buffer, chunk: ChunkLayout) -> list[torch.Event]:
        """Queues the copies; the buffer is filled once all events have passed."""
        self._check_in_place(chunk)
        addresses = self._addresses[chunk.numbers]
        plain = addresses != 0
        copy_pieces(
            buffer.tensor.data_ptr(),
            chunk.places[plain],
            (addresses + chunk.starts)[plain],
            chunk.sizes[plain],
        )
        if plain.all():
            return []
        with contextlib.ExitStack() as streams:
            for stream in self._streams:
                streams.enter_context(torch.cuda.stream(stream))
            for i in np.flatnonzero(~plain):
                start, size = int(chunk.starts[i]), int(chunk.sizes[i])
                source = self._sources[chunk.numbers[i]]
                source.copy_to(buffer.tensor, int(chunk.places[i]), start, start + size)
        return [stream.record_event() for stream in self._streams]

    def _check_in_place(self, chunk: ChunkLayout) -> None:
        """Memory that was given back meanwhile must not be read: that would end the process."""
        for number in chunk.numbers:
            source, name = self._sources[number], self._layout[number].name
            entry = self._entries[name]
            # A slice is made here, and has whatever address the tensor has by now.
            whole = source if source.data is entry.local else entry.source
            source.check_in_place(name)
            whole.check_in_place(name)

    def _finish(
        self, buffer: Buffer, generation: int, chunk: ChunkLayout, copied: list[torch.Event]
    ) -> Chunk:
        for event in copied:
            event.synchronize()
        view = buffer.view(chunk.nbytes)
        self._look_for_nan(view, chunk)
        if self._audit is not None:
            self._show(self._audit, view, chunk)
        return Chunk(buffer, generation, chunk.nbytes, checksum(view))

    def _show(self, audit: Audit, view: memoryview, chunk: ChunkLayout) -> None:
        for i, name in enumerate(chunk.names):
            if name not in audit.watched:
                continue
            origin = origin_of(self._layout[chunk.numbers[i]], self._entries[name])
            if origin is not None:
                audit.captured(name, origin + int(chunk.starts[i]), view[chunk.span(i, i + 1)])

    def _look_for_nan(self, view: memoryview, chunk: ChunkLayout) -> None:
        # Neighbours of one dtype are looked at in one go, apart only if it hits.
        for dtype, first, last in chunk.runs:
            if has_nan(view[chunk.span(first, last)], dtype):
                self.nan_names |= {
                    chunk.names[i]
                    for i in range(first, last)
                    if has_nan(view[chunk.span(i, i + 1)], dtype)
                }


def origin_of(item: FileEntry, entry: TensorEntry) -> int | None:
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


def source_of(item: FileEntry, entry: TensorEntry) -> Source:
    """What an entry of the file is read from."""
    if item.box is entry.box or item.box == entry.box or not entry.nbytes:
        return entry.source
    return Source(entry.local[item.box.relative_to(entry.box).slices()])
