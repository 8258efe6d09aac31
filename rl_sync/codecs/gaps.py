"""Codecs that write the distances between changes: with the new bits, or with moves in ULP.

A distance is one unit, or several where it is long: a unit of all ones skips without a change. Each
of decoding's passes does one thing: the one that reads old values only reads, so that many are on
their way from memory at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from planaria.errors import CorruptError
from planaria.rl_sync.bits import BitFormat
from planaria.rl_sync.codecs.base import Job, as_array, taken
from planaria.rl_sync.compiled import kernel
from planaria.rl_sync.diff.scan import Bits, Changes, Positions, gather

_Data = bytes | bytearray | memoryview
#: A move that does not fit half a byte; its new bits stand in a list of their own.
_FAR = 15
_SAMPLE = 1024

_OUTSIDE, _RANGE, _FAR_MOVES = -1, -2, -3
_REASONS = {
    _OUTSIDE: "has other changes than its manifest says, or some outside of the block",
    _RANGE: "moves a number out of its range, or not at all",
    _FAR_MOVES: "does not have a value for each of its far moves",
}


class GapRawCodec:
    """Distances between changes, and the new bits."""

    name = "gap_raw"

    def size(self, fmt: BitFormat, elements: int, changes: Changes) -> float:
        """See `Codec.size`."""
        return _gap_bytes(elements, changes.size)[1] + changes.size * fmt.width

    def encode(self, jobs: Sequence[Job]) -> tuple[bytes, list[bytes]]:
        """See `Codec.encode`."""
        blocks = []
        for job in jobs:
            width, most, units = _room(job)
            made = _pack_gaps(job.changes.pos, most, units)
            blocks.append(_header(width, made) + units[:made].tobytes() + job.changes.new.tobytes())
        return b"", blocks

    def decode(
        self, data: _Data, fmt: BitFormat, base: Bits, count: int, model: _Data = b""
    ) -> Changes:
        """See `Codec.decode`."""
        pos, old, rest = _found(data, base, count)
        new = as_array(rest, f"<u{fmt.width}")
        if new.size != count:
            raise CorruptError(f"a gap block has {new.size} values for {count} changes")
        if _same(old, new):
            raise CorruptError("a gap block lists an element as changed that is not")
        return Changes(pos, old, new)


class GapUlpCodec:
    """Distances between changes, and by how many ULP each moved, in half a byte where that fits."""

    name = "gap_ulp"

    def size(self, fmt: BitFormat, elements: int, changes: Changes) -> float:
        """See `Codec.size`."""
        count, seen = changes.size, min(changes.size, _SAMPLE)
        if not count:
            return 5.0
        halves = np.empty(seen, np.uint8)
        _halves(changes.old[:seen], changes.new[:seen], _shift(fmt), halves)
        far = np.count_nonzero(halves == _FAR) / seen
        return _gap_bytes(elements, count)[1] + count * (0.5 + far * fmt.width)

    def encode(self, jobs: Sequence[Job]) -> tuple[bytes, list[bytes]]:
        """See `Codec.encode`."""
        blocks = []
        for job in jobs:
            pos, old, new = job.changes
            width, most, units = _room(job)
            halves, packed = np.empty(pos.size, np.uint8), np.empty((pos.size + 1) // 2, np.uint8)
            far = np.empty_like(new)
            made = _pack_gaps(pos, most, units)
            _halves(old, new, _shift(job.fmt), halves)
            moved = _pack_moves(new, halves, packed, far)
            parts = units[:made].tobytes(), packed.tobytes(), far[:moved].tobytes()
            blocks.append(_header(width, made) + b"".join(parts))
        return b"", blocks

    def decode(
        self, data: _Data, fmt: BitFormat, base: Bits, count: int, model: _Data = b""
    ) -> Changes:
        """See `Codec.decode`."""
        pos, old, rest = _found(data, base, count)
        packed, rest = taken(rest, (count + 1) // 2, "ULP distances")
        far, new = as_array(rest, f"<u{fmt.width}"), np.empty_like(old)
        _check(_move(old, as_array(packed, "u1"), far, 1 << _shift(fmt), new), count)
        return Changes(pos, old, new)


def _shift(fmt: BitFormat) -> int:
    """The place of the sign's bit."""
    return 8 * fmt.width - 1


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


def _room(job: Job) -> tuple[int, int, npt.NDArray[np.unsignedinteger]]:
    """Width of a unit, the unit that skips, and room for as many as there may be."""
    count, elements = job.changes.size, job.base.size
    width, _ = _gap_bytes(elements, count)
    most = (1 << 8 * width) - 1
    return width, most, np.empty(count + elements // most + 1, f"<u{width}")


def _header(width: int, units: int) -> bytes:
    return bytes([width]) + units.to_bytes(4, "little")


def _found(data: _Data, base: Bits, count: int) -> tuple[Positions, Bits, memoryview]:
    """Positions and old bits of a block, and the bytes after its gaps."""
    head, rest = taken(memoryview(data), 5, "header")
    width, units = head[0], int.from_bytes(head[1:], "little")
    if width not in (1, 2, 4) or not 0 <= count <= base.size:
        raise CorruptError(f"a gap block has units of {width} bytes and {count} changes")
    coded, rest = taken(rest, units * width, "gaps")
    pos, old = np.empty(count, np.uint32), np.empty(count, base.dtype)
    most = (1 << 8 * width) - 1
    _check(_positions(as_array(coded, f"<u{width}"), most, base.size, pos), count)
    gather(base, pos, old)
    return pos, old, rest


def _check(made: int, count: int) -> None:
    if made != count:
        raise CorruptError(f"a gap block {_REASONS.get(made, _REASONS[_OUTSIDE])}")


@kernel
def _pack_gaps(pos, most, units):
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
def _halves(old, new, shift, halves):
    """Moves as halves of bytes, see `tokens.ulp_distance`; without a branch, so in vectors."""
    sign = 1 << shift
    for i in range(old.size):
        a = np.int64(old[i])
        b = np.int64(new[i])
        d = (b ^ (sign + (sign - 1) * (b >> shift))) - (a ^ (sign + (sign - 1) * (a >> shift)))
        halves[i] = min(((d << 1) ^ (d >> 63)) - 1, _FAR)


@kernel
def _pack_moves(new, halves, packed, far):
    """Puts halves together; returns how many moves were too far, and written out."""
    n = 0
    for i in range(new.size):
        far[n] = new[i]
        n += halves[i] == _FAR
    whole = new.size // 2
    for k in range(whole):
        packed[k] = halves[2 * k] | halves[2 * k + 1] << 4
    if whole < packed.size:
        packed[whole] = halves[2 * whole]
    return n


@kernel
def _positions(units, most, elements, pos):
    """Returns how many there are, or what is wrong."""
    n = 0
    at = 0
    for i in range(units.size):
        u = np.int64(units[i])
        at += u
        if u == most:
            continue
        if at >= elements or n >= pos.size:
            return _OUTSIDE
        pos[n] = at
        n += 1
        at += 1
    return n


@kernel
def _same(old, new):
    """Whether an element is the same in both."""
    same = 0
    for i in range(old.size):
        same |= old[i] == new[i]
    return same != 0


@kernel
def _move(old, packed, far, sign, new):
    """The new bits of moves in halves of bytes; returns how many there are, or what is wrong.

    Without branches but for the far ones: whether a move is up or down is anybody's guess.
    """
    mask = 2 * sign - 1
    wrong = False
    taken = 0
    for i in range(old.size):
        half = np.int64(packed[i >> 1] >> (4 * (i & 1))) & 15
        bits = np.int64(old[i])
        if half == _FAR:
            if taken >= far.size:
                return _FAR_MOVES
            new[i] = far[taken]
            wrong |= far[taken] == old[i]
            taken += 1
        else:
            z = half + 1
            at = bits ^ (mask if bits & sign else sign)
            to = at + ((z >> 1) ^ -(z & 1))
            wrong |= (to & mask) != to
            new[i] = to ^ (sign if to & sign else mask)
    if wrong:
        return _RANGE
    return old.size if taken == far.size else _FAR_MOVES
