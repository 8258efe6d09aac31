"""A session's checkpoints: one checkpointer, attached to generation after generation."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from planaria.core.collective import Meeting
from planaria.core.deadline import Deadline
from planaria.elastic.membership.view import Membership, View

if TYPE_CHECKING:
    from planaria.checkpoint import Checkpointer


class Saving:
    """Saves and restores a session's state.

    Args:
        checkpointer: Made without its ranks (``process_group=LATER``), or for one process.
        state: What is saved, by name.
    """

    def __init__(self, checkpointer: "Checkpointer", state: Mapping[str, Any]) -> None:
        self._checkpointer, self._state = checkpointer, dict(state)
        self._saved: int | None = None

    def attach(self, membership: Membership, view: View, deadline: Deadline) -> None:
        """Goes on with the members of a generation; all of them call it.

        Raises:
            CollectiveError: Another member is gone.
            RootError: The folder cannot be used.
        """
        group = Meeting(membership.store(view, "checkpoint"), view.rank, view.world_size)
        self._checkpointer.attach(group, state=self._state, timeout_s=deadline.remaining() + 0.1)

    def restore(self) -> int:
        """Restores the newest step; returns its number, 0 where there is none.

        Raises:
            CollectiveError: Another member is gone.
            MismatchError: Checkpoint and state differ.
            CorruptError: No step could be read whole.
        """
        report = self._checkpointer.restore()
        self._saved = None if report is None else report.step
        return 0 if report is None else report.step

    def step(self, n: int, metrics: Mapping[str, float], *, last: bool) -> None:
        """Saves step `n` if that is due, or if it is the last one.

        Raises:
            CollectiveError: Another member is gone.
            SaveFailedError: An earlier save failed.
        """
        if n == self._saved:
            return
        saving = self._checkpointer.step(n, dict(metrics))
        if last and saving is None:
            saving = self._checkpointer.save(n, dict(metrics))
        if saving is not None:
            self._saved = n

    def detach(self) -> None:
        """Gives up what is not committed; ends waits for other ranks. From any thread."""
        self._checkpointer.detach()
