"""A checkpoint root: which steps it holds, how one is committed, set aside, removed.

::

    <root>/planaria.json                       says that the folder is ours
    <root>/lock, lock.json                     the job that writes here
    <root>/mirror.json                         what a mirror of it must know, see `lineage`
    <root>/step-00000120/manifest.json         commits the step; written last
                         rank-00000-<attempt>.safetensors
                         abandoned-<attempt>   the step of this attempt belongs to a past that was
                                               rewound; kept, but not restored from

A step may refer to data files of other steps. Such a file outlives its own step: it goes with the
last manifest that mentions it.
"""

import contextlib
import json
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from planaria import telemetry
from planaria.checkpoint import points
from planaria.checkpoint.format import manifest as manifest_format
from planaria.checkpoint.format.manifest import Manifest
from planaria.checkpoint.storage.base import PutsIfAbsent, Storage, reading
from planaria.checkpoint.storage.marks import Marks
from planaria.checkpoint.storage.names import (
    ATTEMPT,
    DATA_FILE,
    LEFT,
    MARKER,
    ROOT_TEMPORARY,
    STEP,
    is_ours,
    is_saved,
    is_stale,
    step_folder,
)
from planaria.checkpoint.storage.references import References
from planaria.checkpoint.storage.timed import together
from planaria.core.points import point
from planaria.errors import (
    CorruptError,
    FormatError,
    NotCommittedError,
    RootError,
    RootLockedError,
    StorageError,
)

_KIND = "planaria checkpoints"
#: Folders of a remote store that are listed at a time.
_LISTS = 16


@dataclass(frozen=True, slots=True)
class StepFolder:
    """One step's folder.

    Attributes:
        step: Step number.
        state: "committed", "abandoned" (committed, but of a rewound past), "referenced" (not
            there any more, but with files that other steps use) or "uncommitted".
        mixed: Whether more than one attempt at the step has left files in it, and not for use.
    """

    step: int
    state: str
    mixed: bool = False


class Root:
    """The folder that a run's checkpoints lie in."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._marks = Marks(storage)
        self._references = References(storage)
        self._format = manifest_format.PLAIN_FORMAT  # that the marker is known to ask for
        # Steps that this job may write anew, once it has claimed the root.
        self._known: set[int] | None = None

    def claim(self) -> None:
        """Makes the folder ours, or checks that it is.

        Raises:
            RootError: It holds something else, or cannot be written.
            FormatError: A newer version made it.
        """
        try:
            names = self.storage.list()
            self._known = {int(m[1]) for m in map(STEP.fullmatch, names) if m}
            self._marks.settled = not self._known
            if MARKER in names:
                self._format = self._marker().get("format") or self._format
                return
            foreign = [n for n in names if not is_ours(n)]
            for folder in filter(STEP.fullmatch, names):
                inside = self.storage.list(folder)
                foreign += [f"{folder}/{n}" for n in inside if not is_saved(n)]
            if foreign:
                raise RootError(
                    f"{self.storage.url} holds files that are not Planaria's ("
                    f"{', '.join(foreign[:3])}{'...' if len(foreign) > 3 else ''}); give a new or "
                    "empty folder"
                )
            self.storage.make_folder("")
            marker = {
                "kind": _KIND,
                "format": manifest_format.PLAIN_FORMAT,
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

    def _marker(self) -> dict[str, Any]:
        path = f"{self.storage.url}/{MARKER}"
        try:
            marker = json.loads(self.storage.read(MARKER))
            kind, number = marker["kind"], marker.get("format")
        except (ValueError, KeyError, TypeError, AttributeError):
            marker, kind, number = {}, None, None
        if kind != _KIND:
            raise RootError(f"{path} is not the mark of a checkpoint folder")
        if isinstance(number, int) and number > manifest_format.FORMAT:
            raise FormatError(f"{path}: {manifest_format.newer(number)}")
        return marker

    def need_format(self, number: int) -> None:
        """Before a manifest of a newer format is there, versions that cannot read it are kept out.

        They would take files that it refers to for leftovers.
        """
        if number <= self._format:
            return
        marker = self._marker()
        if (marker.get("format") or 0) < number:
            self.storage.put(MARKER, json.dumps({**marker, "format": number}).encode())
        self._format = number

    def folders(self) -> list[StepFolder]:
        """All steps' folders, ascending."""
        scanned = self._scan()
        there = [step for step, state, _ in scanned if state != "uncommitted"]
        held: set[str] | None = None
        found = []
        for step, state, inside in scanned:
            mixed = len({m.groups() for m in map(ATTEMPT.fullmatch, inside) if m}) > 1
            # Manifests are read only where something may be left over, or be another step's.
            if (mixed or state == "uncommitted") and any(map(DATA_FILE.fullmatch, inside)):
                held = set().union(*map(self._references.known, there)) if held is None else held
                left = [n for n in inside if n not in held]
                if state == "uncommitted" and len(left) < len(inside):
                    state, mixed = "referenced", any(map(LEFT.fullmatch, left))
                else:
                    mixed = mixed and any(map(ATTEMPT.fullmatch, left))
            found.append(StepFolder(step, state, mixed))
        return found

    def _scan(self) -> list[tuple[int, str, list[str]]]:
        """Each step's folder, ascending: its number, its state as such, the names in it."""
        folders = [name for name in self.storage.list() if STEP.fullmatch(name)]
        steps = [int(name.removeprefix("step-")) for name in folders]
        return sorted(
            (step, self._state(name, inside), inside)
            for step, name, inside in zip(steps, folders, self._lists(folders), strict=True)
        )

    def _lists(self, folders: list[str]) -> list[list[str]]:
        """The names in folders. Of a remote store each costs a round trip: several at a time."""
        if self.storage.local is not None or len(folders) < 2:
            return [self.storage.list(folder) for folder in folders]
        return together([partial(self.storage.list, folder) for folder in folders], _LISTS)

    def _state(self, folder: str, names: list[str]) -> str:
        if manifest_format.NAME not in names:
            return "uncommitted"
        return "abandoned" if self._marks.set_aside(folder, names) else "committed"

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return [step for step, state, _ in self._scan() if state == "committed"]

    def abandoned(self) -> list[int]:
        """Steps of a past that was rewound, ascending."""
        return [step for step, state, _ in self._scan() if state == "abandoned"]

    @property
    def has_shared(self) -> bool:
        """Whether there may be files that outlived their step, as far as this process knows."""
        return self._format > manifest_format.PLAIN_FORMAT

    def mentioned(self, step: int) -> frozenset[str]:
        """Names of the data files that a step's manifest mentions, as far as it can be read."""
        return self._references.known(step)

    def held(self, without: int | None = None) -> set[str]:
        """Names of the data files that manifests mention, except for one step's.

        Raises:
            OSError: A manifest cannot be read.
        """
        return self._references.of_all(
            step for step, state, _ in self._scan() if state != "uncommitted" and step != without
        )

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

    def commit(self, manifest: Manifest, *, rewound_to: int | None = None) -> None:
        """Makes a step exist: all its data is durable, now the manifest is.

        Args:
            manifest: The step.
            rewound_to: The step that was restored before it. All later ones belong to a past that
                the run leaves with this commit, and not before: they are kept, and `planaria ls`
                shows them, but a restore never takes one by itself.
        """
        self._marks.settle()
        later = [s for s in self.steps() if s != manifest.step] if rewound_to is not None else []
        left = [s for s in later if s > (rewound_to or 0)]
        marks = [mark for step in left for mark in self._marks.of(step)]
        self._marks.begin(marks, manifest)
        self.need_format(manifest.format)
        folder = step_folder(manifest.step)
        names = self.storage.list(folder)
        stale = [n for n in names if is_stale(n, manifest.attempt)]
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
        self._references.note(manifest.step, (file.name for file in manifest.files))
        if self._known is not None:
            self._known.add(manifest.step)
        point(points.COMMITTED, step=manifest.step)
        # Whether or not what follows can be done, the step is committed.
        if left:
            telemetry.event("checkpoint.abandoned", steps=left, restored=rewound_to)
            with contextlib.suppress(OSError):
                self._marks.end(marks)
        # Files of an earlier attempt at the same step: nothing refers to them any more.
        with contextlib.suppress(OSError):
            if stale:
                self._remove_stale(folder, stale)

    def _remove_stale(self, folder: str, stale: list[str]) -> None:
        held = self.held()  # other steps may use them, and so may this one
        for name in stale:
            if name not in held:
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
        self._references.forget(step)
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
            names = self.storage.list(folder)
            self._remove_stale(folder, [n for n in names if is_stale(n, attempt)])

    def remove(self, step: int, *, unlisted: str = points.RETENTION_UNLISTED) -> None:
        """Removes a step: first it stops existing, then its data goes.

        Files of it that other steps refer to stay until `sweep` finds that none does. What others
        have put into its folder stays, and the folder with it.

        Args:
            step: The step.
            unlisted: Fault point to pass in between.
        """
        self._marks.settle()
        folder, held = step_folder(step), self.held(without=step)
        self._references.forget(step)
        if self._known is not None:
            self._known.discard(step)
        self.storage.remove(f"{folder}/{manifest_format.NAME}")
        self.storage.sync_folder(folder)
        point(unlisted, step=step)
        self._remove_left(folder, held)

    def _remove_left(self, folder: str, held: set[str]) -> None:
        for name in filter(LEFT.fullmatch, self.storage.list(folder)):
            if name not in held:
                self.storage.remove(f"{folder}/{name}")
        self.storage.remove_folder(folder)

    def sweep(self, to_remove: Callable[[int], AbstractContextManager[bool]]) -> list[int]:
        """Removes what crashed saves left behind, and shared files that no step uses any more.

        Args:
            to_remove: Gives whether a step is not being saved, and keeps it so: see
                `StepsInUse.to_remove`.

        Returns:
            The uncommitted steps that were removed.
        """
        for name in self.storage.list():
            if ROOT_TEMPORARY.fullmatch(name):
                self.storage.remove(name)
        dead = []
        for found in self.folders():
            tidy = found.state == "committed" and found.mixed
            if not tidy and found.state != "uncommitted" and (
                found.state != "referenced" or not found.mixed
            ):  # fmt: skip
                continue
            with to_remove(found.step) as free:
                if free and tidy:
                    self.tidy(found.step)
                elif free and self._is_all_left(found.step):
                    self._remove_left(step_folder(found.step), self.held())
                    if found.state == "uncommitted":
                        dead.append(found.step)
        return dead

    def _is_all_left(self, step: int) -> bool:
        return all(LEFT.fullmatch(name) for name in self.storage.list(step_folder(step)))
