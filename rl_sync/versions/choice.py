"""Which codec for a block: the one that has the weights in the rollout soonest.

Blocks are encoded, sent and decoded side by side, so an update takes as long as the busiest of the
three. For each block the codec is taken with which the busiest has the least to do so far: fast
codecs while the link keeps up, and the smallest one as often as encoder and decoder have time for
while it does not. Bytes are as the codec estimates them, the link is as receivers measured it, and
the speed of encoding moves with each encoding; that of decoding, on another machine perhaps, is
taken to move with it. What a codec costs is counted in bytes of the block that it walks through and
in changes that it writes.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import NamedTuple

from planaria.errors import ConfigError
from planaria.rl_sync.bits import BitFormat
from planaria.rl_sync.codecs.base import Codec
from planaria.rl_sync.diff.scan import Changes

# Seconds a byte of block and a change, to encode and to decode: of one core of a small machine,
# and each at the densities at which the codec is the best.
_ENCODING = {
    "dense": (0.15e-9, 0.0),
    "bitmap": (0.05e-9, 4e-9),
    "gap_raw": (0.0, 2e-9),
    "gap_ulp": (0.0, 3e-9),
    "exponent": (0.5e-9, 50e-9),
}
_DECODING = {
    "dense": (0.4e-9, 2e-9),
    "bitmap": (0.6e-9, 3e-9),
    "gap_raw": (0.0, 3.5e-9),
    "gap_ulp": (0.0, 5.5e-9),
    "exponent": (0.4e-9, 120e-9),
}
#: Seconds a byte of block is scanned for, whatever the codec.
_SCANNING = 0.2e-9
#: Seconds a byte of payload is hashed for, on either side.
_HASHING = 1.3e-9
# The share of a block's time that nothing else runs beside: the first group is not sent, and the
# last not decoded, beside others; and a core has other work, too.
_ALONE = 0.1
_SMOOTHING = 0.3
#: 1 Gb/s.
UNKNOWN_LINK = 125e6


class _Seconds(NamedTuple):
    """Time of a block's encoder, of the link, and of its decoder."""

    encoding: float
    sending: float
    decoding: float


class CodecChoice:
    """Chooses codecs; learns their speed and that of the link."""

    def __init__(self, codecs: Mapping[str, Codec], codec: str = "auto") -> None:
        """Sets up a choice.

        Args:
            codecs: All codecs.
            codec: ``auto``, or the name of one that is used for every block it can be used for.

        Raises:
            ConfigError: There is no codec of this name.
        """
        if codec != "auto" and codec not in codecs:
            raise ConfigError(f"codec {codec!r} is none of auto, {', '.join(codecs)}")
        self._codecs = codecs
        self._fixed = None if codec == "auto" else codec
        self._scale = dict.fromkeys(codecs, 1.0)
        self._lock = threading.Lock()
        self.begin()
        #: Bytes a second to the receivers; a common speed until it was measured.
        self.link = UNKNOWN_LINK

    def begin(self, threads: int = 1) -> None:
        """Begins a version, that so many threads encode."""
        self._threads = threads
        self._busy = _Seconds(0.0, 0.0, 0.0)

    def pick(self, fmt: BitFormat, elements: int, changes: Changes) -> str:
        """The codec for a block."""
        if self._fixed is not None:
            return self._fixed
        found = {name: self.seconds(name, fmt, elements, changes) for name in self._codecs}
        with self._lock:
            then = {
                name: _Seconds(*(a + b for a, b in zip(self._busy, each, strict=True)))
                for name, each in found.items()
            }
            best = min(found, key=lambda name: max(then[name]) + _ALONE * sum(found[name]))
            self._busy = then[best]
        return best

    def seconds(self, name: str, fmt: BitFormat, elements: int, changes: Changes) -> _Seconds:
        """What a codec would take for a block."""
        size = self._codecs[name].size(fmt, elements, changes)
        nbytes, scale = elements * fmt.width, self._scale[name]
        encoding = scale * _cost(_ENCODING[name], nbytes, changes.size)
        return _Seconds(
            (_SCANNING * nbytes + encoding + size * _HASHING) / self._threads,
            size / self.link,
            scale * _cost(_DECODING[name], nbytes, changes.size) + size * _HASHING,
        )

    def measured(self, name: str, nbytes: int, changes: int, seconds: float) -> None:
        """Notes what encoding some blocks took.

        Args:
            name: The codec.
            nbytes: Bytes of the blocks, uncoded.
            changes: Changes in them.
            seconds: Of one thread.
        """
        expected = _cost(_ENCODING[name], nbytes, changes)
        if expected > 1e-5:  # what is shorter is mostly the clock and the call
            ratio = min(max(seconds / expected, 0.1), 10.0)
            self._scale[name] += _SMOOTHING * (ratio - self._scale[name])


def _cost(each: tuple[float, float], nbytes: int, changes: int) -> float:
    return 1e-6 + each[0] * nbytes + each[1] * changes
