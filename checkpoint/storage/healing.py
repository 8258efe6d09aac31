"""Making a damaged step of a root whole again, from its mirror.

Only what is damaged or gone is replaced: a data file all at once, by a rename, for other steps may
need what is good of the old one; the manifest last, as in a save. So whoever reads meanwhile, or
after a crash at any point, finds the step no worse than it was.
"""

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace

from planaria import telemetry
from planaria.checkpoint import points
from planaria.checkpoint.format.manifest import Manifest
from planaria.checkpoint.steps_in_use import StepsInUse
from planaria.checkpoint.storage.copying import (
    CopyLimits,
    FileCopy,
    SupersededError,
    manifest_bytes,
)
from planaria.checkpoint.storage.names import data_path
from planaria.checkpoint.storage.root import Root, step_folder
from planaria.core.deadline import Deadline
from planaria.core.points import point
from planaria.errors import CorruptError, NotCommittedError, StorageError


def heal_step(
    mirror: Root,
    root: Root,
    step: int,
    steps: StepsInUse,
    limits: CopyLimits,
    check_lock: Callable[[], None] = lambda: None,
) -> list[str]:
    """Replaces what is damaged or gone of a step, and reads back what it has written.

    Args:
        mirror: Where the step is whole.
        root: Where it is not.
        step: The step.
        steps: Keeps it from being removed meanwhile, and from being saved while it is put back.
        limits: How to copy.
        check_lock: Makes sure that the root is still ours; what it raises ends it.

    Returns:
        The files that were replaced, as paths in the root; none if all was whole.

    Raises:
        SupersededError: The mirror has not the attempt that was committed, or it is saved anew.
        CorruptError: The mirror's copy is damaged, too.
        StoppedError: `limits.stop` was set.
        StorageError: One of the two failed.
        OSError: One of the two failed.
    """
    data = manifest_bytes(mirror, step)
    manifest = Manifest.from_bytes(data, f"{mirror.storage.url}/{step_folder(step)}")
    folders = {step, *(f.step for f in manifest.files if f.step is not None)}
    with contextlib.ExitStack() as held:
        for folder in sorted(folders):
            held.enter_context(steps.kept(folder, Deadline(limits.timeout_s)))
        committed = _is_committed(root, manifest)
        replaced = _files(mirror, root, manifest, limits, check_lock)
        if not committed:
            with steps.to_put_back(step) as free:
                if not free or _is_committed(root, manifest):
                    raise SupersededError
                check_lock()
                root.need_format(manifest.format)
                root.write_manifest(
                    step, data, again=True, points=(points.HEAL_MANIFEST, points.HEAL_WRITTEN)
                )
            replaced.append(f"{step_folder(step)}/manifest.json")
    return replaced


def _is_committed(root: Root, manifest: Manifest) -> bool:
    """Whether the root's own manifest is whole.

    Raises:
        SupersededError: It is, and of another attempt.
    """
    try:
        found = root.manifest(manifest.step)
    except (CorruptError, NotCommittedError):
        return False
    if found.attempt != manifest.attempt:
        raise SupersededError
    return True


def _files(
    mirror: Root,
    root: Root,
    manifest: Manifest,
    limits: CopyLimits,
    check_lock: Callable[[], None],
) -> list[str]:
    replaced: list[str] = []
    down = FileCopy(mirror.storage, root.storage, manifest, replace(limits, read_back=True))
    for file in manifest.files:
        path = data_path(manifest, file)
        if down.is_whole(file):
            continue
        check_lock()
        point(points.HEAL_FILE, step=manifest.step)
        root.prepare(manifest.step if file.step is None else file.step)
        down.send(file)
        replaced.append(path)
    return replaced


class Healing:
    """The steps of a root that are to be made whole again.

    Args:
        mirror: Where they are whole.
        root: Where they are not.
        steps: See `heal_step`.
        limits: See `heal_step`.
        check_lock: See `heal_step`.
        failed: Called with what went wrong, once it is given up.
    """

    #: Tries before a step is given up.
    TRIES = 3

    def __init__(
        self,
        mirror: Root,
        root: Root,
        steps: StepsInUse,
        limits: CopyLimits,
        check_lock: Callable[[], None],
        failed: Callable[[str], None],
    ) -> None:
        self._mirror, self._root, self._steps = mirror, root, steps
        self._limits, self._check_lock, self._failed = limits, check_lock, failed
        self._tries: dict[int, int] = {}
        self._lock = threading.Lock()

    def add(self, step: int) -> None:
        """A step had to be read from the mirror."""
        with self._lock:
            self._tries[step] = 0

    def run(self) -> None:
        """Makes whole what it can; what fails is tried again the next time.

        Raises:
            StoppedError: `limits.stop` was set.
        """
        for step in sorted(self._tries, reverse=True):
            try:
                with telemetry.span("checkpoint.heal", step=step) as span:
                    files = heal_step(
                        self._mirror,
                        self._root,
                        step,
                        self._steps,
                        self._limits,
                        self._check_lock,
                    )
                    span.set(files=files)
            except SupersededError:
                pass
            except (StorageError, OSError) as error:
                self._tries[step] += 1
                telemetry.event("checkpoint.heal_failed", step=step, error=str(error))
                if self._tries[step] < self.TRIES:
                    continue
                self._failed(
                    f"step {step} of {self._root.storage.url} is damaged, and could not be "
                    f"replaced from its mirror: {error}"
                )
            with self._lock:
                self._tries.pop(step, None)
