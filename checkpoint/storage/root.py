"""A checkpoint root: which steps it holds, how one is committed, set aside, removed.

::

    <root>/planaria.json                       says that the folder is ours
    <root>/lock, lock.json                     the job that writes here
    <root>/step-00000120/manifest.json         commits the step; written last
                         rank-00000-<attempt>.safetensors
                         abandoned-<attempt>   the step of this attempt belongs to a past that was
                                               rewound; kept, but not restored from

A mark is written before the commit that leaves the past, so that no crash can come between them. It
names that commit, and counts once that is in place; then it is replaced by an empty one, which
counts whatever becomes of that step.
"""

import contextlib
import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from planaria import telemetry
from planaria.checkpoint import points
from planaria.checkpoint.format import manifest as manifest_format
from planaria.checkpoint.format.manifest import Manifest
from planaria.checkpoint.storage.base import Storage, reading
from planaria.core.points import point
from planaria.errors import (
    CorruptError,
    FormatError,
    NotCommittedError,
    RootError,
    StorageError,
)

MARKER = "planaria.json"
_TEMPORARY = r"\.tmp-[0-9a-f]{8}"
_ROOT_TEMPORARY = re.compile(rf"(planaria|lock)\.json{_TEMPORARY}")
_OURS = re.compile(rf"planaria\.json|lock|lock\.json|step-\d{{8,}}|{_ROOT_TEMPORARY.pattern}")
_STEP = re.compile(r"step-(\d{8,})")
_MARK = re.compile(r"abandoned-(\w+)")
# What a save may leave in a step's folder; anything else is somebody's own, and kept.
_LEFT = re.compile(
    rf"rank-\d+-[0-9a-f]+\.safetensors|abandoned-\w+|(manifest\.json|abandoned-\w+){_TEMPORARY}"
)
_ATTEMPT = re.compile(
    rf"rank-\d+-([0-9a-f]+)\.safetensors|((?:manifest\.json|abandoned-\w+){_TEMPORARY})"
)


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
        # Whether every mark is an empty one, as far as this process knows.
        self._settled = False

    def claim(self) -> None:
        """Makes the folder ours, or checks that it is.

        Raises:
            RootError: It holds something else, or cannot be written.
            FormatError: A newer version made it.
        """
        try:
            names = self.storage.list()
            self._settled = not any(map(_STEP.fullmatch, names))
            if MARKER in names:
                self._check_marker()
                return
            foreign = [n for n in names if not _OURS.fullmatch(n)]
            for folder in filter(_STEP.fullmatch, names):
                inside = self.storage.list(folder)
                foreign += [f"{folder}/{n}" for n in inside if not _is_saved(n)]
            if foreign:
                raise RootError(
                    f"{self.storage.url} holds files that are not Planaria's ("
                    f"{', '.join(foreign[:3])}{'...' if len(foreign) > 3 else ''}); give a new or "
                    "empty folder"
                )
            self.storage.make_folder("")
            marker = {"kind": "planaria checkpoints", "format": manifest_format.FORMAT}
            self.storage.put(MARKER, json.dumps(marker).encode())
        except OSError as error:
            raise RootError(f"cannot write to {self.storage.url}: {error}; give a folder that "
                            "exists or can be made, on a disk with room") from error  # fmt: skip

    def _check_marker(self) -> None:
        path = f"{self.storage.url}/{MARKER}"
        try:
            marker = json.loads(self.storage.read(MARKER))
            kind, number = marker["kind"], marker.get("format")
        except (ValueError, KeyError, TypeError, AttributeError):
            kind, number = None, None
        if kind != "planaria checkpoints":
            raise RootError(f"{path} is not the mark of a checkpoint folder")
        if isinstance(number, int) and number > manifest_format.FORMAT:
            raise FormatError(f"{path}: {manifest_format.newer(number)}")

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
        set_aside = {
            mark[1]
            for mark in map(_MARK.fullmatch, names)
            if mark and self._counts(f"{folder}/{mark[0]}")
        }
        if set_aside:
            try:
                if self._attempt(folder) in set_aside:
                    return "abandoned"
            except (StorageError, OSError):
                return "abandoned"  # damaged, and of a rewound past in any case
        return "committed"

    def _condition(self, mark: str) -> tuple[str, str] | None:
        """Folder and attempt of the commit that a mark waits for; None if it waits for none.

        Raises:
            FileNotFoundError: The mark has just gone.
        """
        try:
            text = reading(f"{self.storage.url}/{mark}", lambda: self.storage.read(mark))
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
        data = self.storage.read(f"{folder}/{manifest_format.NAME}")
        return Manifest.from_bytes(data, folder).attempt

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return [f.step for f in self.folders() if f.state == "committed"]

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

    def commit(self, manifest: Manifest, *, rewound_to: int | None = None) -> None:
        """Makes a step exist: all its data is durable, now the manifest is.

        Args:
            manifest: The step.
            rewound_to: The step that was restored before it. All later ones belong to a past that
                the run leaves with this commit, and not before: they are kept, and `planaria ls`
                shows them, but a restore never takes one by itself.
        """
        self._settle()
        left = [] if rewound_to is None else self._later(rewound_to, manifest.step)
        self._settled = not left
        commit = json.dumps({"step": manifest.step, "attempt": manifest.attempt}).encode()
        for mark in left:
            self.storage.put(mark, commit)
        folder = step_folder(manifest.step)
        stale = [n for n in self.storage.list(folder) if _is_stale(n, manifest.attempt)]
        point(points.MANIFEST_BEGIN, step=manifest.step)
        self.storage.put(
            f"{folder}/{manifest_format.NAME}",
            manifest.to_bytes(),
            points=(points.MANIFEST_WRITTEN, points.MANIFEST_RENAMED),
            step=manifest.step,
        )
        point(points.COMMITTED, step=manifest.step)
        # Whether or not what follows can be done, the step is committed.
        if left:
            steps = sorted({int(mark[len("step-") :].partition("/")[0]) for mark in left})
            telemetry.event("checkpoint.abandoned", steps=steps, restored=rewound_to)
            with contextlib.suppress(OSError):
                for mark in left:
                    self.storage.put(mark, b"")
                self._settled = True
        # Files of an earlier attempt at the same step: nothing refers to them any more.
        with contextlib.suppress(OSError):
            for name in stale:
                self.storage.remove(f"{folder}/{name}")

    def _later(self, step: int, written_now: int) -> list[str]:
        """The marks that set aside all committed steps after `step`, but for one to be replaced."""
        marks = []
        for number in self.steps():
            if number <= step or number == written_now:
                continue
            folder = step_folder(number)
            try:
                attempts = {self.manifest(number).attempt}
            except StorageError:
                # It may be readable again one day: then its attempt is one that has files here.
                found = map(_ATTEMPT.fullmatch, self.storage.list(folder))
                attempts = {"damaged", *(m[1] for m in found if m and m[1])}
            marks += [f"{folder}/abandoned-{attempt}" for attempt in sorted(attempts)]
        return marks

    def _settle(self) -> None:
        """Ends what a commit after a rewind has left open, before the step that it wrote may go.

        Only for who holds the lock.
        """
        if self._settled:
            return
        for folder in filter(_STEP.fullmatch, self.storage.list()):
            for mark in filter(_MARK.fullmatch, self.storage.list(folder)):
                self._settle_mark(f"{folder}/{mark}")
        self._settled = True

    def _settle_mark(self, mark: str) -> None:
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
            self.storage.sync_folder(commit[0])  # it may be there, and not durable yet
            self.storage.put(mark, b"")
        else:
            self.storage.remove(mark)

    def _tidy(self, step: int) -> None:
        """Removes what other attempts at a committed step have left in its folder."""
        folder = step_folder(step)
        with contextlib.suppress(StorageError):  # damaged: every file may be wanted yet
            attempt = self.manifest(step).attempt
            for name in self.storage.list(folder):
                if _is_stale(name, attempt):
                    self.storage.remove(f"{folder}/{name}")

    def remove(self, step: int) -> None:
        """Removes a step: first it stops existing, then its data goes.

        What others have put into its folder stays, and the folder with it.
        """
        self._settle()
        folder = step_folder(step)
        self.storage.remove(f"{folder}/{manifest_format.NAME}")
        self.storage.sync_folder(folder)
        point(points.RETENTION_UNLISTED, step=step)
        self._remove_left(folder)

    def _remove_left(self, folder: str) -> None:
        for name in filter(_LEFT.fullmatch, self.storage.list(folder)):
            self.storage.remove(f"{folder}/{name}")
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
            if _ROOT_TEMPORARY.fullmatch(name):
                self.storage.remove(name)
        dead = []
        for found in self.folders():
            tidy = found.state == "committed" and found.mixed
            if not tidy and found.state != "uncommitted":
                continue
            with to_remove(found.step) as free:
                if free and tidy:
                    self._tidy(found.step)
                elif free and self._is_all_left(found.step):
                    self._remove_left(step_folder(found.step))
                    dead.append(found.step)
        return dead

    def _is_all_left(self, step: int) -> bool:
        return all(_LEFT.fullmatch(name) for name in self.storage.list(step_folder(step)))


def _is_saved(name: str) -> bool:
    """Whether a save may have put a file of this name into a step's folder."""
    return name == manifest_format.NAME or _LEFT.fullmatch(name) is not None


def _is_stale(name: str, attempt: str) -> bool:
    """Whether an attempt other than the committed one has left the file, or a crash in writing."""
    return _LEFT.fullmatch(name) is not None and (attempt not in name or ".tmp-" in name)
