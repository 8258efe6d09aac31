"""Spreads a range of bytes over idle cores."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Literal

from planaria.errors import ConfigError

Threads = int | Literal["auto"]

#: Threads at most, and bytes of a row below which another one does not pay.
MOST = 8
LEAST_BYTES = 256 << 10
_ALIGNMENT = 4096


def checked_threads(threads: Threads) -> Threads:
    """An argument, after a look at it.

    Raises:
        ConfigError: It is neither "auto" nor between 1 and `MOST`.
    """
    if threads == "auto" or (type(threads) is int and 1 <= threads <= MOST):
        return threads
    raise ConfigError(f"threads must be 'auto' or 1 to {MOST}, not {threads!r}")


def spread(work: Callable[[int, int], None], start: int, stop: int, threads: Threads) -> None:
    """Calls ``work(start, stop)`` for parts of a range, on several threads where that pays.

    Args:
        work: Must give up the GIL to gain by it.
        start: First byte.
        stop: One past the last.
        threads: How many; "auto" takes the cores that have been idle lately.
    """
    parts = (stop - start) // LEAST_BYTES
    if parts > 1:
        parts = min(parts, idle_cores() if threads == "auto" else threads)
    if parts <= 1:
        work(start, stop)
        return
    step = -(-(stop - start) // parts // _ALIGNMENT) * _ALIGNMENT
    cuts = range(start + step, stop, step)
    waiting = [_pool(os.getpid()).submit(work, low, min(low + step, stop)) for low in cuts]
    try:
        work(start, start + step)
    finally:
        # Nobody may use the buffers once the caller has got them back.
        errors = [future.exception() for future in waiting]
    for error in errors:
        if error is not None:
            raise error


def idle_cores() -> int:
    """Cores of this process without work in the last minute, at least 1."""
    cores = len(os.sched_getaffinity(0))
    if cores == 1:
        return 1
    return max(1, min(MOST, cores - int(os.getloadavg()[0] + 0.5)))


@cache
def _pool(pid: int) -> ThreadPoolExecutor:
    """One for all codecs of a process; a child after a fork makes its own."""
    return ThreadPoolExecutor(MOST - 1, thread_name_prefix="planaria-erasure")
