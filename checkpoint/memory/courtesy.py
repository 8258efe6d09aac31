"""Training's collectives come first: what a node sends for parity waits while one is under way.

A page of shared memory holds a word for each rank of a node: 0, or when the collective began that
it is in. Ranks write theirs without a call to anybody; the exchange looks before each of its
batches. A rank that is stuck, or was killed, in a collective holds it up for a moment only.
"""

from __future__ import annotations

import threading
import time

import numpy as np
from numpy.typing import NDArray

from planaria.core.deadline import Deadline
from planaria.core.pacing import TokenBucket

#: Bytes of the page.
PAGE_NBYTES = 4096
_SLOTS = PAGE_NBYTES // 8
#: For so long, at most, each batch waits; and a collective that lasts longer does not count.
PATIENCE_S = 0.25
_LOOK_EVERY_S = 0.0005


class Words:
    """The words of a node's ranks; written by them, read by the snapshot process.

    Args:
        page: uint8[4096], all zeros at first.
    """

    def __init__(self, page: NDArray[np.uint8]) -> None:
        self._words = page.view(np.int64)

    def begin(self, slot: int) -> None:
        """A rank is in a collective from now on."""
        self._words[slot % _SLOTS] = time.monotonic_ns()  # the same clock in all processes

    def end(self, slot: int) -> None:
        """It is not any more; harmless if it was not."""
        self._words[slot % _SLOTS] = 0

    def busy(self, patience_s: float) -> bool:
        """Whether a rank is in a collective that began no longer ago than that."""
        last = int(self._words.max())
        # One from the future is of another clock, as in a container, or no time at all.
        return last != 0 and 0 <= time.monotonic_ns() - last < patience_s * 1e9


class Marks:
    """One rank's word: several collectives may be under way at a time. Thread-safe."""

    def __init__(self, words: Words, slot: int) -> None:
        self._words, self._slot = words, slot
        self._under_way = 0
        self._lock = threading.Lock()

    def begin(self) -> None:
        """One more."""
        with self._lock:
            self._under_way += 1
            self._words.begin(self._slot)

    def end(self) -> None:
        """One less."""
        with self._lock:
            self._under_way -= 1
            if not self._under_way:
                self._words.end(self._slot)


class Pace:
    """When a node may send its next bytes for parity. Thread-safe.

    Args:
        bucket: Keeps them below a rate; None for no limit.
        words: Of the node's ranks; None to look at none.
        patience_s: See `PATIENCE_S`.

    Attributes:
        held_s: Seconds that batches have waited for collectives, all together.
    """

    def __init__(
        self,
        bucket: TokenBucket | None = None,
        words: Words | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._bucket, self._words, self._patience_s = bucket, words, patience_s
        self._lock = threading.Lock()
        self.held_s = 0.0

    def take(self, n: int, deadline: Deadline, *, yields: bool = True) -> None:
        """Waits until ``n`` bytes may go; see `TokenBucket.take`.

        Args:
            n: How many.
            deadline: When to give up.
            yields: Whether to give way before.
        """
        if yields:
            self.give_way(deadline)
        if self._bucket is not None:
            self._bucket.take(n, deadline)

    def give_way(self, deadline: Deadline) -> None:
        """Waits while a collective is under way, for a moment at most.

        Ranks may be in one all the time: once half of a deadline's budget is used, there is no more
        waiting, so that what is done within it has the other half for itself.
        """
        words = self._words
        if words is None or not yields(deadline) or not words.busy(self._patience_s):
            return
        began = time.monotonic()
        within = Deadline(min(self._patience_s, max(0.001, deadline.remaining() / 8)))
        while words.busy(self._patience_s) and not within.expired:
            time.sleep(_LOOK_EVERY_S)
        with self._lock:
            self.held_s += time.monotonic() - began


def yields(deadline: Deadline) -> bool:
    """Whether what is to be done by then still gives way."""
    return 2 * deadline.remaining() >= deadline.budget
