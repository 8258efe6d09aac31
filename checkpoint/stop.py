"""Asking a run to stop: a signal sets a flag, ranks agree on it at a step boundary."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any


class StopSignals:
    """Turns SIGTERM and SIGINT into a request while it is installed.

    Nothing else happens in the handler. A second signal of the same kind has its usual effect, so
    that a run that does not look at the request can still be ended by hand.
    """

    def __init__(self) -> None:
        self.requested = False
        self._pid, self._closed = os.getpid(), False
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid and number == signal.SIGTERM:
            # A forked child, which its parent wants to end. (A Ctrl-C is for the parent: a data
            # loader's workers must go on until it has taken its last step.)
            self._restore(number)
            signal.raise_signal(number)
            return
        self.requested = True
        other = getattr(self._previous.get(number), "__self__", None)
        self._restore(number)
        if isinstance(other, StopSignals):  # another checkpointer of this process
            other._handle(number, frame)

    def _restore(self, number: int) -> None:
        if signal.getsignal(number) != self._handle:
            return  # another one was installed since, which will skip this one if it is closed
        previous = self._previous.get(number)
        while isinstance(own := getattr(previous, "__self__", None), StopSignals) and own._closed:
            previous = own._previous.get(number)
        with contextlib.suppress(ValueError):  # not in the main thread any more
            # None stands for a handler that was not installed from Python.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)

    def close(self) -> None:
        """Puts the previous handlers back."""
        self._closed = True
        for number in self._previous:
            self._restore(number)
