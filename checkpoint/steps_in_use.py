"""Which steps are being written and which are being removed: never the same one."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from planaria.core.deadline import Deadline


class StepsInUse:
    """Keeps saves and the removal of old steps apart, without making one wait for all of the other.

    On rank 0, where old steps are removed, a save is in use from the call until all ranks have
    ended it. Ranks meet before any of them writes, so what another rank may be writing is in use
    here. From its commit until its own clearing up is over a step is held, not written any more:
    the next save may refer to it.
    """

    def __init__(self) -> None:
        self._saved: Counter[int] = Counter()
        self._held: Counter[int] = Counter()
        self._removed: set[int] = set()  # or put back in place of a damaged copy
        self._changed = threading.Condition()

    @property
    def idle(self) -> bool:
        """Whether no save and no copy is under way."""
        return not self._saved and not self._held

    def begin(self, step: int) -> None:
        """A save of the step was called."""
        with self._changed:
            self._saved[step] += 1

    def end(self, step: int) -> None:
        """A save of the step has failed on all ranks."""
        with self._changed:
            self._end(step)

    def committed(self, step: int) -> None:
        """A save of the step is committed on all ranks; the step is held until `let_go`."""
        with self._changed:
            self._held[step] += 1
            self._end(step)

    def _end(self, step: int) -> None:
        self._saved[step] -= 1
        if not self._saved[step]:
            del self._saved[step]

    @contextmanager
    def kept(self, step: int, deadline: Deadline) -> Iterator[None]:
        """While the block lasts the step is not removed, if it is still there at the beginning.

        Raises:
            DeadlineError: It is just being removed, and that hangs.
        """
        with self._changed:
            self._held[step] += 1
        try:
            self.wait_for_removal(step, deadline)
            yield
        finally:
            self.let_go(step)

    def hold(self, step: int) -> bool:
        """Keeps a committed step from being removed until `let_go`.

        Returns:
            False, and it is not held, where it is just being removed or written anew.
        """
        with self._changed:
            if step in self._saved or step in self._removed:
                return False
            self._held[step] += 1
            return True

    def let_go(self, step: int) -> None:
        """Ends one `hold`."""
        with self._changed:
            self._held[step] -= 1
            if not self._held[step]:
                del self._held[step]

    def wait_for_removal(self, step: int, deadline: Deadline) -> None:
        """Returns once the step is not being removed; to be called before ranks meet to write it.

        Raises:
            DeadlineError: The removal hangs.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: step not in self._removed, deadline.timeout()):
                raise deadline.error(f"the removal of the old step {step}")

    @contextmanager
    def to_remove(self, step: int) -> Iterator[bool]:
        """Gives whether the step may be removed; while the block lasts, nobody begins to write it.

        To be asked after the step's folder was seen: then a save that has made it is known.
        """
        with self._alone(step, may_be_held=False) as free:
            yield free

    @contextmanager
    def to_put_back(self, step: int) -> Iterator[bool]:
        """Gives whether no save writes the step; while the block lasts, none begins to.

        The step may be held, by whoever asks, too.
        """
        with self._alone(step, may_be_held=True) as free:
            yield free

    @contextmanager
    def _alone(self, step: int, *, may_be_held: bool) -> Iterator[bool]:
        with self._changed:
            free = step not in self._saved and step not in self._removed
            free = free and (may_be_held or step not in self._held)
            if free:
                self._removed.add(step)
        try:
            yield free
        finally:
            if free:
                with self._changed:
                    self._removed.discard(step)
                    self._changed.notify_all()
