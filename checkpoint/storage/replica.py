"""A mirror that is brought up to date: what it lacks is copied, what was left is set aside.

It is made to look like the root, whatever happened before: nothing is queued that a crash could
lose, and what was cut off is found by looking.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from planaria import telemetry
from planaria.checkpoint import points
from planaria.checkpoint.format.manifest import Manifest
from planaria.checkpoint.policies.keeping import KeepPolicy, kept
from planaria.checkpoint.state import tree
from planaria.checkpoint.steps_in_use import StepsInUse
from planaria.checkpoint.storage.copying import CopyLimits, SupersededError, copy_step
from planaria.checkpoint.storage.lineage import LineageFile, foreign, is_mirror_of
from planaria.checkpoint.storage.lock import RootLock
from planaria.checkpoint.storage.names import data_path
from planaria.checkpoint.storage.remote import RemoteStorage
from planaria.checkpoint.storage.root import Root, step_folder
from planaria.core.deadline import Deadline
from planaria.core.points import point
from planaria.errors import CorruptError, NotCommittedError, RootError, StorageError


class Replica:
    """The mirror of a root, held by the one thread that writes to it.

    Args:
        source: The root.
        target: The mirror.
        steps: Keeps a step from being removed while it is copied.
        keep: What the mirror keeps; None for everything.
        limits: How steps are copied.
        copied: Called with the step and the attempt of each that is in the mirror.
        warn: Called with what is wrong with steps of earlier runs.

    Attributes:
        progress: How many steps were copied so far.
    """

    def __init__(
        self,
        source: Root,
        target: Root,
        steps: StepsInUse,
        *,
        keep: KeepPolicy | None,
        limits: CopyLimits,
        copied: Callable[[int, str], None],
        warn: Callable[[str], None],
    ) -> None:
        self._source, self._target, self._steps = source, target, steps
        self._keep, self._limits = keep, limits
        self._copied, self._warn = copied, warn
        self._metrics_of: dict[int, Mapping[str, Any] | None] = {}
        self._lineage = LineageFile(source.storage)
        self._lock: RootLock | None = None
        # Committed steps of the mirror, and the attempt of each where it is known.
        self._there: dict[int, str | None] = {}
        self._listed: set[int] = set()  # steps that have a manifest there, set aside or not
        self._left: set[int] = set()  # steps there of a past that was left
        self._verified: set[int] = set()  # looked at by this process
        self._damaged: dict[int, str] = {}  # step -> attempt; told of, and not looked at again
        self._committed: dict[int, str] = {}  # step -> attempt, as far as it is known
        self._own: set[int] = set()  # committed by this process
        self._here: set[int] = set()  # the root's steps when it was looked at last
        self.progress = 0

    def committed(self, step: int, attempt: str) -> None:
        """Tells that a step of the root was committed, by this attempt. From any thread."""
        self._committed[step] = attempt
        self._metrics_of.pop(step, None)  # it may have been written anew
        self._own.add(step)

    def sync(self) -> None:
        """Copies up what is missing, newest first.

        Raises:
            RootError: The mirror is not ours to write to.
            CorruptError: A step that this run has saved is damaged; all others were copied.
            StoppedError: `limits.stop` was set.
            StorageError: The mirror failed.
            OSError: The mirror failed.
        """
        self._open()
        skipped: set[int] = set()
        found: CorruptError | None = None
        while True:
            step = self._next(skipped)
            # In this order: a rewind is noted before what follows it is committed.
            if self._set_aside():
                continue
            if step is None:
                break
            try:
                with self._steps.kept(step, Deadline(self._limits.timeout_s)):
                    self._copy(step)
            except (SupersededError, NotCommittedError):
                continue  # removed, or there anew
            except CorruptError as error:
                skipped.add(step)
                found = found or self._tell_damaged(step, error)
                continue
            self._retain()
            point(points.MIRROR_END, step=step)
        self._retain()
        self._forget()
        if found is not None:
            raise found

    def committed_steps(self) -> set[int] | None:
        """The root's steps; None where that cannot be told now."""
        with contextlib.suppress(StorageError, OSError):
            return set(self._source.steps())
        return None

    def close(self) -> None:
        """Gives the mirror free."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _open(self) -> None:
        if self._lock is not None:
            return
        self._target.claim()
        lock = RootLock(self._target.storage)
        try:
            folders = self._target.folders()
            local = {f.step for f in self._source.folders()}
            self._there = dict.fromkeys(f.step for f in folders if f.state == "committed")
            self._listed = {f.step for f in folders if f.state in ("committed", "abandoned")}
            self._left = {f.step for f in folders if f.state == "abandoned"}
            self._verified = set()
            self._check_lineage(local)
            self._sweep(local)
            storage = self._target.storage
            if isinstance(storage, RemoteStorage):
                with contextlib.suppress(OSError):  # not allowed to everybody, and not needed
                    storage.abort_unfinished()
        except BaseException:
            lock.release()
            raise
        self._lock = lock

    def _check_lineage(self, local: set[int]) -> None:
        """Two runs must not be mixed in one mirror."""
        if self._there and not is_mirror_of(self._target, self._source):
            raise RootError(foreign(self._target, self._source))
        for step in [step for step in self._there if step in local]:
            with contextlib.suppress(StorageError):
                manifest = self._target.manifest(step)
                # What the mirror has lost of a step is copied again, as long as it can be.
                if self._has_files(manifest):
                    self._there[step] = manifest.attempt
        self._lineage.adopt(self._target.id)

    def _has_files(self, manifest: Manifest) -> bool:
        paths = [data_path(manifest, file).rpartition("/") for file in manifest.files]
        inside = {folder: self._target.storage.list(folder) for folder, _, _ in paths}
        return all(name in inside[folder] for folder, _, name in paths)

    def _next(self, skipped: set[int]) -> int | None:
        """The newest step that the mirror should have and has not."""
        self._here = set(self._source.steps())
        wanted = set(self._here)
        if self._keep is not None:
            everywhere = sorted(wanted | set(self._there))
            wanted &= self._wanted(everywhere)
        for step in sorted(wanted - skipped, reverse=True):
            if step not in self._there:
                return step
            attempt = self._committed.get(step)
            if attempt is None:
                attempt = self._committed[step] = self._attempt(step) or ""
            if attempt and attempt != self._there[step]:
                return step
            if attempt:
                self._copied(step, attempt)
        return None

    def _wanted(self, steps: Sequence[int]) -> set[int]:
        """What the policy keeps, and the newest."""
        assert self._keep is not None
        return kept(self._keep, steps, self._metrics) | set(steps[-1:])

    def _metrics(self, step: int) -> Mapping[str, Any] | None:
        if step not in self._metrics_of:
            self._metrics_of[step] = None
            for root in (self._source, self._target):
                with contextlib.suppress(StorageError, OSError):
                    self._metrics_of[step] = tree.decode(root.manifest(step).metrics)
                    break
        return self._metrics_of[step]

    def _attempt(self, step: int) -> str | None:
        with contextlib.suppress(StorageError):
            return self._source.manifest(step).attempt
        return None

    def _copy(self, step: int) -> None:
        # A span is told of once it has ended: of a copy that hangs there would be nothing.
        telemetry.event("checkpoint.mirror_begun", step=step)
        with telemetry.span("checkpoint.mirror", step=step) as span:
            manifest = copy_step(
                self._source,
                self._target,
                step,
                again=step in self._listed,
                limits=self._limits,
                before_commit=self._check_lock,
            )
            span.set(bytes=manifest.nbytes)
        telemetry.count("checkpoint.mirrored_bytes", manifest.nbytes, step=step)
        self._there[step] = manifest.attempt
        self._left.discard(step)
        self._listed.add(step)
        self._verified.add(step)
        self.progress += 1
        self._target.tidy(step)
        # A run that was rewound and died before it went on may have come back to this past.
        self._target.storage.remove(f"{step_folder(step)}/abandoned-{manifest.attempt}")
        self._copied(step, manifest.attempt)

    def _tell_damaged(self, step: int, error: CorruptError) -> CorruptError | None:
        """Tells once of a step that cannot be copied for it is damaged.

        Returns:
            The error, where this run has saved the step. What an earlier one left must not end
            every run that goes on from a newer step: of that there is a warning.
        """
        attempt = self._attempt(step) or ""
        if self._damaged.get(step) == attempt:
            return None
        self._damaged[step] = attempt
        telemetry.event("checkpoint.mirror_damaged", step=step, error=str(error))
        if step in self._own:
            return error
        self._warn(f"step {step} cannot be copied to {self._target.storage.url}: {error}")
        return None

    def _forget(self) -> None:
        """What is neither here nor there any more need not be remembered."""
        known = self._here | self._there.keys() | self._left
        for steps in (self._metrics_of, self._damaged, self._committed):
            for step in [step for step in list(steps) if step not in known]:
                del steps[step]
        self._own &= known
        self._verified &= self._there.keys()

    def _check_lock(self) -> None:
        assert self._lock is not None
        self._lock.check()

    def _set_aside(self) -> bool:
        """Later steps than the one that the run was rewound to belong to a past that was left.

        False if the run was not rewound since the last time.
        """
        restored = self._lineage.read().rewound_to
        if restored is None:
            return False
        self._check_lock()
        for step in [s for s in self._there if s > restored]:
            if self._there[step] is None:
                with contextlib.suppress(CorruptError):
                    self._there[step] = self._target.manifest(step).attempt
            mark = self._there.pop(step) or "damaged"
            self._target.storage.put(f"{step_folder(step)}/abandoned-{mark}", b"")
            self._left.add(step)
            telemetry.event("checkpoint.mirror_abandoned", step=step, restored=restored)
        self._lineage.set_aside(restored)
        return True

    def _retain(self) -> None:
        """Removes old steps of the mirror, none that is newer than all that are whole.

        Of a past that was left as many stay, counted by themselves.
        """
        if self._keep is None or not self._there:
            return
        steps: Sequence[int] = sorted(self._there)
        wanted = self._wanted(steps)
        going = [s for s in steps if s not in wanted]
        whole = next((s for s in reversed(steps) if self._is_whole(s)), -1) if going else -1
        left = sorted(self._left)
        unwanted = self._left - kept(self._keep, left, self._metrics) if left else set[int]()
        for step in [*sorted(unwanted), *(s for s in going if s < whole)]:
            self._check_lock()
            self._there.pop(step, None)
            for steps_of in (self._left, self._verified, self._listed):
                steps_of.discard(step)
            self._target.remove(step, unlisted=points.MIRROR_UNLISTED)
        if self._target.has_shared:  # what nothing refers to any more
            self._sweep({f.step for f in self._source.folders()})

    def _sweep(self, local: set[int]) -> None:
        # Of a step that the root still has, what is half there is used.
        self._target.sweep(lambda step: contextlib.nullcontext(step not in local))

    def _is_whole(self, step: int) -> bool:
        """Whether a step was copied by this process, or looks as if an earlier one had."""
        if step not in self._verified:
            with contextlib.suppress(StorageError):
                manifest, size = self._target.manifest(step), self._target.storage.size
                if all(size(data_path(manifest, f)) == f.nbytes for f in manifest.files):
                    self._verified.add(step)
        return step in self._verified
