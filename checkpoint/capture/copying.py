"""Filling pool buffers with the chunks of a file, checksummed while the bytes are hot."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from planaria.checkpoint.capture.audit import Audit
from planaria.checkpoint.capture.checked import CheckedCopy
from planaria.checkpoint.capture.cutting import ChunkLayout, Run
from planaria.checkpoint.capture.file_sources import FileSources
from planaria.checkpoint.capture.kernels import copy_looking_for_nan, copy_pieces, has_nan
from planaria.checkpoint.capture.pool import Buffer, Buffers
from planaria.checkpoint.format.checksum import checksum
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
class _Copying:
    """A chunk that is being copied.

    Attributes:
        buffer: Where to.
        generation: The buffer's generation while it is ours.
        layout: What it is made of.
        copied: Once all of them have passed the copy is there.
        suspects: Which of its runs may hold a NaN: one was seen, or nobody has looked yet.
        checksum: Its checksum, where it was made on the way.
    """

    buffer: Buffer
    generation: int
    layout: ChunkLayout
    copied: list[torch.Event]
    suspects: list[Run]
    checksum: int | None = None


class ChunkCopier:
    """Copies one file's data section.

    Args:
        sources: What its entries are read from.
        chunks: Its chunks.
        pool: Memory to copy into; its buffer size is the chunk size.
        ready: For each CUDA device, an event after which its memory may be read.
        timeout_s: Longest wait for a buffer, in seconds.
        audit: Is shown what was captured.

    Attributes:
        nan_names: Tensors in which a NaN was seen.
    """

    def __init__(
        self,
        sources: FileSources,
        chunks: Sequence[ChunkLayout],
        pool: Buffers,
        ready: dict[torch.device, torch.Event],
        timeout_s: float,
        audit: Audit | None = None,
    ) -> None:
        self._sources, self._chunks = sources, chunks
        self._pool, self._timeout_s, self._audit = pool, timeout_s, audit
        # Copies from a device overlap with its computing, on a stream of their own.
        self._streams: list[torch.cuda.Stream] = []
        for device in sources.devices:
            stream = torch.cuda.Stream(device=device)
            if device in ready:
                stream.wait_event(ready[device])
            self._streams.append(stream)
        self._checked = CheckedCopy() if CheckedCopy.available() else None
        self.nan_names: set[str] = set()

    def chunks(self, before_each: Callable[[], None]) -> Iterator[Chunk]:
        """Copies chunk after chunk; a device's copy of one overlaps with the check of the last."""
        last: _Copying | None = None
        try:
            for layout in self._chunks:
                before_each()
                if last is not None and (self._pool.limit == 1 or not self._streams):
                    # Nothing overlaps on the host, and a pool of one buffer could not serve two.
                    done, last = last, None
                    yield self._finish(done)
                buffer = self._pool.acquire(Deadline(self._timeout_s))
                try:
                    now = self._copy(buffer, layout)
                except BaseException:
                    self._pool.release(buffer, buffer.generation)
                    raise
                if last is not None:
                    done, last = last, now
                    yield self._finish(done)
                else:
                    last = now
            if last is not None:
                done, last = last, None
                yield self._finish(done)
        finally:
            if last is not None:  # the copying failed: nobody else knows of this buffer
                for event in last.copied:
                    event.synchronize()
                self._pool.release(last.buffer, last.generation)

    def _copy(self, buffer: Buffer, chunk: ChunkLayout) -> _Copying:
        """Queues the copies; what lies on the host is looked at for NaNs on the way."""
        self._sources.check_in_place(chunk.numbers)
        addresses = self._sources.addresses[chunk.numbers]
        plain = addresses != 0
        target, from_ = buffer.tensor.data_ptr(), addresses + chunk.starts
        if self._checked is not None and plain.all() and self._checked.serves(target):
            seen, value = self._checked.copy(target, from_, chunk)
            return _Copying(buffer, buffer.generation, chunk, [], seen, value)
        suspects: list[Run] = []
        for run in chunk.runs:
            dtype, part = run[0], slice(run[1], run[2])
            if plain[part].all():
                pieces = chunk.places[part], from_[part], chunk.sizes[part]
                seen = copy_looking_for_nan(target, *pieces, dtype)
            else:
                here, seen = plain[part], True
                pieces = (each[part][here] for each in (chunk.places, from_, chunk.sizes))
                copy_pieces(target, *pieces)
            if seen:
                suspects.append(run)
        copied = [] if plain.all() else self._copy_others(buffer, chunk, plain)
        return _Copying(buffer, buffer.generation, chunk, copied, suspects)

    def _copy_others(
        self, buffer: Buffer, chunk: ChunkLayout, plain: np.ndarray
    ) -> list[torch.Event]:
        """Queues copies of what is no plain run of bytes on the host."""
        with contextlib.ExitStack() as streams:
            for stream in self._streams:
                streams.enter_context(torch.cuda.stream(stream))
            for i in np.flatnonzero(~plain):
                start, size = int(chunk.starts[i]), int(chunk.sizes[i])
                source = self._sources[chunk.numbers[i]]
                source.copy_to(buffer.tensor, int(chunk.places[i]), start, start + size)
        return [stream.record_event() for stream in self._streams]

    def _finish(self, copying: _Copying) -> Chunk:
        for event in copying.copied:
            event.synchronize()
        chunk = copying.layout
        view = copying.buffer.view(chunk.nbytes)
        self._look_for_nan(view, chunk, copying.suspects)
        if self._audit is not None:
            self._show(self._audit, view, chunk)
        value = copying.checksum
        if value is None:
            value = checksum(view)
        return Chunk(copying.buffer, copying.generation, chunk.nbytes, value)

    def _show(self, audit: Audit, view: memoryview, chunk: ChunkLayout) -> None:
        for name in audit.watched:
            for i in chunk.pieces_of.get(name, ()):
                origin = self._sources.origin(int(chunk.numbers[i]))
                if origin is not None:
                    audit.captured(name, origin + int(chunk.starts[i]), view[chunk.span(i, i + 1)])

    def _look_for_nan(self, view: memoryview, chunk: ChunkLayout, runs: Sequence[Run]) -> None:
        # Neighbours of one dtype are looked at in one go, apart only if it hits.
        for dtype, first, last in runs:
            if has_nan(view[chunk.span(first, last)], dtype):
                self.nan_names |= {
                    chunk.names[i]
                    for i in range(first, last)
                    if has_nan(view[chunk.span(i, i + 1)], dtype)
                }
