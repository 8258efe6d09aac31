"""What a checkpointer does about its mirror; nothing where it has none."""

import contextlib
import os
from collections.abc import Callable

from planaria.checkpoint.handle import SaveHandle
from planaria.checkpoint.policies import KeepPolicy
from planaria.checkpoint.restore import RestoreReport
from planaria.checkpoint.steps_in_use import StepsInUse
from planaria.checkpoint.storage.base import open_storage
from planaria.checkpoint.storage.lineage import NAME, LineageFile
from planaria.checkpoint.storage.mirror import Mirror, MirrorThread, is_listed, wait_listed
from planaria.checkpoint.storage.root import Root
from planaria.core.deadline import Deadline
from planaria.errors import ConfigError, PlanariaError, StorageError


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
        self._config = mirror if isinstance(mirror, Mirror | None) else Mirror(os.fspath(mirror))
        self._source = source
        self._lineage = LineageFile(source.storage)
        self._thread: MirrorThread | None = None
        self.root = None if self._config is None else Root(open_storage(self._config.url))
        if self.root is not None and self.root.storage.url == source.storage.url:
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
    ) -> None:
        """Starts to copy; on rank 0. See `MirrorThread`."""
        if self._config is not None and self.root is not None:
            self._thread = MirrorThread(
                self._config,
                self._source,
                self.root,
                steps,
                keep=keep,
                again=again,
                timeout_s=timeout_s,
                failed=failed,
            )

    def committed(self, handle: SaveHandle, attempt: str) -> None:
        """A save was committed."""
        handle._copies = self, attempt
        if self._thread is not None:
            self._thread.committed(handle.step, attempt)

    def restored(self, report: RestoreReport) -> None:
        """The run goes on from a step: what the mirror lacks of its past is copied up."""
        if self._thread is None:
            return
        if report.tier == "mirror" and self.root is not None:
            with contextlib.suppress(StorageError, OSError):  # else by the steps that both have
                self._lineage.adopt(self.root.id)
        self._thread.wake()

    def rewound(self, step: int) -> None:
        """Before the first commit after a restore: what is later than `step` is left."""
        # Also where this run has no mirror, but an earlier one had.
        if self._thread is not None or self._source.storage.size(NAME) is not None:
            self._lineage.rewind(step)

    def steps(self) -> list[int]:
        """Steps that may be restored from the mirror, ascending.

        Raises:
            OSError: It cannot be reached.
        """
        if self.root is None:
            return []
        left_after = self._lineage.read().rewound_to
        return [s for s in self.root.steps() if left_after is None or s <= left_after]

    def holds(self, step: int, attempt: str) -> bool:
        """Whether the mirror holds this attempt at a step."""
        if self._thread is not None:
            return self._thread.holds(step, attempt)
        return self.root is not None and is_listed(self.root, step, attempt)

    def wait(self, step: int, attempt: str, deadline: Deadline) -> None:
        """Returns once the mirror holds this attempt at a step.

        Raises:
            ConfigError: There is no mirror.
            StorageError: It was not copied; says why. (Only rank 0 knows.)
            DeadlineError: It took longer than the deadline.
        """
        if self._thread is not None:
            self._thread.wait(step, attempt, deadline)
        elif self.root is not None:
            wait_listed(self.root, step, attempt, deadline)
        else:
            raise ConfigError("there is no mirror: give the checkpointer one, by mirror=")

    def close(self, timeout_s: float) -> StorageError | None:
        """Ends once all is copied, or after a time; says what is not."""
        return None if self._thread is None else self._thread.close(timeout_s)
