"""Codecs that write all elements, or a mark for each: dense, bitmap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planaria.errors import CorruptError
from planaria.rl_sync.bits import BitFormat
from planaria.rl_sync.codecs.base import Job, as_array, checked, taken
from planaria.rl_sync.diff.scan import Bits, Changes, Scanner, gather, scatter

_Data = bytes | bytearray | memoryview


class DenseCodec:
    """All elements of the block, changed or not."""

    name = "dense"

    def size(self, fmt: BitFormat, elements: int, changes: Changes) -> float:
        """See `Codec.size`."""
        return elements * fmt.width

    def encode(self, jobs: Sequence[Job]) -> tuple[bytes, list[bytes]]:
        """See `Codec.encode`."""
        blocks = []
        for job in jobs:
            live = job.base.copy()
            scatter(live, job.changes.pos, job.changes.new)
            blocks.append(live.tobytes())
        return b"", blocks

    def decode(
        self, data: _Data, fmt: BitFormat, base: Bits, count: int, model: _Data = b""
    ) -> Changes:
        """See `Codec.decode`."""
        live = as_array(data, f"<u{fmt.width}")
        if live.size != base.size:
            raise CorruptError(f"a dense block of {live.size} elements instead of {base.size}")
        return checked(Scanner().scan([live], base), base.size, count, self.name)


class BitmapCodec:
    """A bit for each element, and the new bits of those that changed."""

    name = "bitmap"

    def size(self, fmt: BitFormat, elements: int, changes: Changes) -> float:
        """See `Codec.size`."""
        return elements / 8 + changes.size * fmt.width

    def encode(self, jobs: Sequence[Job]) -> tuple[bytes, list[bytes]]:
        """See `Codec.encode`."""
        blocks = []
        for job in jobs:
            marks = np.zeros(job.base.size, np.uint8)
            marks[job.changes.pos] = 1
            packed = np.packbits(marks, bitorder="little")
            blocks.append(packed.tobytes() + job.changes.new.tobytes())
        return b"", blocks

    def decode(
        self, data: _Data, fmt: BitFormat, base: Bits, count: int, model: _Data = b""
    ) -> Changes:
        """See `Codec.decode`."""
        packed, rest = taken(memoryview(data), (base.size + 7) // 8, "bitmap")
        marks = np.unpackbits(as_array(packed, "u1"), bitorder="little")
        pos = np.flatnonzero(marks).astype(np.uint32)
        new = as_array(rest, f"<u{fmt.width}")
        if pos.size != new.size or (pos.size and pos[-1] >= base.size):
            raise CorruptError("a bitmap block does not have a value for each of its bits")
        old = np.empty(pos.size, base.dtype)
        gather(base, pos, old)
        return checked(Changes(pos, old, new), base.size, count, self.name)
