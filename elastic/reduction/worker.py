"""The thread that adds up buckets between ranks while the backward pass goes on.

It starts to send a bucket, adds up the one before, and waits for the results of the one before
that: so the links and the adding are busy at the same time. All ranks give it their buckets in the
same order, else they would wait for each other. After the first error it does no more; whoever
waits for it is told.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any

from planaria.core.deadline import Deadline
from planaria.elastic.reduction.transport import Complete, Wait
from planaria.errors import CollectiveError

Start = Callable[[], Complete]
"""Starts to send."""

_CLOSE = object()


class ReductionThread:
    """Runs jobs in order, each step of one beside the next step of the one before.

    Args:
        name: Of the thread.
        ordered: Whether a job is done before the next one begins: for links that know no tags, on
            which all ranks have to start everything in the same order.
    """

    def __init__(self, name: str = "planaria-reduction", *, ordered: bool = False) -> None:
        self._leave = 0 if ordered else 1
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._open: list[tuple[Complete, Deadline]] = []
        self._last: list[tuple[Wait, Deadline]] = []
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
            pending = self._open or self._last
            job = None if pending and self._jobs.empty() else self._jobs.get()
            if job is _CLOSE:
                return
            if isinstance(job, threading.Event):
                self._advance(0)
                job.set()
            elif job is not None:
                self._try(self._begin, *job)
                self._advance(self._leave)
            else:
                self._advance(0)  # nothing to start: no reason to leave one open

    def _begin(self, start: Start, deadline: Deadline) -> None:
        self._open.append((start(), deadline))

    def _advance(self, leave: int) -> None:
        """Takes jobs on, until as many are left at each step."""
        while len(self._open) > leave:
            self._try(self._complete, *self._open.pop(0))
            while len(self._last) > 1:
                self._try(*self._last.pop(0))
        while len(self._last) > leave:
            self._try(*self._last.pop(0))

    def _complete(self, complete: Complete, deadline: Deadline) -> None:
        wait = complete(deadline)
        if wait is not None:
            self._last.append((wait, deadline))

    def _try(self, call: Callable[..., object], *args: Any) -> None:
        if self._error is None:
            try:
                call(*args)
            except BaseException as error:
                self._error = error
