"""Which elements of a block changed: a comparison of bits with the baseline.

The scan reads both arrays once, 64 elements at a time: a vectorised comparison makes a word with a
bit for each element that differs, and the bits that are set are walked through.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from planaria.rl_sync.compiled import kernel
from planaria.rl_sync.vectors import differing, lowest_bit

Bits: TypeAlias = "npt.NDArray[np.unsignedinteger]"
Positions: TypeAlias = "npt.NDArray[np.uint32]"


class Changes(NamedTuple):
    """The changed elements of a block.

    Attributes:
        pos: Their positions in the block, ascending; uint32 of shape (n,).
        old: Their bits before, unsigned of the block's width, of shape (n,).
        new: Their bits after, likewise.
    """

    pos: Positions
    old: Bits
    new: Bits

    @property
    def size(self) -> int:
        """How many there are."""
        return self.pos.size


def no_changes(width: int) -> Changes:
    """Changes of a block of which nothing changed."""
    none = np.empty(0, dtype=f"u{width}")
    return Changes(np.empty(0, np.uint32), none, none)


@kernel
def _scan(live, base, offset, pos, count):
    """Appends the positions of the changes in one piece of a block; stops where ``pos`` is full.

    Returns how many there are now, and how many elements were looked at.
    """
    n = live.size
    room = pos.size - 64
    whole = n - n % 64
    for start in range(0, whole, 64):
        found = differing(live, base, start)  # pyright: ignore[reportCallIssue]
        if found != 0:
            if count > room:
                return count, start
            while found != 0:
                pos[count] = offset + start + np.int64(lowest_bit(found))
                count += 1
                found &= found - np.uint64(1)
    if whole < n:
        if count > room:
            return count, whole
        for i in range(whole, n):
            pos[count] = offset + i
            count += live[i] != base[i]
    return count, n


class Scanner:
    """Scans blocks into a reused array; one thread at a time."""

    def __init__(self) -> None:
        self._pos = np.empty(1 << 14, np.uint32)

    def scan(self, pieces: list[Bits], base: Bits) -> Changes:
        """Finds what changed in a block.

        Args:
            pieces: The live bits of the block, in one or more flat arrays of its width.
            base: The baseline's bits, flat, as long as the pieces together.

        Returns:
            The changes, in arrays of their own.
        """
        news: list[Bits] = []
        count, offset = 0, 0
        for piece in pieces:
            before, done = count, 0
            while done < piece.size:
                part = base[offset + done : offset + piece.size]
                count, seen = _scan(piece[done:], part, offset + done, self._pos, count)
                done += seen
                if done < piece.size:
                    grown = np.empty(max(4 * self._pos.size, base.size // 8), np.uint32)
                    grown[:count] = self._pos[:count]
                    self._pos = grown
            new = np.empty(count - before, base.dtype)
            _gather_from(piece, self._pos[before:count], offset, new)
            news.append(new)
            offset += piece.size
        pos = self._pos[:count].copy()
        new = news[0] if len(news) == 1 else np.concatenate(news or [base[:0]])
        old = np.empty(count, base.dtype)
        gather(base, pos, old)
        return Changes(pos, old, new)


@kernel
def _gather_from(source, pos, first, values):
    for i in range(pos.size):
        values[i] = source[pos[i] - first]


@kernel
def scatter(target: np.ndarray, pos: np.ndarray, values: np.ndarray) -> None:
    """Writes ``values`` to their positions of a flat array."""
    for i in range(pos.size):
        target[pos[i]] = values[i]


@kernel
def gather(source: np.ndarray, pos: np.ndarray, values: np.ndarray) -> None:
    """Reads the elements at ``pos`` of a flat array into ``values``."""
    for i in range(pos.size):
        values[i] = source[pos[i]]
