"""Which data files the manifests of a root refer to.

A file may hold what several steps need, and must stay until the last of them goes. What counts is
the name: it holds the random id of the save that wrote it, so no two files are called alike, and it
is found in a manifest without parsing it, also in one that is damaged elsewhere.
"""

import contextlib
from collections.abc import Iterable

from planaria.checkpoint.format import manifest as manifest_format
from planaria.checkpoint.storage.base import Storage
from planaria.checkpoint.storage.names import DATA_FILE, step_folder


class References:
    """The names of data files that manifests mention, each read once.

    Whoever writes or removes a manifest must say so; others do not while the root is locked.

    Args:
        storage: The root.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._of_step: dict[int, frozenset[str]] = {}

    def forget(self, step: int) -> None:
        """The manifest of a step was written or removed."""
        self._of_step.pop(step, None)

    def note(self, step: int, names: Iterable[str]) -> None:
        """The manifest of a step was written; it mentions these."""
        self._of_step[step] = frozenset(names)

    def of(self, step: int) -> frozenset[str]:
        """The files that a step's manifest mentions; none where there is no manifest.

        Raises:
            OSError: It cannot be read.
        """
        if step not in self._of_step:
            try:
                data = self._storage.read(f"{step_folder(step)}/{manifest_format.NAME}")
            except FileNotFoundError:
                return frozenset()
            found = DATA_FILE.findall(data.decode("latin-1"))
            self._of_step[step] = frozenset(found)
        return self._of_step[step]

    def of_all(self, steps: Iterable[int]) -> set[str]:
        """The files that the manifests of these steps mention.

        Raises:
            OSError: One cannot be read.
        """
        return set().union(*(self.of(step) for step in steps))

    def known(self, step: int) -> frozenset[str]:
        """As `of`; nothing where it cannot be read."""
        with contextlib.suppress(OSError):
            return self.of(step)
        return frozenset()
