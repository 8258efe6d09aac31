"""One time budget for an operation; every timeout inside it is derived from it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Protocol

from planaria.errors import ConfigError, DeadlineError


class Waitable(Protocol):
    """What :meth:`Deadline.wait` waits for: ``threading.Event`` and whatever waits like it."""

    def wait(self, timeout: float) -> bool:
        """Waits at most ``timeout`` seconds and says whether the thing happened."""
        ...


class Deadline:
    """A point in time by which an operation must have ended.

    Pass the object down instead of a number of seconds: what is called later in the operation
    then gets what is left, and the whole never takes longer than its budget.
    """

    __slots__ = ("_clock", "_end", "budget")

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts the budget now.

        Args:
            seconds: The budget in seconds, finite and >= 0; 0 has expired at once.
            clock: A monotonic clock in seconds; tests pass their own.

        Raises:
            ConfigError: ``seconds`` is negative, infinite or not a number.
        """
        if not isinstance(seconds, int | float) or not math.isfinite(seconds) or seconds < 0:
            raise ConfigError(
                f"a deadline needs a finite number of seconds >= 0, not {seconds!r}; "
                "to wait for long, name a long time"
            )
        self.budget = float(seconds)
        self._clock = clock
        self._end = clock() + self.budget

    def remaining(self) -> float:
        """Returns the seconds that are left, never below 0."""
        return max(0.0, self._end - self._clock())

    @property
    def expired(self) -> bool:
        """Whether nothing is left."""
        return self._clock() >= self._end

    def check(self, what: str) -> None:
        """Goes on if time is left.

        Args:
            what: What is being waited for; it completes "gave up waiting for ...".

        Raises:
            DeadlineError: Nothing is left.
        """
        if self.expired:
            raise self.error(what)

    def error(self, what: str) -> DeadlineError:
        """Returns (does not raise) the error for a wait for ``what`` that ended in vain."""
        return DeadlineError(f"gave up waiting for {what}: the budget of {self.budget:g} s is used")

    def sub(self, seconds: float) -> Deadline:
        """Returns a deadline ``seconds`` from now, or this one's end where that comes first."""
        part = Deadline(seconds, clock=self._clock)
        if part._end > self._end:
            part._end = self._end
            part.budget = self.budget
        return part

    def wait(self, thing: Waitable, what: str) -> None:
        """Waits for an event within the budget.

        Args:
            thing: A ``threading.Event``, or anything whose ``wait(timeout)`` returns whether it
                happened. For a ``threading.Condition`` use its ``wait_for`` with
                ``timeout=deadline.timeout()``.
            what: What is being waited for, for the error.

        Raises:
            DeadlineError: It did not happen in time.
        """
        if not thing.wait(self.timeout()):
            raise self.error(what)

    def timeout(self) -> float:
        """Returns :meth:`remaining`, cut to the longest timeout that locks and sockets accept."""
        return min(self.remaining(), threading.TIMEOUT_MAX)

    def __repr__(self) -> str:
        return f"Deadline({self.budget:g} s, {self.remaining():.3f} s left)"
