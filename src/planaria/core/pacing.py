"""A token bucket: keeps what many threads send or write together below a rate."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable

from planaria.core.deadline import Deadline
from planaria.errors import ConfigError


class TokenBucket:
    """Hands out bytes at a rate, after a first burst; waiting threads are served in turn.

    In any time span of s seconds, takes that are not larger than the burst add up to at most
    ``burst + rate * s`` bytes. A larger take waits until the bucket has yielded all of it, so over
    time the rate holds for it too, but its bytes come at once: take in pieces to keep them even.
    """

    def __init__(
        self,
        rate_bytes_per_s: float,
        burst: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[threading.Condition, float], object] = threading.Condition.wait,
    ) -> None:
        """Makes a full bucket.

        Args:
            rate_bytes_per_s: Bytes a second, > 0; ``math.inf`` for no limit.
            burst: Bytes that can be taken at once after a quiet time, >= 1.
            clock: A monotonic clock in seconds; tests pass their own.
            pause: Waits on the condition for at most so many seconds; tests pass their own.

        Raises:
            ConfigError: Rate or burst are out of range.
        """
        self._rate = _checked_rate(rate_bytes_per_s)
        if not (isinstance(burst, int | float) and 1 <= burst < math.inf):
            raise ConfigError(f"the burst of a token bucket must be >= 1 byte, not {burst!r}")
        self._burst = burst
        self._tokens: float = burst
        self._clock = clock
        self._pause = pause
        self._filled = clock()
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()

    @property
    def rate(self) -> float:
        """Bytes a second. Setting it also changes the waits under way."""
        return self._rate

    @rate.setter
    def rate(self, rate_bytes_per_s: float) -> None:
        rate = _checked_rate(rate_bytes_per_s)
        with self._changed:
            self._fill()
            self._rate = rate
            self._changed.notify_all()

    def take(self, n: int, deadline: Deadline) -> None:
        """Waits until ``n`` bytes may go, and takes them.

        Args:
            n: Bytes, >= 0; more than the burst is allowed.
            deadline: When to give up.

        Raises:
            ConfigError: ``n`` is negative.
            DeadlineError: They were not to be had in time; none were taken.
        """
        if n < 0:
            raise ConfigError(f"cannot take {n} bytes from a token bucket")
        what = f"{n} bytes at {self._rate:g} bytes/s"
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            drained = 0.0
            try:
                while self._queue[0] is not ticket:
                    deadline.check(what)
                    self._changed.wait(deadline.timeout())
                while True:
                    self._fill()
                    # What lies within the burst is taken in one piece: drained bit by bit, it would
                    # let the bucket fill up again meanwhile, and go out together with a new burst.
                    part = max(0.0, min(self._tokens, n - drained - self._burst))
                    self._tokens -= part
                    drained += part
                    if self._tokens >= n - drained:
                        self._tokens -= n - drained
                        return
                    deadline.check(what)
                    missing = min(n - drained, self._burst) - self._tokens
                    # Rounding can leave a wait too short to move the clock; a microsecond does.
                    seconds = max(missing / self._rate, 1e-6)
                    self._pause(self._changed, min(seconds, deadline.timeout()))
            except BaseException:
                self._tokens = min(self._burst, self._tokens + drained)
                raise
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def _fill(self) -> None:
        now = self._clock()
        passed, self._filled = now - self._filled, now
        if math.isinf(self._rate):
            self._tokens = math.inf
        elif passed > 0 or self._tokens > self._burst:
            self._tokens = min(self._burst, self._tokens + passed * self._rate)


def _checked_rate(rate: float) -> float:
    if not (isinstance(rate, int | float) and rate > 0):  # NaN fails this, too
        raise ConfigError(f"the rate of a token bucket must be > 0 bytes/s, not {rate!r}")
    return rate
