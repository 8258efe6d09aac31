"""Buffers for what comes from peers, used again while they are warm in the processor's caches."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

# What is kept of them while nothing is received.
_KEPT_NBYTES = 64 << 20


class Scratch:
    """Buffers that go back once what came into them was used. Thread-safe.

    A buffer that a call which failed may still write to is not given back, and so is lost.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unused: list[NDArray[np.uint8]] = []

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """A buffer of that many bytes or more, whatever it holds."""
        with self._lock:
            fits = [i for i, each in enumerate(self._unused) if len(each) >= nbytes]
            if fits:
                return self._unused.pop(fits[-1])  # the one that was used last
        return np.empty(nbytes, np.uint8)

    def give(self, buffer: NDArray[np.uint8] | None) -> None:
        """Takes a buffer back."""
        if buffer is not None:
            with self._lock:
                if sum(map(len, self._unused)) < _KEPT_NBYTES:
                    self._unused.append(buffer)
