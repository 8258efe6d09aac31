"""Saving when a signal says so."""

import contextlib
import signal
import threading
from types import FrameType
from typing import Any

from planaria.checkpoint.policies.saving import Progress, VotedPolicy
from planaria.errors import ConfigError

#: They ask for a last save and a stop already, or cannot be caught.
_TAKEN = {
    signal.SIGTERM: "asks for a last save and a stop already",
    signal.SIGINT: "asks for a last save and a stop already",
    signal.SIGKILL: "cannot be caught",
    signal.SIGSTOP: "cannot be caught",
}


class OnSignal(VotedPolicy):
    """Saves at the next step boundary after any rank has got a signal, and trains on.

    Whoever had a handler for the signal before is called, too. The checkpointer must be made in
    the main thread, where alone Python lets handlers be set.

    Args:
        number: The signal, as a number or by its name (``"USR1"``).

    Raises:
        ConfigError: There is no such signal, or it has another meaning here.
    """

    def __init__(self, number: int | str = signal.SIGUSR1) -> None:
        self.signal = _signal(number)
        self._asked = False
        self._open = False
        self._previous: Any = None

    def wants(self, progress: Progress) -> bool:
        """See `VotedPolicy.wants`."""
        asked, self._asked = self._asked, False
        return asked

    def open(self) -> None:
        """See `VotedPolicy.open`."""
        if self._open:
            raise ConfigError(f"{self!r} is in use by another checkpointer; give each its own")
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError(f"{self!r} needs a checkpointer that is made in the main thread")
        self._previous = signal.signal(self.signal, self._handle)
        self._open = True

    def close(self) -> None:
        """See `VotedPolicy.close`."""
        # Where another one was installed since, this one stays behind it and only passes on.
        if self._open and signal.getsignal(self.signal) == self._handle:
            with contextlib.suppress(ValueError):  # not in the main thread any more
                # None stands for a handler that was not installed from Python.
                previous = signal.SIG_DFL if self._previous is None else self._previous
                signal.signal(self.signal, previous)
        self._open = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._open:
            self._asked = True
        if callable(self._previous):
            self._previous(number, frame)

    def __repr__(self) -> str:
        return f"OnSignal({self.signal.name!r})"


def _signal(number: int | str) -> signal.Signals:
    try:
        if isinstance(number, str):
            name = number.upper()
            found = signal.Signals[name if name.startswith("SIG") else f"SIG{name}"]
        else:
            found = signal.Signals(number)
    except (KeyError, ValueError):
        raise ConfigError(
            f"OnSignal({number!r}): there is no such signal; USR1 and USR2 are free for use"
        ) from None
    if found in _TAKEN:
        raise ConfigError(f"OnSignal({number!r}): {found.name} {_TAKEN[found]}; use USR1 or USR2")
    return found
