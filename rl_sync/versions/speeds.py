"""How fast codecs are, on either side: what is known beforehand, and what was measured since.

What a codec costs is counted in bytes of the block that it walks through and in changes that it
writes; what a machine makes of that is a ratio to the costs here. It is measured in CPU time of the
thread that does it, so that other work does not count.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from statistics import median
from typing import Final

# Seconds a byte of block and a change, to encode and to decode: of one core of a small machine,
# and each at the densities at which the codec is the best.
ENCODING: Final[Mapping[str, tuple[float, float]]] = {
    "dense": (0.4e-9, 0.0),
    "bitmap": (0.06e-9, 4e-9),
    "gap_raw": (0.0, 2e-9),
    "gap_ulp": (0.0, 3.5e-9),
    "exponent": (0.5e-9, 55e-9),
}
DECODING: Final[Mapping[str, tuple[float, float]]] = {
    "dense": (0.2e-9, 2e-9),
    "bitmap": (1.2e-9, 3e-9),
    "gap_raw": (0.0, 6e-9),
    "gap_ulp": (0.0, 9e-9),
    "exponent": (0.45e-9, 125e-9),
}
_CALL = 1e-6
#: So much expected time is measured at once; what is shorter is mostly the clock and the call.
_LEAST = 1e-4
_SMOOTHING = 0.3
_FADING = 0.05


def cost(each: tuple[float, float], nbytes: int, changes: int) -> float:
    """Seconds by one of the tables above."""
    return _CALL + each[0] * nbytes + each[1] * changes


class Speeds:
    """Ratios of measured times to those of a table, by codec. Safe for threads."""

    def __init__(self, table: Mapping[str, tuple[float, float]]) -> None:
        self._table = table
        self._lock = threading.Lock()
        self._ratios: dict[str, float] = {}
        self._pending: dict[str, tuple[float, float]] = {}
        self._begun: set[str] = set()

    def note(self, codec: str, nbytes: int, changes: int, seconds: float) -> None:
        """Notes what some blocks took.

        Args:
            codec: Their codec.
            nbytes: Bytes of the blocks, uncoded.
            changes: Changes in them.
            seconds: CPU time of one thread.
        """
        if codec not in self._table:
            return
        with self._lock:
            if codec not in self._begun:  # the first time, its kernels are loaded or compiled
                self._begun.add(codec)
                return
            expected, took = self._pending.get(codec, (0.0, 0.0))
            expected += cost(self._table[codec], nbytes, changes)
            took += seconds
            if expected >= _LEAST:
                ratio = min(max(took / expected, 0.1), 10.0)
                before = self._ratios.get(codec, ratio)
                self._ratios[codec] = before + _SMOOTHING * (ratio - before)
                expected = took = 0.0
            self._pending[codec] = expected, took

    def ratio(self, codec: str) -> float:
        """A codec's ratio; where it was not measured, what is usual of the others."""
        with self._lock:
            return self._ratios.get(codec) or self._usual()

    def known(self) -> dict[str, float]:
        """The ratios that were measured."""
        with self._lock:
            return dict(self._ratios)

    def fade(self) -> None:
        """Believes each ratio a little less: who is slow once is tried again some time."""
        with self._lock:
            usual = self._usual()
            self._ratios = {c: r + _FADING * (usual - r) for c, r in self._ratios.items()}

    def _usual(self) -> float:
        return median(self._ratios.values()) if self._ratios else 1.0
