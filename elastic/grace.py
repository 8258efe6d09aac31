"""What to do with the seconds before a preemption: whichever way out fits, by measured speeds."""

import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from planaria.errors import ConfigError

Way = Literal["hand_over", "parity", "storage"]
#: From the best: the others go on at once; from memory at a restart; from storage at a restart.
WAYS: tuple[Way, ...] = ("hand_over", "parity", "storage")

#: The slowest share of past transfers that a prediction rests on.
_SLOW_SHARE = 0.25
#: Transfers of less than this share of the largest tell of delays, not of a speed.
_LEAST_SHARE = 1 / 16


@dataclass(frozen=True)
class Choice:
    """What to do before leaving.

    Attributes:
        way: How the state is brought to safety, None to leave at once.
        expected_s: Seconds that it will take, None if that was never measured.
        lost_steps: Steps that are lost if this is all that happens; 0 with a way that works.
        says: For people: what is done and why, and what is lost.
    """

    way: Way | None
    expected_s: float | None
    lost_steps: int
    says: str


def choose(
    grace_s: float,
    sizes: Mapping[Way, int],
    bandwidths: Mapping[Way, float | None],
    *,
    unsaved_steps: int = 0,
    safety: float = 1.5,
    overhead_s: float = 0.2,
) -> Choice:
    """Chooses what fits into the grace: a pure function, so all members choose alike.

    The best way that is known to fit; if none is, the best one whose speed was never measured,
    since trying costs nothing; else none.

    Args:
        grace_s: Seconds that are left.
        sizes: Bytes that the busiest member has to move by each way; one that is not possible (no
            survivors to hand over to, no memory tier) is left out.
        bandwidths: Bytes per second of each way, None or left out where not measured, see `Meter`.
        unsaved_steps: Steps committed since the last durable checkpoint.
        safety: So many times the expected time must fit.
        overhead_s: What any way takes besides, such as agreeing and leaving.

    Raises:
        ConfigError: A number makes no sense.
    """
    rates = [rate for rate in bandwidths.values() if rate is not None]
    if not (safety >= 1 and overhead_s >= 0 and unsaved_steps >= 0 and not math.isnan(grace_s)):
        raise ConfigError("choose: safety must be >= 1, and overhead_s and unsaved_steps >= 0")
    if any(n < 0 for n in sizes.values()) or any(not rate > 0 for rate in rates):
        raise ConfigError(f"choose: sizes must be >= 0 and speeds > 0: {sizes}, {bandwidths}")
    left = max(0.0, grace_s)
    possible: list[Way] = [way for way in WAYS if way in sizes]
    expected: dict[Way, float | None] = {
        way: _seconds(sizes[way], bandwidths.get(way)) for way in possible
    }
    for way, seconds in expected.items():
        if seconds is not None and overhead_s + safety * seconds <= left:
            return Choice(way, seconds, 0, f"{_SAYS[way]}: about {seconds:.2f} s of {left:.1f} s")
    for way, seconds in expected.items():
        if seconds is None and overhead_s < left:
            says = f"{_SAYS[way]} in {left:.1f} s, though it was never timed"
            return Choice(way, None, 0, says)
    tried = ", ".join(
        f"{way} needs {overhead_s + safety * seconds:.2f} s"
        for way, seconds in expected.items()
        if seconds is not None
    )
    lost = f"{unsaved_steps} steps since the last checkpoint are lost, unless others hold them"
    says = f"leaving at once, {left:.1f} s are too short ({tried or 'there is no way'}): {lost}"
    return Choice(None, None, unsaved_steps, says)


_SAYS: dict[Way, str] = {
    "hand_over": "handing over to those who stay",
    "parity": "flushing to the memory tier",
    "storage": "flushing to storage",
}


def _seconds(nbytes: int, rate: float | None) -> float | None:
    if nbytes == 0:
        return 0.0
    return None if rate is None else nbytes / rate


class Meter:
    """Speeds of past transfers, by way; safe to use from several threads.

    Args:
        keep: How many transfers of each way are remembered.
    """

    def __init__(self, keep: int = 64) -> None:
        self._past: dict[Way, deque[tuple[int, float]]] = {way: deque(maxlen=keep) for way in WAYS}
        self._lock = threading.Lock()

    def add(self, way: Way, nbytes: int, seconds: float) -> None:
        """Notes a transfer that has ended.

        Args:
            way: What it was one of.
            nbytes: Its size; one of 0 bytes tells nothing.
            seconds: How long it took.
        """
        if nbytes > 0 and seconds > 0:
            with self._lock:
                self._past[way].append((nbytes, seconds))

    @contextmanager
    def time(self, way: Way, nbytes: int) -> Iterator[None]:
        """Times a block that makes a transfer; one that raises is not counted."""
        began = time.perf_counter()
        yield
        self.add(way, nbytes, time.perf_counter() - began)

    def bandwidths(self) -> dict[Way, float | None]:
        """Bytes per second that each way can be relied on for, None where nothing was measured."""
        with self._lock:
            past: dict[Way, list[tuple[int, float]]] = {w: list(p) for w, p in self._past.items()}
        return {way: _reliable(pairs) for way, pairs in past.items()}


def _reliable(pairs: list[tuple[int, float]]) -> float | None:
    """The speed that three of four of the larger transfers reached."""
    if not pairs:
        return None
    largest = max(nbytes for nbytes, _ in pairs)
    rates = sorted(n / seconds for n, seconds in pairs if n >= largest * _LEAST_SHARE)
    return rates[int(_SLOW_SHARE * (len(rates) - 1))]
