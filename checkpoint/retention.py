"""Which old steps go: what the policy does not want, but never what a restore would need.

The newest committed step stays, and so does the newest one that verifies: where the newest is
damaged, the one that a restore falls back to must not go.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from planaria.checkpoint.policies.keeping import KeepPolicy, kept
from planaria.checkpoint.state import tree
from planaria.checkpoint.storage.names import data_path
from planaria.checkpoint.storage.root import Root
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


def looks_whole(root: Root, step: int) -> bool:
    """Whether a step's manifest is whole and its files have the length that it says."""
    try:
        manifest = root.manifest(step)
        return all(
            root.storage.size(data_path(manifest, file)) == file.nbytes for file in manifest.files
        )
    except (PlanariaError, OSError):
        return False
