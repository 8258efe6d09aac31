"""Which codec for a block: the one that has the weights in the rollout soonest.

For each codec the time is bytes / link + encoding + decoding, with bytes as the codec estimates
them, and all speeds as measured so far (each encode and decode moves them). What a codec costs is
counted in elements that it walks through and in changes that it writes.
"""

from __future__ import annotations

from collections.abc import Mapping

from planaria.errors import ConfigError
from planaria.rl_sync.bits import BitFormat
from planaria.rl_sync.codecs.base import Codec
from planaria.rl_sync.diff.scan import Changes

# Seconds a byte of block, and a change: first guesses, of one core of a small machine.
_FIRST = {
    "dense": (0.8e-9, 0.0),
    "bitmap": (1.2e-9, 2e-9),
    "gap_raw": (0.0, 8e-9),
    "gap_ulp": (0.0, 16e-9),
    "exponent": (2.2e-9, 120e-9),
}
_SMOOTHING = 0.3
#: 1 Gb/s.
UNKNOWN_LINK = 125e6


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
        #: Bytes a second to the receivers; a common speed until it was measured.
        self.link = UNKNOWN_LINK

    def pick(self, fmt: BitFormat, elements: int, changes: Changes) -> str:
        """The codec for a block."""
        if self._fixed is not None:
            return self._fixed
        costs = {name: self.seconds(name, fmt, elements, changes) for name in self._codecs}
        return min(costs, key=costs.__getitem__)

    def seconds(self, name: str, fmt: BitFormat, elements: int, changes: Changes) -> float:
        """What a codec would take for a block, from encoding to decoding."""
        nbytes = self._codecs[name].size(fmt, elements, changes)
        return nbytes / self.link + self._scale[name] * self._expected(
            name, elements * fmt.width, changes.size
        )

    def measured(self, name: str, nbytes: int, changes: int, seconds: float) -> None:
        """Notes what encoding and decoding of some blocks took.

        Args:
            name: The codec.
            nbytes: Bytes of the blocks, uncoded.
            changes: Changes in them.
            seconds: Encoding and decoding, of one thread.
        """
        expected = self._expected(name, nbytes, changes)
        if expected > 1e-5:  # what is shorter is mostly the clock and the call
            ratio = min(max(seconds / expected, 0.1), 10.0)
            self._scale[name] += _SMOOTHING * (ratio - self._scale[name])

    def _expected(self, name: str, nbytes: int, changes: int) -> float:
        a, b = _FIRST[name]
        return 1e-6 + a * nbytes + b * changes
