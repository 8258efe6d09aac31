"""The backend that needs nothing but numba, which is there anyway."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planaria.checkpoint.erasure import kernels
from planaria.checkpoint.erasure.backend import HostRows, Row, check
from planaria.checkpoint.erasure.field import Matrix
from planaria.checkpoint.erasure.threads import Threads, spread


class Compiled(HostRows):
    """Kernels that are compiled when it is made, or loaded from numba's cache on disk."""

    name = "numba"

    def __init__(self, threads: Threads = "auto") -> None:
        self._threads: Threads = threads
        check(self)

    def run(
        self, coefficients: Matrix, inputs: Sequence[Row], outputs: Sequence[Row],
        start: int, stop: int, *, add: bool = False,
    ) -> None:  # fmt: skip
        """See `Backend.run`."""
        lists = _lists(coefficients.tobytes(), coefficients.shape[0])
        sources = np.array([row[0] for row in inputs], np.int64)
        targets = np.array([row[0] for row in outputs], np.int64)

        def work(low: int, high: int) -> None:
            kernels.combine(sources, targets, lists.idx, lists.cuts, low, high, add)

        spread(work, start, stop, self._threads)


class _Lists(NamedTuple):
    """See `kernels.combine`."""

    idx: npt.NDArray[np.int64]
    cuts: npt.NDArray[np.int64]


@lru_cache(maxsize=256)
def _lists(coefficients: bytes, rows: int) -> _Lists:
    matrix = np.frombuffer(coefficients, np.uint8).reshape(rows, -1)
    bits = np.unpackbits(matrix[:, None, :], axis=1)  # uint8[rows, 8, columns], bit 7 first
    counts = bits.sum(axis=2, dtype=np.int64).ravel()
    cuts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    return _Lists(np.nonzero(bits)[2].astype(np.int64), cuts)
