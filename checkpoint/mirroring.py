"""What a checkpointer does about its mirror; nothing where it has none."""

import contextlib
import os
from collections.abc import Callable

from planaria.checkpoint.format.manifest import Manifest
from planaria.checkpoint.handle import SaveHandle
from planaria.checkpoint.policies import KeepPolicy
from planaria.checkpoint.restore import RestoreReport
from planaria.checkpoint.steps_in_use import StepsInUse
from planaria.checkpoint.storage.base import open_storage
from planaria.checkpoint.storage.lineage import NAME, LineageFile, foreign, is_mirror_of
from planaria.checkpoint.storage.mirror import ListedCopy, Mirror, MirrorThread
from planaria.checkpoint.storage.root import Root
from planaria.errors import ConfigError, CorruptError, PlanariaError, RootError, StorageError


class Mirroring:
    """The mirror, seen from one rank's checkpointer.

    Args:
        mirror: The `mirror=` argument.
        source: The checkpointer's root.

    Attributes:
        root: The mirror's root, None where there is no mirror.

    Raises:
        ConfigError: The mirror cannot be opened, or is the root itself.
    """

    def __init__(self, mirror: "str | os.PathLike[str] | Mirror | None", source: Root) -> None:
        if not isinstance(mirror, Mirror | str | os.PathLike | None):
            raise ConfigError(f"mirror={mirror!r}: give a folder or an fsspec URL, or a Mirror")
        self._config = mirror if isinstance(mirror, Mirror | None) else Mirror(os.fspath(mirror))
        self._source = source
        self._lineage = LineageFile(source.storage)
        self._thread: MirrorThread | None = None
        self._left = False  # whether it is yet to be noted that a rewind counts
        self.root = None if self._config is None else Root(open_storage(self._config.url))
        if self.root is not None and _place(self.root) == _place(source):
            raise ConfigError(
                f"mirror={self.root.storage.url!r} is where the checkpoints lie; give another place"
            )

    def start(
        self,
        steps: StepsInUse,
        *,
        keep: KeepPolicy | None,
        again: bool,
        timeout_s: float,
        failed: Callable[[PlanariaError], None],
        check_lock: Callable[[], None],
    ) -> None:
        """Starts to copy; on rank 0, which may do so already. See `MirrorThread`."""
        if self._config is not None and self.root is not None and self._thread is None:
            self._thread = MirrorThread(
                self._config,
                self._source,
                self.root,
                steps,
                keep=keep,
                again=again,
                timeout_s=timeout_s,
                failed=failed,
                check_lock=check_lock,
            )

    def committed(self, handle: SaveHandle, attempt: str) -> None:
        """A save was committed."""
        if self._left:
            with contextlib.suppress(OSError):  # tried again after the next save
                self._lineage.settle()
                self._left = False
        if self._thread is not None:
            handle._copy = self._thread.committed(handle.step, attempt)
        elif self.root is not None:
            handle._copy = ListedCopy(self.root, handle.step, attempt)

    def restored(self, report: RestoreReport) -> None:
        """The run goes on from a step: what the mirror lacks of its past is copied up.

        And where the step had to be read from the mirror, the copy here is made whole.
        """
        if self._thread is None:
            return
        if report.tier == "mirror" and self.root is not None:
            with contextlib.suppress(StorageError, OSError):  # else by the steps that both have
                self._lineage.adopt(self.root.id)
            self._thread.heal(report.step)
        self._thread.wake()

    def rewound(self, step: int, manifest: Manifest) -> None:
        """Before the first commit after a restore: what is later than `step` is left with it."""
        # Also where this run has no mirror, but an earlier one had.
        if self._thread is not None or self._source.storage.size(NAME) is not None:
            self._lineage.rewind(step, step=manifest.step, attempt=manifest.attempt)
            self._left = True

    def steps(self) -> list[int]:
        """Steps that may be restored from the mirror, ascending.

        Raises:
            RootError: It is another run's.
            OSError: It cannot be reached.
        """
        if self.root is None:
            return []
        self._check_ours(self.root)
        left_after = self._lineage.read().rewound_to
        return [s for s in self.root.steps() if left_after is None or s <= left_after]

    def has(self, step: int) -> bool:
        """Whether a step may be restored from the mirror where it is asked for by its number.

        Raises:
            RootError: It is another run's.
            OSError: It cannot be reached.
        """
        if self.root is None or not self.root.has(step):
            return False
        self._check_ours(self.root)
        try:
            attempt = self._source.manifest(step).attempt
        except StorageError:  # damaged or gone
            return True
        with contextlib.suppress(CorruptError):
            return self.root.manifest(step).attempt == attempt
        return True

    def _check_ours(self, root: Root) -> None:
        """A run that has steps of its own must not go on from another's."""
        if self._source.steps() and not is_mirror_of(root, self._source):
            raise RootError(foreign(root, self._source))

    def stop(self, timeout_s: float) -> bool:
        """Another rank goes on with the copying, from what it finds; False if it did not end."""
        thread, self._thread = self._thread, None
        return thread is None or thread.stop(timeout_s)

    def close(self, timeout_s: float) -> StorageError | None:
        """Ends once all is copied, or after a time; says what is not."""
        return None if self._thread is None else self._thread.close(timeout_s)


def _place(root: Root) -> str:
    """Where a root lies, by whatever name it was given."""
    local = root.storage.local
    return root.storage.url if local is None else os.path.realpath(local)
