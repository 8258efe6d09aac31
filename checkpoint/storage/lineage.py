"""What a checkpoint folder remembers of its mirror: which one it is, and what is left of its past.

::

    <root>/mirror.json      {"id": ..., "rewound_to": ..., "leaving": ...}

Two runs must not be mixed in one mirror, and a mirror that was out of reach when the run was
rewound must not bring back the past that was left. Both have to outlive this process.

A run leaves its later steps with a commit, as in the root itself (see `marks`). So the note is made
before that commit and names it, ``{"to": 2, "step": 3, "attempt": ...}``: it counts once that very
commit is in place, and a save that fails leaves nothing.
"""

import contextlib
import json
import threading
from dataclasses import dataclass, replace
from typing import Any

from planaria.checkpoint.format import manifest as manifest_format
from planaria.checkpoint.format.manifest import Manifest
from planaria.checkpoint.storage.base import Storage
from planaria.checkpoint.storage.root import Root, step_folder
from planaria.errors import StorageError

NAME = "mirror.json"
# Folder -> one lock for all: the writing thread and the mirror's change the same file, each by an
# object of its own, and one that reads while the other writes would undo it. Not one for all
# folders: one whose storage hangs must not hold up a run in another.
_changing: dict[str, threading.Lock] = {}


@dataclass(frozen=True, slots=True)
class Lineage:
    """What is remembered.

    Attributes:
        id: Of the mirror that holds this run's past, None if there is none yet.
        rewound_to: The mirror's steps after this one belong to a past that was left, and are not
            set aside there yet; None if all are.
    """

    id: str | None = None
    rewound_to: int | None = None


@dataclass(frozen=True, slots=True)
class _Leaving:
    """A rewind that counts once a commit is in place."""

    to: int
    step: int
    attempt: str


class LineageFile:
    """Keeps it in a checkpoint folder.

    Args:
        storage: The folder.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._lock = _changing.setdefault(storage.url, threading.Lock())

    def read(self) -> Lineage:
        """What is remembered; nothing if the file is not there or makes no sense."""
        known, leaving = self._read()
        return known if leaving is None or not self._committed(leaving) else _left(known, leaving)

    def adopt(self, mirror: str | None) -> None:
        """Remembers that the mirror of this id holds the run's past."""
        with self._lock:
            known, leaving = self._read()
            if mirror is not None and known.id != mirror:
                self._write(replace(known, id=mirror), leaving)

    def rewind(self, to: int, *, step: int, attempt: str) -> None:
        """Remembers that the run goes on from a step; what the mirror has after it is left.

        Args:
            to: The step that it goes on from.
            step: The step that is about to be committed.
            attempt: By which save; the rewind counts once that is in place.
        """
        with self._lock:
            known, leaving = self._read()
            if leaving is not None and self._committed(leaving):
                known = _left(known, leaving)
            self._write(known, _Leaving(to, step, attempt))

    def settle(self) -> None:
        """After a commit: what hung on it counts by itself from now on, or not at all.

        To be called before the step that was committed may be removed.
        """
        with self._lock:
            known, leaving = self._read()
            if leaving is not None:
                self._write(_left(known, leaving) if self._committed(leaving) else known, None)

    def set_aside(self, step: int) -> None:
        """Forgets a rewind: the mirror knows of it."""
        with self._lock:
            known, leaving = self._read()
            if leaving is not None and self._committed(leaving):
                known, leaving = _left(known, leaving), None
            if known.rewound_to == step:
                self._write(Lineage(known.id), leaving)

    def _committed(self, leaving: _Leaving) -> bool:
        """Whether the commit that a rewind hangs on is in place."""
        path = f"{step_folder(leaving.step)}/{manifest_format.NAME}"
        try:
            return Manifest.from_bytes(self._storage.read(path), path).attempt == leaving.attempt
        except (FileNotFoundError, StorageError):
            return False

    def _read(self) -> tuple[Lineage, _Leaving | None]:
        try:
            data = json.loads(self._storage.read(NAME))
            mirror, step, leaving = data["id"], data["rewound_to"], data.get("leaving")
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return Lineage(), None
        known = Lineage(
            mirror if isinstance(mirror, str) else None, step if type(step) is int else None
        )
        return known, _leaving(leaving)

    def _write(self, known: Lineage, leaving: _Leaving | None) -> None:
        data: dict[str, Any] = {"id": known.id, "rewound_to": known.rewound_to}
        if leaving is not None:
            data["leaving"] = {
                "to": leaving.to,
                "step": leaving.step,
                "attempt": leaving.attempt,
            }
        self._storage.put(NAME, json.dumps(data).encode())


def _leaving(data: Any) -> _Leaving | None:
    match data:
        case {"to": int(to), "step": int(step), "attempt": str(attempt)}:
            return _Leaving(to, step, attempt)
    return None


def _left(known: Lineage, leaving: _Leaving) -> Lineage:
    """What is remembered once a rewind counts."""
    earlier = known.rewound_to
    return replace(known, rewound_to=leaving.to if earlier is None else min(earlier, leaving.to))


def is_mirror_of(mirror: Root, source: Root) -> bool:
    """Whether what a mirror holds is this root's own past, as far as either remembers.

    Raises:
        StorageError: It cannot be told.
        OSError: It cannot be told.
    """
    known = LineageFile(source.storage).read().id
    if known is not None:
        with contextlib.suppress(FileNotFoundError):
            if mirror.id == known:
                return True
    there = mirror.steps()
    for step in sorted(set(there) & set(source.steps()), reverse=True):
        with contextlib.suppress(StorageError):
            if mirror.manifest(step).attempt == source.manifest(step).attempt:
                return True
    return not there


def foreign(mirror: Root, source: Root) -> str:
    """What to say of a mirror that is not this root's."""
    return (
        f"the mirror {mirror.storage.url} holds steps up to {max(mirror.steps())} that this run, "
        f"in {source.storage.url}, neither wrote nor restored; give it a mirror of its own, or "
        "begin in an empty folder and restore from this one first"
    )
