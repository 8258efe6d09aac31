"""Spreads a range of bytes over idle cores."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from queue import SimpleQueue
from threading import Thread
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
    tasks = [_Task(work, low, min(low + step, stop)) for low in cuts]
    queue = _queue(os.getpid())
    for task in tasks:
        queue.put(task)
    try:
        work(start, start + step)
    finally:
        # Nobody may use the buffers once the caller has got them back.
        errors = [task.done.exception() for task in tasks]
    for error in errors:
        if error is not None:
            raise error


class _Task:
    """A part of a range, and whether it is done."""

    def __init__(self, work: Callable[[int, int], None], start: int, stop: int) -> None:
        self._work, self._range = work, (start, stop)
        self.done: Future[None] = Future()

    def run(self) -> None:
        try:
            self._work(*self._range)
        except BaseException as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)


def idle_cores() -> int:
    """Cores of this process without work in the last minute, at least 1."""
    cores = len(os.sched_getaffinity(0))
    if cores == 1:
        return 1
    return max(1, min(MOST, cores - int(os.getloadavg()[0] + 0.5)))


@cache
def _queue(pid: int) -> SimpleQueue[_Task]:
    """The threads of a process, which all codecs share; a child after a fork makes its own.

    They are idle whenever nobody waits for them, so they need not hold up the end of the process.
    """
    queue: SimpleQueue[_Task] = SimpleQueue()
    for i in range(MOST - 1):
        Thread(target=_serve, args=(queue,), name=f"planaria-erasure-{i}", daemon=True).start()
    return queue


def _serve(queue: SimpleQueue[_Task]) -> None:
    while True:
        queue.get().run()
