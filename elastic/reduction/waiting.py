"""Waits for gloo that any thread can end.

gloo wakes those that wait in a group whose connections break, but not all: a message that was under
way, half sent or half received, is waited for to the end of its timeout. So nobody waits for gloo
itself: a thread does, which is left to itself when the group is given up.
"""

import contextlib
import math
import queue
import threading
import time
import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from planaria.core.deadline import Deadline

_SLACK_S = 1.0
_LOOK_UP_S = 0.001


class GivenUp(RuntimeError):
    """What was waited for was given up."""


class Waits:
    """The waits of one group."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: set[_Job] = set()
        self._idle: list[queue.SimpleQueue[_Job | None]] = []
        self._busy = 0
        self._closed = False

    def wait(self, works: Sequence[Any], seconds: float) -> None:
        """Waits for operations, as torch's `Work`.

        Raises:
            GivenUp: They were given up meanwhile.
            RuntimeError: One failed, or took too long; or there are too many threads.
        """
        job = _Job(works, time.monotonic() + seconds)
        with self._lock:
            if self._closed:
                raise GivenUp("it was closed")
            helper = self._idle.pop() if self._idle else self._hire()
            self._jobs.add(job)
            self._busy += 1
        helper.put(job)
        job.told.acquire(timeout=seconds + _SLACK_S)
        with self._lock:
            self._jobs.discard(job)
        if job.error is not None:
            raise job.error
        if not job.done:
            raise GivenUp("it was closed" if self._closed else "it took too long")

    def close(self) -> None:
        """Ends all waits. It may be called again, by any thread."""
        with self._lock:
            jobs, self._jobs = self._jobs, set()
            idle, self._idle = self._idle, []
            if not self._closed:
                self._closed = True
                with _closing:
                    _closed.add(self)
        for job in jobs:
            job.tell()
        for helper in idle:
            helper.put(None)

    @property
    def settled(self) -> bool:
        """Whether gloo is through with all that was waited for."""
        with self._lock:
            return not self._busy

    def _hire(self) -> "queue.SimpleQueue[_Job | None]":
        jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, args=(jobs,), name="planaria-wait", daemon=True).start()
        return jobs

    def _work(self, jobs: "queue.SimpleQueue[_Job | None]") -> None:
        while (job := jobs.get()) is not None:
            job.run()
            del job
            with self._lock:
                self._busy -= 1
                if self._closed:
                    return
                self._idle.append(jobs)


def settle(limit_s: float) -> None:
    """Waits until gloo is through with all groups that were given up, but not for long.

    What it has not noticed yet to be broken it may still read into. What it has forgotten about it
    does not write to any more.
    """
    with _closing:
        given_up = list(_closed)
        _closed.clear()
    until = Deadline(limit_s)
    while not until.expired and not all(waits.settled for waits in given_up):
        time.sleep(_LOOK_UP_S)


_closing = threading.Lock()
_closed: "weakref.WeakSet[Waits]" = weakref.WeakSet()


class _Job:
    """Some operations, and who waits for them."""

    def __init__(self, works: Sequence[Any], until: float) -> None:
        self._works, self._until = works, until
        self.told = threading.Lock()
        self.told.acquire()
        self.done = False
        self.error: Exception | None = None

    def run(self) -> None:
        failed = False
        for work in self._works:
            try:
                # Whole milliseconds are what gloo counts in: rounded down, it would be over before
                # the deadline, and look like a broken connection. 0 would mean gloo's own default.
                left_ms = math.ceil((self._until - time.monotonic()) * 1000)
                work.wait(timedelta(milliseconds=max(left_ms, 1)))
            except Exception as error:  # of whatever kind: the thread must live on
                if not failed:
                    failed, self.error = True, error.with_traceback(None)
                    self.tell()
        self._works = ()  # whoever keeps the error does not keep the group
        self.done = not failed
        self.tell()

    def tell(self) -> None:
        with contextlib.suppress(RuntimeError):  # it was told already, maybe just now
            self.told.release()
