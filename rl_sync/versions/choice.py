"""Which codec for a block: the one that has the whole version in the rollout soonest.

Blocks are encoded, sent and decoded side by side, so a version is there when the busiest of the
three is done, or the cores where receivers share them with the publisher. For each block it is
worked out when that will be with each codec, if what is left is like the blocks so far and goes in
the codecs of the least time in all. So codecs are fast while the link keeps up, and while it does
not the smallest one is used until others than the link would be the busiest: early, so that its
work has an end before the version does.

The first groups delay the link by all the time that they take, and the last ones the end; both are
counted so. Bytes are as the codec estimates them, the link and the speed of decoding are as
receivers measured them, and the speed of encoding as it was here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from statistics import median
from typing import NamedTuple

from planaria.errors import ConfigError
from planaria.rl_sync.bits import BitFormat
from planaria.rl_sync.codecs.base import Codec
from planaria.rl_sync.diff.scan import Changes
from planaria.rl_sync.versions.speeds import DECODING, ENCODING, Speeds, cost

#: Seconds a byte of block is scanned for, whatever the codec.
_SCANNING = 0.25e-9
#: Seconds a byte of payload is hashed for, on either side, and a change is digested and written.
_HASHING, _CHANGE = 1.3e-9, 15e-9
#: The share of a block's own time that counts, whoever is busiest: a codec that saves nothing is
#: not worth its work, and a core has other work, too.
_ALONE = 0.1
#: Receivers are taken to be so much slower than they say: a decoder that is done too early costs
#: less than one that all wait for.
_UNSURE = 1.3
#: Work that shares cores does not fill them without a gap, and there is work that nobody counts.
_PACKING = 2.0
#: 1 Gb/s.
UNKNOWN_LINK = 125e6


class Times(NamedTuple):
    """Seconds that something takes of the encoder, the link, the decoder, and of shared cores."""

    encoding: float = 0.0
    sending: float = 0.0
    decoding: float = 0.0
    cores: float = 0.0


class Learnt(NamedTuple):
    """What the receivers of a publisher say of themselves.

    Attributes:
        link: Bytes a second to them; 0 where none has measured it.
        decoding: By codec, how their times compare with `speeds.DECODING`.
        here: How many of them share the cores of the publisher's host.
    """

    link: float = 0.0
    decoding: Mapping[str, float] = {}
    here: int = 0


class CodecChoice:
    """Chooses codecs; learns their speed and that of the link. Safe for threads."""

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
        self._lock = threading.Lock()
        self.encoding = Speeds(ENCODING)
        self._decoding: dict[str, float] = {}
        self._here = 0
        self._cores = len(os.sched_getaffinity(0))
        #: Bytes a second to the receivers; a common speed until it was measured.
        self.link = UNKNOWN_LINK
        self.begin()

    def learn(self, learnt: Learnt) -> None:
        """Takes what receivers say."""
        with self._lock:
            self.link = learnt.link or self.link
            self._decoding = {c: min(max(r, 0.1), 10.0) for c, r in learnt.decoding.items()}
            self._here = learnt.here

    def begin(self, threads: int = 1, nbytes: int = 0, parts: int = 1) -> None:
        """Begins a version.

        Args:
            threads: So many threads encode it.
            nbytes: Bytes of all blocks that are looked at, here.
            parts: So many ranks do this for blocks of their own, over the same link.
        """
        self.encoding.fade()
        encoding = {name: self.encoding.ratio(name) for name in self._codecs}
        with self._lock:
            others = median(self._decoding.values()) if self._decoding else None
            self._ratios = {
                name: (ratio, self._decoding.get(name) or others or ratio)
                for name, ratio in encoding.items()
            }
            self._threads, self._parts = threads, parts
            self._left, self._seen, self._groups = nbytes, 0, 0
            self._so_far = Times()  # who is busy until when
            self._queued = 0.0  # what waits for the first groups to be sent
            self._usual = Times()  # what the blocks so far take in the codecs of the least time

    def look(self, nbytes: int) -> None:
        """A group of blocks is next: so many bytes, changed or not."""
        with self._lock:
            self._left = max(self._left - nbytes, 0)
            self._seen += nbytes
            self._groups += 1
            cores = _PACKING / self._cores if self._here else 0.0
            scan = _SCANNING * nbytes
            each = Times(scan / self._threads, cores=scan * cores)
            self._so_far = _sum(self._so_far, each)
            self._usual = _sum(self._usual, each)

    def pick(self, fmt: BitFormat, elements: int, changes: Changes) -> str:
        """The codec for a block."""
        if self._fixed is not None:
            return self._fixed
        found = self.times(fmt, elements, changes)
        with self._lock:
            alone = {name: _ALONE * sum(each) for name, each in found.items()}
            if not self._seen:  # nobody says how much there is of it
                return min(found, key=lambda name: max(found[name]) + alone[name])
            least = min(found.values(), key=sum)
            self._usual = _sum(self._usual, least)
            share = self._left / self._seen
            rest = Times(*[share * t for t in self._usual])
            ends: dict[str, float] = {}
            for name, each in found.items():
                then = self._after(each)
                ends[name] = _end(then, rest) + alone[name]
                if not self._left:
                    ends[name] += each.decoding
            best = min(ends, key=ends.__getitem__)
            self._so_far = self._after(found[best])
            self._queued += found[best].sending
        return best

    def times(self, fmt: BitFormat, elements: int, changes: Changes) -> dict[str, Times]:
        """What codecs would take for a block; those that make more of it than it is not."""
        nbytes, count, found = elements * fmt.width, changes.size, {}
        for name, codec in self._codecs.items():
            size = float(codec.size(fmt, elements, changes))
            if size > nbytes and name != "dense":
                continue
            there, back = self._ratios[name]
            either = size * _HASHING + count * _CHANGE
            encoding = there * cost(ENCODING[name], nbytes, count) + either
            decoding = back * cost(DECODING[name], nbytes, count) + either
            work = encoding + self._here * decoding if self._here else 0.0
            found[name] = Times(
                encoding / self._threads, size / self.link * self._parts,
                _UNSURE * decoding * self._parts,
                _PACKING * work / self._cores,
            )  # fmt: skip
        return found

    def _after(self, each: Times) -> Times:
        """Who is busy until when, once a block has gone through."""
        encoded = self._so_far.encoding + each.encoding
        if self._groups <= self._threads:
            sent = encoded + self._queued + each.sending
        else:
            sent = max(self._so_far.sending, encoded) + each.sending
        decoded = max(self._so_far.decoding, sent) + each.decoding
        return Times(encoded, sent, decoded, self._so_far.cores + each.cores)


def _end(so_far: Times, rest: Times) -> float:
    """When all is done if the rest takes so long."""
    encoded = so_far.encoding + rest.encoding
    sent = max(so_far.sending + rest.sending, encoded)
    return max(so_far.decoding + rest.decoding, sent, so_far.cores + rest.cores)


def _sum(a: Times, b: Times) -> Times:
    return Times(a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3])
