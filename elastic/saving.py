"""A session's checkpoints: one checkpointer, attached to generation after generation."""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from planaria.core.collective import Meeting
from planaria.core.deadline import Deadline
from planaria.elastic.grace import Meter, Way
from planaria.elastic.membership.view import Membership, View
from planaria.errors import DeadlineError, SaveFailedError

if TYPE_CHECKING:
    from planaria.checkpoint import Checkpointer
    from planaria.checkpoint.handle import SaveHandle

#: So often is looked whether members are gone while the last save is waited for.
_LOOK_UP_S = 0.02


class Saving:
    """Saves and restores a session's state.

    Args:
        checkpointer: Made without its ranks (``process_group=LATER``), or for one process.
        state: What is saved, by name.
        meter: Where the speed of saves is noted.

    Attributes:
        durable: The newest step that is known here to be durable.
        nbytes: Bytes that this rank wrote of the last one; 0 before there was any.
    """

    def __init__(
        self, checkpointer: "Checkpointer", state: Mapping[str, Any], meter: Meter | None = None
    ) -> None:
        self._checkpointer, self._state = checkpointer, dict(state)
        self._meter = meter or Meter()
        self._restored: int | None = None
        self._last: SaveHandle | None = None
        self._snapshot: SaveHandle | None = None
        self.durable, self.nbytes = 0, 0

    def attach(self, membership: Membership, view: View, deadline: Deadline) -> None:
        """Goes on with the members of a generation; all of them call it.

        Raises:
            CollectiveError: Another member is gone.
            RootError: The folder cannot be used.
        """
        store = membership.store(view, "checkpoint")
        group = Meeting(store, view.rank, view.world_size, membership.disturbed)
        self._checkpointer.attach(group, state=self._state, timeout_s=deadline.remaining() + 0.1)

    def restore(self) -> int:
        """Restores the newest step; returns its number, 0 where there is none.

        Raises:
            CollectiveError: Another member is gone.
            MismatchError: Checkpoint and state differ.
            CorruptError: No step could be read whole.
        """
        report = self._checkpointer.restore()
        self._restored = None if report is None else report.step
        self._last = self._snapshot = None
        self.durable = 0 if report is None or report.tier != "durable" else report.step
        return 0 if report is None else report.step

    @property
    def in_memory(self) -> bool:
        """Whether the nodes' memory keeps snapshots, too."""
        return self._checkpointer.keeps_snapshots

    def step(self, n: int, metrics: Mapping[str, float]) -> None:
        """Saves step `n` if that is due.

        Raises:
            CollectiveError: Another member is gone.
            SaveFailedError: An earlier save failed.
        """
        if n == self._restored or self.begun(n):
            return
        began = time.perf_counter()
        self._took(self._checkpointer.step(n, dict(metrics)), began)

    def has(self, n: int) -> bool:
        """Whether step `n` is known to be durable here: all that could be lost with a rank is not.

        Only of the last step, and of the one that was restored.
        """
        if self._last is not None:
            return self._last.step == n and self._last.committed
        return self._restored == n

    def begun(self, n: int, *, memory: bool = False) -> bool:
        """Whether a save of step `n` is under way here or done, and has not failed."""
        handle = self._snapshot if memory else self._last
        return handle is not None and handle.step == n and handle.error is None

    def last(
        self,
        n: int,
        metrics: Mapping[str, float],
        check: Callable[[], None],
        deadline: Deadline,
        *,
        begun: bool,
        memory: bool = False,
    ) -> None:
        """Saves step `n`, after which the run ends, and returns once it is durable.

        What fails for another reason than that a member is lost is raised where the checkpointer
        is closed.

        Args:
            n: Number of steps done.
            metrics: Values to keep.
            check: Raises where members are gone: the save is given up then.
            deadline: When to give up.
            begun: Whether all members have begun to save it already, see :meth:`begun`.
            memory: Whether it is enough that the nodes' memory has it.

        Raises:
            CollectiveError: Another member is gone.
            DeadlineError: It was not durable in time.
        """
        if not begun:
            began = time.perf_counter()
            self._took(self._checkpointer.save(n, dict(metrics)), began)
        handle = self._snapshot if memory else self._last
        assert handle is not None
        while True:
            try:
                handle.wait_committed(_LOOK_UP_S)
            except SaveFailedError:
                check()
            except DeadlineError:
                check()
                deadline.check(f"the last save, of step {n},")
                continue
            return

    def _took(self, handle: "SaveHandle | None", began: float) -> None:
        """Notes, once it is there, how long a save took."""
        if handle is not None:
            self._last = handle
            self._watch("storage", handle, began)
        taken = self._checkpointer.last_snapshot
        if taken is not None and taken is not self._snapshot:
            self._snapshot = taken
            self._watch("parity", taken, began)

    def _watch(self, way: Way, handle: "SaveHandle", began: float) -> None:
        def watch() -> None:
            # One that fails, or is given up, tells nothing.
            with suppress(SaveFailedError, DeadlineError):
                handle.wait_committed()
                self._meter.add(way, handle.nbytes, time.perf_counter() - began)
                if way == "storage":
                    self.durable, self.nbytes = max(self.durable, handle.step), handle.nbytes

        threading.Thread(target=watch, name=f"planaria-{way}-speed", daemon=True).start()

    def before_update(self) -> None:
        """Waits until what is being saved is captured: the state is about to be written."""
        self._checkpointer.before_update()

    def detach(self) -> None:
        """Gives up what is not committed; ends waits for other ranks. From any thread."""
        self._checkpointer.detach()

    def close(self) -> None:
        """Ends this member's part, before the others go on without it.

        What is under way is given up, but for a commit that has begun; whoever commits from now on
        takes the lock over, and must not meet this member still writing.

        Raises:
            DeadlineError: The storage hangs.
        """
        self._checkpointer.detach()
        with suppress(SaveFailedError):  # what a member that goes gave up the others save
            self._checkpointer.close()
