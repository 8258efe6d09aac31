"""Capturing what has changed: entries that another step holds already are referred to instead.

An entry is copied to a place of its own and hashed there; only if no file is known to hold the same
bytes is it packed into a buffer that will be written. So what is hashed is what is stored, also
where something got past the gate, and the live memory is read once. The hash is SHA-256: it stands
for the bytes, and a weaker one could let other bytes stand for them.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from planaria.checkpoint.capture.aligned import aligned_bytes
from planaria.checkpoint.capture.audit import Audit
from planaria.checkpoint.capture.copying import Chunk
from planaria.checkpoint.capture.file_sources import origin_of, source_of
from planaria.checkpoint.capture.kernels import has_nan
from planaria.checkpoint.capture.pool import Buffer, BufferPool
from planaria.checkpoint.capture.sources import Source
from planaria.checkpoint.format.checksum import checksum
from planaria.checkpoint.format.manifest import FileInfo
from planaria.checkpoint.format.safetensors import FileEntry, Header
from planaria.checkpoint.state.entries import TensorEntry
from planaria.core.deadline import Deadline

#: Of a chunk, the part that an entry must have to be worth a reference: a file is kept as a whole
#: as long as anything in it is wanted, and should not be for the sake of a few bytes.
MIN_PART = 64

#: Where a step holds bytes with a digest: the file, and the first byte in its data section.
Places = Mapping[bytes, tuple[FileInfo, int]]


@dataclass(frozen=True, slots=True)
class Packed:
    """What became of one entry.

    Attributes:
        file: The file of another step that holds it; None if it is written now.
        start: First byte in that file's data section, or in the one that is written.
        digest: Of its bytes, in hex; empty where it is too small to be looked for.
    """

    file: FileInfo | None
    start: int
    digest: str


class Packer:
    """Captures the entries of one rank.

    Args:
        entries: In the order of the file.
        live: The live tensors by name.
        places: What other steps hold already.
        pool: Memory to pack into; its buffer size is the chunk size.
        ready: For each CUDA device, an event after which its memory may be read.
        timeout_s: Longest wait for a buffer, in seconds.
        audit: Is shown what was captured, written or not.

    Attributes:
        packed: What became of each entry so far, in their order.
        nbytes: Bytes packed so far, which are written.
        nan_names: Tensors in which a NaN was seen.
    """

    def __init__(
        self,
        entries: Sequence[FileEntry],
        live: Mapping[str, TensorEntry],
        places: Places,
        pool: BufferPool,
        ready: Mapping[torch.device, torch.Event],
        timeout_s: float,
        audit: Audit | None,
    ) -> None:
        self._entries, self._live, self._places = entries, live, places
        self._pool, self._timeout_s, self._audit = pool, timeout_s, audit
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        for device, event in ready.items():
            self._streams[device] = torch.cuda.Stream(device=device)
            self._streams[device].wait_event(event)
        largest = max((e.nbytes for e in entries), default=0)
        self._scratch = aligned_bytes(largest)
        self.packed: list[Packed] = []
        self.nbytes = 0
        self.nan_names: set[str] = set()

    @property
    def referenced_nbytes(self) -> int:
        """Bytes that are not written, for other steps hold them."""
        pairs = zip(self._entries, self.packed, strict=False)
        return sum(entry.nbytes for entry, packed in pairs if packed.file is not None)

    @property
    def writes_any(self) -> bool:
        """Whether any entry so far is written, be it an empty one."""
        return any(packed.file is None for packed in self.packed)

    def chunks(self, before_each: Callable[[], None]) -> Iterator[Chunk]:
        """Packs what is to be written, chunk after chunk.

        Args:
            before_each: Called before each chunk that is begun, and before the first entry.
        """
        buffer, generation, filled = None, 0, 0
        try:
            before_each()
            for entry in self._entries:
                data = self._capture(entry)
                if self._is_held(entry, data):
                    continue
                done = 0
                while done < entry.nbytes:
                    if buffer is None:
                        if self.nbytes:
                            before_each()
                        buffer = self._pool.acquire(Deadline(self._timeout_s))
                        generation, filled = buffer.generation, 0
                    size = min(entry.nbytes - done, self._pool.buffer_nbytes - filled)
                    buffer.view(filled + size)[filled:] = data[done : done + size]
                    done, filled, self.nbytes = done + size, filled + size, self.nbytes + size
                    if filled == self._pool.buffer_nbytes:
                        full, buffer = buffer, None
                        yield self._chunk(full, generation, filled)
            if buffer is not None:
                last, buffer = buffer, None
                yield self._chunk(last, generation, filled)
        finally:
            if buffer is not None:  # the capture failed: nobody else knows of this buffer
                self._pool.release(buffer, generation)

    def header(self, step: int, nbytes: int) -> bytes:
        """The header of what was written, in the room that was left for it."""
        written = [
            replace(entry, start=packed.start)
            for entry, packed in zip(self._entries, self.packed, strict=True)
            if packed.file is None
        ]
        return Header(written).render(step, nbytes)

    def _capture(self, entry: FileEntry) -> memoryview:
        # Of the whole tensor: a slice of it that is made now would have the new address.
        self._live[entry.name].source.check_in_place(entry.name)
        self._copy(source_of(entry, self._live[entry.name]), entry.nbytes)
        data = self._scratch.numpy().data[: entry.nbytes]
        if has_nan(data, entry.dtype):
            self.nan_names.add(entry.name)
        if self._audit is not None and entry.name in self._audit.watched:
            origin = origin_of(entry, self._live[entry.name])
            if origin is not None:
                self._audit.captured(entry.name, origin, data)
        return data

    def _copy(self, source: Source, nbytes: int) -> None:
        with contextlib.ExitStack() as stack:
            stream = self._streams.get(source.device)
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))
            source.copy_to(self._scratch, 0, 0, nbytes)
            if source.device.type == "cuda":
                torch.cuda.current_stream(source.device).synchronize()

    def _is_held(self, entry: FileEntry, data: memoryview) -> bool:
        """Whether another step holds the entry's bytes; takes note of where they will be found."""
        if entry.nbytes * MIN_PART < self._pool.buffer_nbytes:
            self.packed.append(Packed(None, self.nbytes, ""))
            return False
        digest = digest_of(data)
        file, start = self._places.get(digest, (None, self.nbytes))
        if file is not None and start % entry.dtype.itemsize:  # of another dtype
            file, start = None, self.nbytes
        self.packed.append(Packed(file, start, digest.hex()))
        return file is not None

    def _chunk(self, buffer: Buffer, generation: int, nbytes: int) -> Chunk:
        return Chunk(buffer, generation, nbytes, checksum(buffer.view(nbytes)))


def digest_of(data: memoryview) -> bytes:
    """What stands for these bytes."""
    return hashlib.sha256(data).digest()
