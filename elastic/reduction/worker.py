"""The thread that adds up buckets between ranks while the backward pass goes on.

It starts to send a bucket, then completes the one before: so the links and the adding are busy at
the same time. After the first error it does no more; whoever waits for it is told.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any

from planaria.core.deadline import Deadline
from planaria.elastic.reduction.transport import Wait
from planaria.errors import CollectiveError

Start = Callable[[], "Wait"]
"""Starts to send; what it returns waits, adds up, and may start to send the result on."""

_CLOSE = object()


class ReductionThread:
    """Runs jobs in order, two at a time: the next is started before the last one is completed.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str = "planaria-reduction") -> None:
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._open: list[tuple[Wait, Deadline]] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def error(self) -> BaseException | None:
        """What went wrong first, or None."""
        return self._error

    def submit(self, start: Start, deadline: Deadline) -> None:
        """Puts a job behind the others; returns at once."""
        self._jobs.put((start, deadline))

    def wait(self, deadline: Deadline) -> None:
        """Waits until all jobs are done.

        Raises:
            CollectiveError: A rank is gone, or the thread was closed.
            DeadlineError: They are not done in time.
            BaseException: Whatever else a job raised.
        """
        done = threading.Event()
        self._jobs.put(done)
        if not self._thread.is_alive():
            raise CollectiveError("the reduction was closed")
        deadline.wait(done, "the reduction of the gradients")
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Ends the thread as soon as it is free; does not wait for one that hangs in a call."""
        self._jobs.put(_CLOSE)

    def _work(self) -> None:
        while True:
            idle = self._open and self._jobs.empty()
            job = None if idle else self._jobs.get()
            if job is _CLOSE:
                return
            if isinstance(job, threading.Event):
                self._complete(0)
                job.set()
            elif job is not None:
                self._begin(*job)
                self._complete(1)
            else:
                self._complete(0)  # nothing to start: no reason to leave one open

    def _begin(self, start: Start, deadline: Deadline) -> None:
        if self._error is None:
            try:
                self._open.append((start(), deadline))
            except BaseException as error:
                self._error = error

    def _complete(self, leave: int) -> None:
        while len(self._open) > leave:
            wait, deadline = self._open.pop(0)
            if self._error is None:
                try:
                    wait(deadline)
                except BaseException as error:
                    self._error = error
