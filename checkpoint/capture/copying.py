"""Filling pool buffers with the chunks of a file, checksummed while the bytes are hot."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from planaria.checkpoint.capture.audit import Audit
from planaria.checkpoint.capture.cutting import ChunkLayout
from planaria.checkpoint.capture.file_sources import FileSources
from planaria.checkpoint.capture.kernels import copy_pieces, has_nan
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
        self._sources.check_in_place(chunk.numbers)
        addresses = self._sources.addresses[chunk.numbers]
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
        for name in audit.watched:
            for i in chunk.pieces_of.get(name, ()):
                origin = self._sources.origin(int(chunk.numbers[i]))
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
