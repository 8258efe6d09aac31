"""Noticing state that changes while it is captured.

The gate keeps optimizers out. Code that writes behind its back (``.data``, numpy views, collectives
into parameters, an optimizer of one's own) is caught by looking at the source twice, at the call
and before the gate opens: torch's version counter and the data pointer of everything, which miss
such writes, and a checksum of a random sample, which does not. What was captured of the sample is
compared as well, for a write that is undone in time (weights swapped for their average and back)
leaves the source as it was. With ``audit=True`` the sample is everything.

A sample of k windows misses a write that touches a share p of the state's windows with probability
(1 - p)^k: with the default of 64, a write of 1 % of the state is seen in about half of the saves it
falls into, one of 10 % in 99.9 % of them, one of all of it always.
"""

import bisect
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from planaria.checkpoint.capture.device_audit import DeviceWindows, Place
from planaria.checkpoint.capture.kernels import copy_pieces
from planaria.checkpoint.capture.sources import Source, Watched
from planaria.checkpoint.format.checksum import checksum, extend
from planaria.errors import TornCaptureError

#: Windows of a sample, and bytes of each.
SAMPLE_WINDOWS = 64
WINDOW_NBYTES = 4096
_AUDIT_NBYTES = 1 << 22
#: Where each window of a sample is copied to at the call.
_ROOMS = np.arange(SAMPLE_WINDOWS, dtype=np.int64) * WINDOW_NBYTES


@dataclass(slots=True)
class _Window:
    """Bytes [start, stop) of a source; their checksum at the call, and as captured up to a byte."""

    name: str
    source: Source
    start: int
    stop: int
    seen: int
    captured: int = 0
    reached: int = -1


Places = Sequence[tuple[str, int, int]]
"""Names, first bytes and ends of windows."""
Sample = tuple[Places, np.ndarray, np.ndarray, np.ndarray]
"""Places, addresses int64[n] and sizes int64[n], and room for them, uint8[n * WINDOW_NBYTES]."""


class Addressed:
    """Sources whose sample can be drawn ahead of the call, and then taken in one go.

    No protocol: to look whether something is one takes longer than to take the sample.
    """

    @property
    def sample(self) -> "Sample | None":
        """Where the next sample is, once that was drawn."""
        raise NotImplementedError

    @sample.setter
    def sample(self, sample: "Sample | None") -> None:
        raise NotImplementedError

    def addresses(self, places: Places) -> np.ndarray | None:
        """Where they are in host memory, int64[n]; None where not all are."""
        raise NotImplementedError


class Audit:
    """Remembers what the sources look like now, to be compared later.

    Args:
        sources: All that is captured lazily.
        everything: Whether to look at every byte instead of a sample. On a device that takes as
            much memory again as the state has.
        rng: Where the sample's places come from.
    """

    def __init__(self, sources: Watched, *, everything: bool, rng: random.Random) -> None:
        self._sources, self._signs = sources, sources.signs()
        self._everything, self._rng = everything, rng
        self._windows: list[_Window] = []
        self._of_name: dict[str, list[_Window]] = {}
        self._torn: list[str] = []
        self._on_device: list[DeviceWindows] = []
        # Of what is copied here the checksums are worked out in the background.
        self._taken: tuple[Places, np.ndarray] | None = None
        if not everything and isinstance(sources, Addressed):
            drawn, sources.sample = sources.sample or self._draw(sources), None
            if drawn is not None:
                places, addresses, sizes, copy = drawn
                copy_pieces(copy.ctypes.data, _ROOMS[: len(places)], addresses, sizes)
                self._taken = places, copy
                return
        self._look(sorted(set(_all(sources) if everything else _sample(sources, rng))))

    def prepare_next(self) -> None:
        """In the background: draws where the next save of the same sources is looked at."""
        if not self._everything and isinstance(self._sources, Addressed):
            self._sources.sample = self._draw(self._sources)

    def _draw(self, sources: Addressed) -> Sample | None:
        places = sorted(set(_sample(self._sources, self._rng)))
        addresses = sources.addresses(places)
        if addresses is None or not places:
            return None
        sizes = np.array([stop - start for _, start, stop in places])
        # Touched, so that the call need not wait for memory.
        return places, addresses, sizes, np.full(len(places) * WINDOW_NBYTES, 0, dtype=np.uint8)

    def _settle(self) -> None:
        """Works out the checksums of what was copied at the call."""
        if self._taken is not None:
            (places, copy), self._taken = self._taken, None
            for (name, start, stop), room in zip(places, _ROOMS, strict=False):
                seen = checksum(copy[room : room + stop - start])
                self._watch(_Window(name, self._sources.source(name), start, stop, seen))

    def _look(self, places: Places) -> None:
        on_device: dict[torch.device, list[Place]] = {}
        for name, start, stop in places:
            source = self._sources.source(name)
            if source.device.type == "cpu":
                seen = source.checksum(start, stop)
                self._watch(_Window(name, source, start, stop, seen))
            else:
                place = (name, source, start, stop)
                on_device.setdefault(source.device, []).append(place)
        self._on_device = [DeviceWindows(d, found) for d, found in on_device.items()]

    def _watch(self, window: _Window) -> None:
        self._windows.append(window)
        self._of_name.setdefault(window.name, []).append(window)

    @property
    def watched(self) -> Collection[str]:
        """Names of the tensors whose captured bytes `captured` wants to see."""
        self._settle()
        return self._of_name

    def captured(self, name: str, start: int, data: memoryview) -> None:
        """Takes note of a tensor's bytes from `start` on as they were captured, front to back."""
        windows, stop = self._of_name.get(name, []), start + len(data)
        for w in windows[bisect.bisect_right(windows, start, key=lambda w: w.stop) :]:
            if w.start >= stop:
                break
            if w.start >= start:
                w.captured, w.reached = 0, w.start
            elif w.reached != start:  # another rank captures what is in between
                continue
            w.captured = extend(w.captured, data[w.reached - start : w.stop - start])
            w.reached = min(stop, w.stop)
            if w.reached == w.stop and w.captured != w.seen:
                self._torn.append(name)

    def check(self) -> None:
        """Compares.

        Raises:
            TornCaptureError: Something changed; names the first tensors that did.
        """
        self._settle()
        changed: list[str] = []
        now = self._sources.signs()
        if now != self._signs:
            found = zip(self._sources.names, self._signs, now, strict=True)
            changed = [name for name, before, sign in found if before != sign]
        changed += self._sources.moved()
        changed += self._torn
        changed += [
            w.name
            for w in self._windows
            if w.source.in_place and w.source.checksum(w.start, w.stop) != w.seen
        ]
        changed += [name for windows in self._on_device for name in windows.changed()]
        if changed:
            names = list(dict.fromkeys(changed))
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise TornCaptureError(
                f"{', '.join(names[:3])}{more} changed while being captured, outside of an "
                "optimizer's step; call ckpt.before_update() before code that writes parameters or "
                "optimizer state"
            )


def _all(sources: Watched) -> list[tuple[str, int, int]]:
    ends = sources.ends
    return [
        (name, start, min(start + _AUDIT_NBYTES, nbytes))
        for name, end, before in zip(sources.names, ends, [0, *ends], strict=False)
        for nbytes in [end - before]
        for start in range(0, nbytes, _AUDIT_NBYTES)
    ]


def _sample(sources: Watched, rng: random.Random) -> list[tuple[str, int, int]]:
    names, ends, places = sources.names, sources.ends, []
    total = ends[-1] if ends else 0
    for _ in range(SAMPLE_WINDOWS if total else 0):
        byte = rng.randrange(total)
        i = bisect.bisect_right(ends, byte)
        first = ends[i - 1] if i else 0
        start = (byte - first) // WINDOW_NBYTES * WINDOW_NBYTES
        places.append((names[i], start, min(start + WINDOW_NBYTES, ends[i] - first)))
    return places
