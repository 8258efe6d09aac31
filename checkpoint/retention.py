"""Which old steps go: what the policy does not want, but never what a restore would need.

The newest committed step stays, and so does the newest one that verifies: where the newest is
damaged, the one that a restore falls back to must not go.
"""

import contextlib
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

from planaria import telemetry
from planaria.checkpoint import points
from planaria.checkpoint.policies.keeping import KeepPolicy, kept
from planaria.checkpoint.state import tree
from planaria.checkpoint.steps_in_use import StepsInUse
from planaria.checkpoint.storage.lock import RootLock
from planaria.checkpoint.storage.names import data_path
from planaria.checkpoint.storage.root import Root
from planaria.core.points import point
from planaria.errors import PlanariaError


class Retention:
    """Chooses the steps of a root that may go.

    Args:
        root: The root.
        policy: What to keep.
        verifies: Tells whether a step is whole. By default by its manifest and the length of its
            files: reading all bytes after each save would cost the run as much as the save.
    """

    def __init__(
        self, root: Root, policy: KeepPolicy, verifies: Callable[[int], bool] | None = None
    ) -> None:
        self._root, self._policy = root, policy
        self._verifies = verifies or (lambda step: looks_whole(root, step))
        self._metrics: dict[int, Mapping[str, Any] | None] = {}

    def removable(self, committed: int | None = None) -> list[int]:
        """The committed steps that may go, ascending.

        Args:
            committed: The step that has just been written here, which is known to be whole.
        """
        steps = self._root.steps()
        there = set(steps)
        for step in [s for s in self._metrics if s not in there or s == committed]:
            del self._metrics[step]  # gone, or written anew
        wanted = kept(self._policy, steps, self.metrics) | set(steps[-1:])
        going = [s for s in steps if s not in wanted and s != committed]
        if not going:
            return []
        good = self.newest_good(steps, committed)
        # Nothing that can be restored is newer than what goes: then nothing goes.
        return [] if good is None else [s for s in going if s != good]

    def abandoned(self) -> list[int]:
        """The steps of a rewound past that may go: the policy holds for them by themselves."""
        left = self._root.abandoned()
        wanted = kept(self._policy, left, self.metrics) if left else set[int]()
        return [step for step in left if step not in wanted]

    def newest_good(self, steps: Collection[int], committed: int | None = None) -> int | None:
        """The newest step that verifies, None if none does."""
        newest_first = sorted(steps, reverse=True)
        return next((s for s in newest_first if s == committed or self._verifies(s)), None)

    def metrics(self, step: int) -> Mapping[str, Any] | None:
        """The metrics of a step; None where its manifest cannot be read."""
        if step not in self._metrics:
            try:
                self._metrics[step] = tree.decode(self._root.manifest(step).metrics)
            except (PlanariaError, OSError):
                self._metrics[step] = None
        return self._metrics[step]


def remove_old(
    root: Root, lock: RootLock, steps: StepsInUse, keep: Retention | None, step: int
) -> None:
    """Removes old steps and what crashes left; a failure is told, but costs no checkpoint.

    Args:
        root: The root.
        lock: This job's lock on it.
        steps: Keeps what is in use.
        keep: Chooses what goes; None for nothing.
        step: The step that was just committed.
    """
    try:
        lock.check()
        point(points.RETENTION_BEGIN, step=step)
        root.sweep(steps.to_remove)
        if keep is not None:
            for old in (*keep.abandoned(), *keep.removable(step)):
                with steps.to_remove(old) as free:
                    if free:
                        root.remove(old)
        if root.has_shared:  # what no step refers to any more
            root.sweep(steps.to_remove)
        point(points.RETENTION_END, step=step)
    except Exception as error:  # reported as a warning
        telemetry.event("checkpoint.retention_failed", step=step, error=str(error))
        with contextlib.suppress(Warning):  # warnings may be errors, here they must not
            warnings.warn(f"old checkpoints could not be removed: {error}", stacklevel=1)


def looks_whole(root: Root, step: int) -> bool:
    """Whether a step's manifest is whole and its files have the length that it says."""
    try:
        manifest = root.manifest(step)
        return all(
            root.storage.size(data_path(manifest, file)) == file.nbytes for file in manifest.files
        )
    except (PlanariaError, OSError):
        return False
