"""Steps of a past that a run has left: set aside by marks, kept, and not restored by themselves.

A run that was rewound leaves its later steps with the next commit, and not before. So the marks are
written first and name that commit: they count once it is there, and are made empty, which counts
always, before the step that it wrote may be removed.
"""

import json

from planaria.checkpoint.format import manifest as manifest_format
from planaria.checkpoint.format.manifest import Manifest
from planaria.checkpoint.storage.base import Storage, reading
from planaria.checkpoint.storage.names import ATTEMPT, MARK, STEP, step_folder
from planaria.errors import CorruptError, StorageError


class Marks:
    """The marks in one root.

    Args:
        storage: The root.

    Attributes:
        settled: Whether every mark is an empty one, as far as this process knows.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage, self.settled = storage, False

    def set_aside(self, folder: str, names: list[str]) -> bool:
        """Whether the committed step in a folder with these files is of a past that was left."""
        left = {
            mark[1]
            for mark in map(MARK.fullmatch, names)
            if mark and self._counts(f"{folder}/{mark[0]}")
        }
        if not left:
            return False
        try:
            return self._attempt(folder) in left
        except (StorageError, OSError):
            return True  # damaged, and of a rewound past in any case

    def of(self, step: int) -> list[str]:
        """The marks that set aside whatever is committed as this step."""
        folder = step_folder(step)
        try:
            attempts = {self._attempt(folder)}
        except (StorageError, FileNotFoundError):
            # It may be readable again one day: then its attempt is one that has files here.
            found = map(ATTEMPT.fullmatch, self._storage.list(folder))
            attempts = {"damaged", *(m[1] for m in found if m and m[1])}
        return [f"{folder}/abandoned-{attempt}" for attempt in sorted(attempts)]

    def begin(self, marks: list[str], manifest: Manifest) -> None:
        """Writes marks that count once a manifest is in place."""
        self.settled = self.settled and not marks
        commit = json.dumps({"step": manifest.step, "attempt": manifest.attempt}).encode()
        for mark in marks:
            self._storage.put(mark, commit)

    def end(self, marks: list[str]) -> None:
        """The manifest is in place: from now on the marks count by themselves."""
        for mark in marks:
            self._storage.put(mark, b"")
        self.settled = True

    def settle(self) -> None:
        """Ends what a commit after a rewind has left open, before the step that it wrote may go.

        Only for who holds the lock.
        """
        if self.settled:
            return
        for folder in filter(STEP.fullmatch, self._storage.list()):
            for mark in filter(MARK.fullmatch, self._storage.list(folder)):
                self._settle(f"{folder}/{mark}")
        self.settled = True

    def _settle(self, mark: str) -> None:
        commit = self._condition(mark)
        if commit is None:
            return
        try:
            done = self._attempt(commit[0]) == commit[1]
        except FileNotFoundError:
            done = False
        except StorageError:
            return  # damaged: whether it was this commit's cannot be told any more
        if done:
            self._storage.sync_folder(commit[0])  # it may be there, and not durable yet
            self._storage.put(mark, b"")
        else:
            self._storage.remove(mark)

    def _condition(self, mark: str) -> tuple[str, str] | None:
        """Folder and attempt of the commit that a mark waits for; None if it waits for none.

        Raises:
            FileNotFoundError: The mark has just gone.
        """
        try:
            text = reading(f"{self._storage.url}/{mark}", lambda: self._storage.read(mark))
            commit = json.loads(text or b"null")
            return step_folder(commit["step"]), commit["attempt"]
        except CorruptError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise error.__cause__ from None
            return None
        except (ValueError, LookupError, TypeError):
            return None

    def _counts(self, mark: str) -> bool:
        try:
            commit = self._condition(mark)
        except FileNotFoundError:
            return False
        try:
            return commit is None or self._attempt(commit[0]) == commit[1]
        except (StorageError, OSError):
            return False

    def _attempt(self, folder: str) -> str:
        data = self._storage.read(f"{folder}/{manifest_format.NAME}")
        return Manifest.from_bytes(data, folder).attempt
