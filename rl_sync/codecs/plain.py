"""Codecs that need nothing of the old values to find the positions: dense, bitmap, gaps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planaria.errors import CorruptError
from planaria.rl_sync.bits import BitFormat
from planaria.rl_sync.codecs.base import Job, as_array, checked, taken
from planaria.rl_sync.codecs.tokens import ulp_distance, ulp_move
from planaria.rl_sync.compiled import kernel
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


class GapRawCodec:
    """Distances between changes, and the new bits."""

    name = "gap_raw"

    def size(self, fmt: BitFormat, elements: int, changes: Changes) -> float:
        """See `Codec.size`."""
        return _gap_bytes(elements, changes.size)[1] + changes.size * fmt.width

    def encode(self, jobs: Sequence[Job]) -> tuple[bytes, list[bytes]]:
        """See `Codec.encode`."""
        return b"", [_write_gaps(job) + job.changes.new.tobytes() for job in jobs]

    def decode(
        self, data: _Data, fmt: BitFormat, base: Bits, count: int, model: _Data = b""
    ) -> Changes:
        """See `Codec.decode`."""
        pos, rest = _read_gaps(data, base.size, count)
        new = as_array(rest, f"<u{fmt.width}")
        if new.size != count:
            raise CorruptError(f"a gap block has {new.size} values for {count} changes")
        old = np.empty(count, base.dtype)
        gather(base, pos, old)
        return checked(Changes(pos, old, new), base.size, count, self.name)


class GapUlpCodec:
    """Distances between changes, and by how many ULP each moved, in half a byte where that fits."""

    name = "gap_ulp"

    def size(self, fmt: BitFormat, elements: int, changes: Changes) -> float:
        """See `Codec.size`."""
        sample = slice(0, 4096)
        far = float((_nibbles(fmt, changes.old[sample], changes.new[sample]) == 15).mean()) \
            if changes.size else 0.0  # fmt: skip
        gaps = _gap_bytes(elements, changes.size)[1]
        return gaps + changes.size * (0.5 + far * fmt.width)

    def encode(self, jobs: Sequence[Job]) -> tuple[bytes, list[bytes]]:
        """See `Codec.encode`."""
        blocks = []
        for job in jobs:
            nibbles = _nibbles(job.fmt, job.changes.old, job.changes.new)
            far = job.changes.new[nibbles == 15]
            if nibbles.size % 2:
                nibbles = np.append(nibbles, np.uint8(0))
            packed = nibbles[::2] | nibbles[1::2] << 4
            blocks.append(_write_gaps(job) + packed.tobytes() + far.tobytes())
        return b"", blocks

    def decode(
        self, data: _Data, fmt: BitFormat, base: Bits, count: int, model: _Data = b""
    ) -> Changes:
        """See `Codec.decode`."""
        pos, rest = _read_gaps(data, base.size, count)
        packed, rest = taken(rest, (count + 1) // 2, "ULP distances")
        far = as_array(rest, f"<u{fmt.width}")
        old, new = np.empty(count, base.dtype), np.empty(count, base.dtype)
        gather(base, pos, old)
        zigzag = np.empty(count, np.uint8)
        if _unpack_nibbles(as_array(packed, "u1"), zigzag) != far.size:
            raise CorruptError("a gap block does not have a value for each of its far moves")
        if not ulp_move(old, zigzag, 1 << (8 * fmt.width - 1), new):
            raise CorruptError("a gap block moves a number out of its range")
        if far.size:
            new[zigzag == 0] = far
        return checked(Changes(pos, old, new), base.size, count, self.name)


def _nibbles(fmt: BitFormat, old: Bits, new: Bits) -> np.ndarray:
    zigzag = np.empty(old.size, np.uint64)
    ulp_distance(old, new, 1 << (8 * fmt.width - 1), zigzag)
    return np.minimum(zigzag - 1, 15).astype(np.uint8)


@kernel
def _unpack_nibbles(packed, zigzag):
    """ULP distances in halves of bytes, 0 where it is a far move; returns how many are."""
    far = 0
    for i in range(zigzag.size):
        n = (packed[i >> 1] >> (4 * (i & 1))) & 15
        zigzag[i] = 0 if n == 15 else n + 1
        far += n == 15
    return far


def _gap_bytes(elements: int, count: int) -> tuple[int, float]:
    """The width of a gap that is likely the best, and about how many bytes all gaps take."""
    if not count:
        return 1, 5.0
    p = count / max(elements, 1)
    best = (4, 4.0 * count)
    for width in (1, 2):
        skip = (1 - p) ** ((1 << 8 * width) - 1)  # chance that a gap needs a further unit
        if skip < 1 and width * count / (1 - skip) < best[1]:
            best = (width, width * count / (1 - skip))
    return best[0], 5 + best[1]


def _write_gaps(job: Job) -> bytes:
    """Width of a unit, number of units, units; a unit of all ones skips without a change."""
    pos = job.changes.pos
    width, _ = _gap_bytes(job.base.size, pos.size)
    most = (1 << 8 * width) - 1
    units = np.empty(pos.size + job.base.size // most + 1, f"<u{width}")
    made = _gaps_to_units(pos, most, units)
    return bytes([width]) + made.to_bytes(4, "little") + units[:made].tobytes()


def _read_gaps(data: _Data, elements: int, count: int) -> tuple[np.ndarray, memoryview]:
    head, rest = taken(memoryview(data), 5, "header")
    width, units = head[0], int.from_bytes(head[1:], "little")
    if width not in (1, 2, 4) or not 0 <= count <= elements:
        raise CorruptError(f"a gap block has units of {width} bytes and {count} changes")
    coded, rest = taken(rest, units * width, "gaps")
    pos = np.empty(count, np.uint32)
    most = (1 << 8 * width) - 1
    if _units_to_positions(as_array(coded, f"<u{width}"), most, elements, pos) != count:
        raise CorruptError(f"a gap block does not have {count} changes within its elements")
    return pos, rest


@kernel
def _gaps_to_units(pos, most, units):
    n = 0
    at = 0
    for i in range(pos.size):
        gap = np.int64(pos[i]) - at
        while gap >= most:
            units[n] = most
            n += 1
            gap -= most
        units[n] = gap
        n += 1
        at = np.int64(pos[i]) + 1
    return n


@kernel
def _units_to_positions(units, most, elements, pos):
    n = 0
    at = 0
    for i in range(units.size):
        u = np.int64(units[i])
        if u == most:
            at += u
            continue
        at += u
        if at >= elements or n >= pos.size:
            return -1
        pos[n] = at
        n += 1
        at += 1
    return n
