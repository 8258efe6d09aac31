"""The gate between forwards and swaps: no forward ever sees two versions.

A boundary is where the gate is entered and left: around each forward (between tokens), or around a
whole request. Entering inside of an entered gate is free, so both may be used at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from planaria.core.deadline import Deadline


class VersionGate:
    """Many may serve at once, or one may swap. A swap that waits lets nobody new in."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._swapping = False
        self._waiting = 0
        self._mine = threading.local()

    @contextmanager
    def serving(self, deadline: Deadline) -> Iterator[None]:
        """Nothing is swapped inside.

        Raises:
            DeadlineError: A swap took too long.
        """
        self.enter(deadline)
        try:
            yield
        finally:
            self.leave()

    def enter(self, deadline: Deadline) -> None:
        """Begins to serve in this thread; see `serving`."""
        depth = getattr(self._mine, "depth", 0)
        if not depth:
            with self._changed:
                free = self._changed.wait_for(
                    lambda: not self._swapping and not self._waiting, timeout=deadline.timeout()
                )
                if not free:
                    raise deadline.error("a swap of weights to end")
                self._inside += 1
        self._mine.depth = depth + 1

    def leave(self) -> None:
        """Ends what `enter` began in this thread."""
        self._mine.depth -= 1
        if not self._mine.depth:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def swapping(self, deadline: Deadline) -> Iterator[None]:
        """Nothing is served inside.

        Raises:
            DeadlineError: A forward or request did not end in time; nothing was swapped.
        """
        own = 1 if getattr(self._mine, "depth", 0) else 0
        with self._changed:
            self._waiting += 1
            try:
                free = self._changed.wait_for(
                    lambda: not self._swapping and self._inside == own, timeout=deadline.timeout()
                )
                if not free:
                    raise deadline.error("forwards on the old weights to end")
                if own:
                    raise deadline.error(
                        "this thread's own forward to end: update outside of serving()"
                    )
                self._swapping = True
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._swapping = False
                self._changed.notify_all()

    def guard(self, module: nn.Module, seconds: float) -> Callable[[], None]:
        """Enters the gate around each forward of a module; returns what undoes that."""

        # The hook after a forward runs also where the one before it could not enter.
        mine = threading.local()

        def before(*_: Any) -> None:
            mine.entered = [*getattr(mine, "entered", ()), False]
            self.enter(Deadline(seconds))
            mine.entered[-1] = True

        def after(*_: Any) -> None:
            if getattr(mine, "entered", None) and mine.entered.pop():
                self.leave()

        handles = [
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after, always_call=True),
        ]

        def undo() -> None:
            for handle in handles:
                handle.remove()

        return undo
