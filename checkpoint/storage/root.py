"""A checkpoint root: which steps it holds, how one is committed, set aside, removed.

::

    <root>/planaria.json                       says that the folder is ours
    <root>/lock, lock.json                     the job that writes here
    <root>/mirror.json                         what a mirror of it must know, see `lineage`
    <root>/step-00000120/manifest.json         commits the step; written last
                         rank-00000-<attempt>.safetensors
                         abandoned-<attempt>   the step of this attempt belongs to a past that was
                                               rewound; kept, but not restored from
"""

import contextlib
import json
import re
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from planaria.checkpoint import points
from planaria.checkpoint.format import manifest as manifest_format
from planaria.checkpoint.format.manifest import Manifest
from planaria.checkpoint.storage.base import PutsIfAbsent, Storage, reading
from planaria.core.points import point
from planaria.errors import (
    CorruptError,
    NotCommittedError,
    RootError,
    RootLockedError,
    StorageError,
)

MARKER = "planaria.json"
_KIND = "planaria checkpoints"
_OURS = re.compile(r"planaria\.json|lock|lock\.json|mirror\.json|step-\d{8,}|.*\.tmp-[0-9a-f]{8}")
_STEP = re.compile(r"step-(\d{8,})")
# What a save may leave in a step's folder; anything else is somebody's own, and kept.
_LEFT = re.compile(r"rank-\d+-[0-9a-f]+\.safetensors|abandoned-\w+|manifest\.json\.tmp-[0-9a-f]{8}")
_ATTEMPT = re.compile(r"rank-\d+-([0-9a-f]+)\.safetensors|(manifest\.json\.tmp-[0-9a-f]{8})")


@dataclass(frozen=True, slots=True)
class StepFolder:
    """One step's folder.

    Attributes:
        step: Step number.
        state: "committed", "abandoned" (committed, but of a rewound past) or "uncommitted".
        mixed: Whether more than one attempt at the step has left files in it.
    """

    step: int
    state: str
    mixed: bool = False


def step_folder(step: int) -> str:
    """Folder name of a step."""
    return f"step-{step:08d}"


class Root:
    """The folder that a run's checkpoints lie in."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        # Steps that this job may write anew, once it has claimed the root.
        self._known: set[int] | None = None

    def claim(self) -> None:
        """Makes the folder ours, or checks that it is.

        Raises:
            RootError: It holds something else, or cannot be written.
        """
        try:
            names = self.storage.list()
            self._known = {int(m[1]) for m in map(_STEP.fullmatch, names) if m}
            if MARKER in names:
                self._marker()
                return
            foreign = [n for n in names if not _OURS.fullmatch(n)]
            if foreign:
                raise RootError(
                    f"{self.storage.url} holds files that are not Planaria's ("
                    f"{', '.join(foreign[:3])}{'...' if len(foreign) > 3 else ''}); give a new or "
                    "empty folder"
                )
            self.storage.make_folder("")
            marker = {
                "kind": _KIND,
                "format": manifest_format.FORMAT,
                "id": secrets.token_hex(8),
            }
            self.storage.put(MARKER, json.dumps(marker).encode())
        except OSError as error:
            raise RootError(f"cannot write to {self.storage.url}: {error}; give a folder that "
                            "exists or can be made, on a disk with room") from error  # fmt: skip

    @property
    def id(self) -> str | None:
        """Random name of the root, the same wherever it is moved to; older ones have none."""
        return self._marker().get("id")

    def _marker(self) -> dict[str, str]:
        try:
            marker = json.loads(self.storage.read(MARKER))
            ours = marker["kind"] == _KIND
        except (ValueError, KeyError, TypeError):
            marker, ours = {}, False
        if not ours:
            raise RootError(f"{self.storage.url}/{MARKER} is not the mark of a checkpoint folder")
        return marker

    def folders(self) -> list[StepFolder]:
        """All steps' folders, ascending."""
        found = []
        for name in self.storage.list():
            match = _STEP.fullmatch(name)
            if match:
                inside = self.storage.list(name)
                attempts = {m.groups() for m in map(_ATTEMPT.fullmatch, inside) if m}
                state = self._state(name, inside)
                found.append(StepFolder(int(match[1]), state, len(attempts) > 1))
        return sorted(found, key=lambda f: f.step)

    def _state(self, folder: str, names: list[str]) -> str:
        if manifest_format.NAME not in names:
            return "uncommitted"
        set_aside = {n.removeprefix("abandoned-") for n in names if n.startswith("abandoned-")}
        if set_aside:
            try:
                data = self.storage.read(f"{folder}/{manifest_format.NAME}")
                if Manifest.from_bytes(data, folder).attempt in set_aside:
                    return "abandoned"
            except (StorageError, OSError):
                return "abandoned"  # damaged, and of a rewound past in any case
        return "committed"

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return [f.step for f in self.folders() if f.state == "committed"]

    def has(self, step: int) -> bool:
        """Whether a step was committed, also if it was set aside since."""
        return self.storage.size(f"{step_folder(step)}/{manifest_format.NAME}") is not None

    def manifest(self, step: int) -> Manifest:
        """The manifest of a step.

        Raises:
            NotCommittedError: The step has none.
            CorruptError: It is damaged.
            FormatError: A newer version wrote it.
        """
        path = f"{step_folder(step)}/{manifest_format.NAME}"
        try:
            data = reading(f"{self.storage.url}/{path}", lambda: self.storage.read(path))
        except CorruptError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            known = ", ".join(str(s) for s in self.steps()[-10:]) or "none"
            raise NotCommittedError(
                f"{self.storage.url} has no committed step {step}; committed: {known}"
            ) from error
        manifest = Manifest.from_bytes(data, f"{self.storage.url}/{path}")
        if manifest.step != step:
            raise CorruptError(f"{self.storage.url}/{path} is the manifest of step {manifest.step}")
        return manifest

    def prepare(self, step: int) -> None:
        """Makes the folder of a step."""
        self.storage.make_folder(step_folder(step))

    def commit(self, manifest: Manifest) -> None:
        """Makes a step exist: all its data is durable, now the manifest is."""
        folder = step_folder(manifest.step)
        names = self.storage.list(folder)
        stale = {n for n in names if _LEFT.fullmatch(n) and manifest.attempt not in n}
        point(points.MANIFEST_BEGIN, step=manifest.step)
        again = manifest_format.NAME in names
        # On a local disk the kernel's lock tells of others; elsewhere the lease may come too late.
        known = self.storage.local is not None or self._known is None
        if again and not known and manifest.step not in (self._known or ()):
            raise self._taken(manifest.step)
        self.write_manifest(
            manifest.step,
            manifest.to_bytes(),
            again=again,
            points=(points.MANIFEST_WRITTEN, points.MANIFEST_RENAMED),
        )
        if self._known is not None:
            self._known.add(manifest.step)
        point(points.COMMITTED, step=manifest.step)
        # Files of an earlier attempt at the same step: nothing refers to them any more, and whether
        # or not they go, the step is committed.
        with contextlib.suppress(OSError):
            for name in stale:
                self.storage.remove(f"{folder}/{name}")

    def write_manifest(
        self, step: int, data: bytes, *, again: bool, points: tuple[str, str]
    ) -> None:
        """Puts a manifest in place, where it can be only if there is none.

        Args:
            step: The step.
            data: The manifest file.
            again: Whether one that is there is to be replaced.
            points: Fault points to pass when written, and when in place.

        Raises:
            RootLockedError: Another job has committed the step meanwhile.
            StorageError: What was written does not come back.
        """
        path = f"{step_folder(step)}/{manifest_format.NAME}"
        try:
            if not again and isinstance(self.storage, PutsIfAbsent):
                self.storage.put_new(path, data, points=points, step=step)
            else:
                self.storage.put(path, data, points=points, step=step)
        except FileExistsError as error:
            # An earlier try of our own may have got there, and only its answer been lost.
            if self.storage.read(path) != data:
                raise self._taken(step) from error
        if self.storage.local is None:
            self._read_back(path, data)

    def _taken(self, step: int) -> RootLockedError:
        return RootLockedError(
            f"another job has committed step {step} to {self.storage.url} meanwhile; only one may "
            "write there: stop one of them, or give it a place of its own"
        )

    def _read_back(self, path: str, data: bytes) -> None:
        """A store may confirm what it has not kept."""
        try:
            found = self.storage.read(path)
        except FileNotFoundError:
            found = b""
        if found != data:
            raise StorageError(
                f"{self.storage.url}/{path}: {len(data)} bytes were confirmed, but {len(found)} "
                "others are read back; the store has lost them, or another job writes there"
            )

    def tidy(self, step: int) -> None:
        """Removes what other attempts at a committed step have left in its folder."""
        folder = step_folder(step)
        with contextlib.suppress(StorageError):  # damaged: every file may be wanted yet
            attempt = self.manifest(step).attempt
            for name in self.storage.list(folder):
                if _LEFT.fullmatch(name) and attempt not in name:
                    self.storage.remove(f"{folder}/{name}")

    def abandon_after(self, step: int) -> list[int]:
        """Sets aside every committed step later than `step`: the run was rewound to there.

        They are kept, and `planaria ls` shows them, but a restore never takes one: it would bring
        back a past that the run has left. Returns the steps.
        """
        later = [s for s in self.steps() if s > step]
        for number in later:
            folder = step_folder(number)
            try:
                attempt = self.manifest(number).attempt
            except StorageError:
                attempt = "damaged"
            self.storage.put(f"{folder}/abandoned-{attempt}", b"")
        return later

    def remove(self, step: int, *, unlisted: str = points.RETENTION_UNLISTED) -> None:
        """Removes a step: first it stops existing, then its data goes.

        Args:
            step: The step.
            unlisted: Fault point to pass in between.
        """
        folder = step_folder(step)
        self.storage.remove(f"{folder}/{manifest_format.NAME}")
        self.storage.sync_folder(folder)
        point(unlisted, step=step)
        self.storage.remove_folder(folder)

    def sweep(self, to_remove: Callable[[int], AbstractContextManager[bool]]) -> list[int]:
        """Removes what crashed saves left behind.

        Args:
            to_remove: Gives whether a step is not being saved, and keeps it so: see
                `StepsInUse.to_remove`.

        Returns:
            The uncommitted steps that were removed.
        """
        for name in self.storage.list():
            if re.fullmatch(r".*\.tmp-[0-9a-f]{8}", name):
                self.storage.remove(name)
        dead = []
        for found in self.folders():
            tidy = found.state == "committed" and found.mixed
            if not tidy and found.state != "uncommitted":
                continue
            with to_remove(found.step) as free:
                if free and tidy:
                    self.tidy(found.step)
                elif free and self._is_all_left(found.step):
                    self.storage.remove_folder(step_folder(found.step))
                    dead.append(found.step)
        return dead

    def _is_all_left(self, step: int) -> bool:
        return all(_LEFT.fullmatch(name) for name in self.storage.list(step_folder(step)))
