"""What a caller holds of a save that goes on in the background."""

import threading
from collections.abc import Callable
from typing import Protocol

from planaria.core.deadline import Deadline
from planaria.errors import ConfigError, PlanariaError, SaveFailedError


class Copy(Protocol):
    """The second copy of a committed save."""

    @property
    def there(self) -> bool:
        """Whether there is one."""
        ...

    def wait(self, deadline: Deadline) -> None:
        """Returns once there is one."""
        ...


class SaveHandle:
    """One save, on this rank.

    Attributes:
        step: Step that is saved.
        nbytes: Bytes that this rank writes; known once it is captured.
        referenced_nbytes: Bytes that it need not write, for earlier steps hold them (``dedup``).
        nan_names: Tensors that this rank wrote and that hold a NaN; known once it is captured.
    """

    def __init__(self, step: int, timeout_s: float) -> None:
        self.step = step
        self.nbytes = 0
        self.referenced_nbytes = 0
        self.nan_names: list[str] = []
        self._timeout_s = timeout_s
        self._captured = threading.Event()
        self._done = threading.Event()
        self._error: PlanariaError | None = None
        self._copy: Copy | None = None  # once committed
        self._memory: SaveHandle | None = None  # the same step in memory; may be itself
        self._reported = False  # raised by the call itself: not to be raised again

    @property
    def captured(self) -> bool:
        """Whether the state may change again."""
        return self._captured.is_set()

    @property
    def committed(self) -> bool:
        """Whether the step is durable; of a snapshot in memory alone, whether it is there."""
        return self._done.is_set() and self._error is None

    @property
    def error(self) -> PlanariaError | None:
        """Why the save failed, None while it has not."""
        return self._error

    def wait_captured(self, timeout_s: float | None = None) -> None:
        """Returns once the state may change again, whether or not the save has failed.

        Raises:
            DeadlineError: That took longer than `timeout_s` seconds (by default the
                checkpointer's own).
        """
        budget = Deadline(self._timeout_s if timeout_s is None else timeout_s)
        budget.wait(self._captured, f"the capture of step {self.step}")

    def wait_committed(self, timeout_s: float | None = None) -> None:
        """Returns once the step is durable; of a snapshot in memory alone, once it is there.

        Raises:
            SaveFailedError: It will not be; says on which rank and why.
            DeadlineError: That took longer than `timeout_s` seconds (by default the
                checkpointer's own).
        """
        budget = Deadline(self._timeout_s if timeout_s is None else timeout_s)
        budget.wait(self._done, f"the commit of step {self.step}")
        if self._error is not None:
            raise self._error

    @property
    def in_memory(self) -> bool:
        """Whether the nodes' memory holds the step, or has held it."""
        return self._memory is not None and self._memory.committed

    def wait_in_memory(self, timeout_s: float | None = None) -> None:
        """Returns once the memory of all nodes holds the step.

        Raises:
            ConfigError: There is no memory tier.
            SaveFailedError: It will not be; says on which rank and why.
            DeadlineError: That took longer than `timeout_s` seconds (by default the
                checkpointer's own).
        """
        if self._memory is None:
            raise ConfigError(
                f"step {self.step} has no snapshot in memory: there is no memory tier"
            )
        self._memory.wait_committed(timeout_s)

    @property
    def mirrored(self) -> bool:
        """Whether the mirror holds the step, too. Ranks other than 0 look there to tell."""
        return self.committed and self._copy is not None and self._copy.there

    def wait_mirrored(self, timeout_s: float | None = None) -> None:
        """Returns once the mirror holds the step, too.

        Raises:
            ConfigError: There is no mirror.
            SaveFailedError: The step was not committed.
            StorageError: It was not copied; says why. The step itself is durable. Ranks other than
                0 do not learn of this, and wait on.
            DeadlineError: That took longer than `timeout_s` seconds (by default the
                checkpointer's own).
        """
        budget = Deadline(self._timeout_s if timeout_s is None else timeout_s)
        self.wait_committed(budget.remaining())
        if self._copy is None:
            raise ConfigError("there is no mirror: give the checkpointer one, by mirror=")
        self._copy.wait(budget)

    def _finish(
        self, error: PlanariaError | None, first: Callable[[], object] = lambda: None
    ) -> None:
        """Ends the save, and calls `first` before who waits goes on; only the first call counts."""
        if self._done.is_set():
            return
        if error is not None and not isinstance(error, SaveFailedError):
            failed = SaveFailedError(f"step {self.step} was not committed: {error}")
            failed.__cause__ = error
            error = failed
        self._error = error
        try:
            first()
        finally:
            self._captured.set()
            self._done.set()
