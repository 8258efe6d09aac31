"""A session's checkpoints: one checkpointer, attached to generation after generation."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from planaria.core.collective import Meeting
from planaria.core.deadline import Deadline
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
    """

    def __init__(self, checkpointer: "Checkpointer", state: Mapping[str, Any]) -> None:
        self._checkpointer, self._state = checkpointer, dict(state)
        self._saved: int | None = None
        self._restored: int | None = None
        self._last: SaveHandle | None = None

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
        self._saved = self._restored = None if report is None else report.step
        self._last = None
        return 0 if report is None else report.step

    def step(self, n: int, metrics: Mapping[str, float]) -> None:
        """Saves step `n` if that is due.

        Raises:
            CollectiveError: Another member is gone.
            SaveFailedError: An earlier save failed.
        """
        if n == self._saved:
            return
        if self._checkpointer.step(n, dict(metrics)) is not None:
            self._saved = n

    def has(self, n: int) -> bool:
        """Whether step `n` is known to be durable here: all that could be lost with a rank is not.

        Only of the last step, and of the one that was restored.
        """
        if self._last is not None:
            return self._last.step == n and self._last.committed
        return self._restored == n

    def last(
        self,
        n: int,
        metrics: Mapping[str, float],
        check: Callable[[], None],
        deadline: Deadline,
    ) -> None:
        """Saves step `n`, after which the run ends, and returns once it is durable.

        What fails for another reason than that a member is lost is raised where the checkpointer
        is closed.

        Args:
            n: Number of steps done.
            metrics: Values to keep.
            check: Raises where members are gone: the save is given up then.
            deadline: When to give up.

        Raises:
            CollectiveError: Another member is gone.
            DeadlineError: It was not durable in time.
        """
        self._last = self._checkpointer.save(n, dict(metrics))
        while True:
            try:
                self._last.wait_committed(_LOOK_UP_S)
            except SaveFailedError:
                check()
            except DeadlineError:
                check()
                deadline.check(f"the last save, of step {n},")
                continue
            return

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
