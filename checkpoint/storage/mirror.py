"""Keeping a second copy of all checkpoints elsewhere, in the background and out of training's way.

Rank 0 copies for all ranks: it is the one that commits, and the root is shared. What limits a copy
is its machine's network, of which `bytes_per_s` leaves as much to training as is wanted.
"""

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from planaria import telemetry
from planaria.checkpoint.policies import KeepPolicy
from planaria.checkpoint.steps_in_use import StepsInUse
from planaria.checkpoint.storage.copying import CopyLimits, StoppedError
from planaria.checkpoint.storage.healing import Healing
from planaria.checkpoint.storage.replica import Replica
from planaria.checkpoint.storage.root import Root
from planaria.core.deadline import Deadline
from planaria.core.pacing import TokenBucket
from planaria.errors import (
    ConfigError,
    CorruptError,
    PlanariaError,
    RootError,
    RootLockedError,
    StorageError,
)

#: Seconds to wait before a copy that failed is tried again, one after the other.
RETRY_AFTER_S = (1.0, 4.0, 15.0, 60.0, 120.0)
_NICE = 10
_BURST_NBYTES = 4 << 20


@dataclass(frozen=True)
class Mirror:
    """Where the second copy of all checkpoints goes, and how; what `mirror=` takes besides a URL.

    Attributes:
        url: Folder or fsspec URL, such as ``s3://bucket/run``; for one run.
        bytes_per_s: Bytes that may be sent in a second, None for no limit.
        read_back: Whether to read every byte again after it was sent, not only its length.
        streams: Files that are sent at once; each holds some tens of MB in memory.
    """

    url: str
    bytes_per_s: float | None = None
    read_back: bool = False
    streams: int = 2

    def __post_init__(self) -> None:
        if type(self.streams) is not int or self.streams < 1:
            raise ConfigError(f"streams={self.streams!r}: give a number of files, 1 or more")
        if self.bytes_per_s is not None and not self.bytes_per_s > 0:
            raise ConfigError(f"bytes_per_s={self.bytes_per_s!r}: give bytes a second, or None")


class MirrorThread:
    """Brings the mirror up to date each time that it is told to.

    Args:
        mirror: How.
        source: The root.
        target: The mirror.
        steps: Keeps a step from being removed while it is copied.
        keep: What the mirror keeps; None for everything.
        again: Whether a copy that failed is tried again before that is told.
        timeout_s: Longest wait inside a copy, in seconds.
        failed: Called with what went wrong for good, from the thread.
        check_lock: Makes sure that the root is still ours, before it is healed.
    """

    def __init__(
        self,
        mirror: Mirror,
        source: Root,
        target: Root,
        steps: StepsInUse,
        *,
        keep: KeepPolicy | None,
        again: bool,
        timeout_s: float,
        failed: Callable[[PlanariaError], None],
        check_lock: Callable[[], None],
    ) -> None:
        self._target = target
        self._again, self._failed = again, failed
        self._stop = threading.Event()
        limit = mirror.bytes_per_s
        bucket = None if limit is None else TokenBucket(limit, _BURST_NBYTES)
        limits = CopyLimits(bucket, mirror.streams, mirror.read_back, timeout_s, self._stop)
        self._replica = Replica(
            source, target, steps, keep=keep, limits=limits, copied=self._note_copied, warn=_warn
        )
        self._healing = Healing(target, source, steps, limits, check_lock, failed=_warn)
        self._changed = threading.Condition()
        self._told = self._closing = False
        self._rounds = 0  # that were begun
        self._waiting: dict[int, _Copy] = {}  # of committed steps, what is not copied yet
        self._error: tuple[int, PlanariaError] | None = None  # the round that it ended, and why
        self._ended = 0  # rounds that have ended
        self._thread = threading.Thread(target=self._run, name="planaria-mirror", daemon=True)
        self._thread.start()

    def committed(self, step: int, attempt: str) -> "_Copy":
        """Tells that a step was committed; it is copied soon."""
        self._replica.committed(step, attempt)
        with self._changed:
            copy = self._waiting[step] = _Copy(self, step, attempt, self._rounds)
        self.wake()
        return copy

    def heal(self, step: int) -> None:
        """A step had to be read from the mirror: what is damaged of it here is replaced, soon."""
        self._healing.add(step)

    def wake(self) -> None:
        """Looks for what is missing in the mirror, soon."""
        with self._changed:
            self._told = True
            self._changed.notify_all()

    def wait(self, copy: "_Copy", deadline: Deadline) -> None:
        """See `_Copy.wait`."""

        def settled() -> bool:
            idle = self._ended == self._rounds and not self._told
            return copy.there or (idle and self._ended > copy.since)

        with self._changed:
            if not self._changed.wait_for(settled, deadline.timeout()):
                raise deadline.error(f"the copy of step {copy.step} to {self._target.storage.url}")
            if copy.there:
                return
            error = self._error[1] if self._error and self._error[0] == self._ended else None
        if error is not None:
            raise StorageError(f"step {copy.step} was not copied: {error}") from error
        raise StorageError(
            f"step {copy.step} was not copied to {self._target.storage.url}: it had been removed, "
            "or saved again, before its turn came"
        )

    def close(self, timeout_s: float) -> StorageError | None:
        """Ends once all is copied, or after a time; says what is not.

        Args:
            timeout_s: How long to wait, in seconds.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            return None
        self._stop.set()
        self.wake()
        left = sorted({s for s, copy in self._waiting.items() if self._ended <= copy.since})
        many = "s" if len(left) > 1 else ""
        named = f"step{many} {', '.join(map(str, left))}" if left else "something"
        return StorageError(
            f"{named} could not be copied to {self._target.storage.url} within {timeout_s:.3g} s; "
            "the next run in this folder, with the same mirror, goes on with it"
        )

    def stop(self, timeout_s: float) -> bool:
        """Ends in the middle of whatever it copies; False if that took too long."""
        self._stop.set()
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # Inside

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            # On Linux, of this thread and of those that it starts.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            while self._next_round():
                error = self._round()
                if error is not None:
                    telemetry.event("checkpoint.mirror_failed", error=str(error))
                    self._failed(error)
                # After a round that failed, what is here yet may come to be copied in another.
                here = self._replica.committed_steps() if error is not None else set[int]()
                with self._changed:
                    self._ended = self._rounds
                    self._error = None if error is None else (self._rounds, error)
                    self._forget(here)
                    self._changed.notify_all()
        except StoppedError:
            pass
        finally:
            with contextlib.suppress(Exception):
                self._replica.close()

    def _next_round(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._told or self._closing)
            if not self._told or self._stop.is_set():
                return False
            self._told = False
            self._rounds += 1
            return True

    def _round(self) -> PlanariaError | None:
        """Brings the mirror up to date, if need be in several tries."""
        tries = 0
        while True:
            before = self._replica.progress
            try:
                self._healing.run()
                self._replica.sync()
                return None
            except Exception as error:
                if isinstance(error, StoppedError):
                    raise
                if self._replica.progress > before:
                    tries = 0
                if isinstance(error, RootError):
                    self._replica.close()  # looked at anew the next time
                hopeless = not self._again or _is_for_good(error)
                if hopeless or tries >= len(RETRY_AFTER_S):
                    return _told(error, self._target)
                telemetry.event("checkpoint.mirror_retry", error=str(error) or repr(error))
                if self._stop.wait(RETRY_AFTER_S[tries]):
                    raise StoppedError from error
                tries += 1

    def _note_copied(self, step: int, attempt: str) -> None:
        with self._changed:
            copy = self._waiting.get(step)
            if copy is not None and copy.attempt == attempt:
                copy.there = True
                del self._waiting[step]
                self._changed.notify_all()

    def _forget(self, here: set[int] | None) -> None:
        """After a round: what was not copied in it, and never will be, is not waited for."""
        for step, copy in list(self._waiting.items()):
            if copy.since < self._rounds and here is not None and step not in here:
                del self._waiting[step]


class _Copy:
    """The copy of one save, seen by whoever waits for it.

    Attributes:
        there: Whether it is in the mirror.
    """

    def __init__(self, thread: MirrorThread, step: int, attempt: str, since: int) -> None:
        self.step, self.attempt, self.since = step, attempt, since
        self.there = False
        self._thread = thread

    def wait(self, deadline: Deadline) -> None:
        """Returns once it is in the mirror.

        Raises:
            StorageError: It will not be, or not before the next save; says why.
            DeadlineError: It took longer than the deadline.
        """
        self._thread.wait(self, deadline)


def _warn(text: str) -> None:
    """Tells of what is wrong, and costs nothing that this run has saved."""
    with contextlib.suppress(Warning):  # warnings may be errors, here they must not
        warnings.warn(text, stacklevel=1)


def _is_for_good(error: Exception) -> bool:
    """Whether it would be no different the next time: the mirror is not ours to write to."""
    passing = isinstance(error, RootLockedError) or isinstance(error.__cause__, OSError)
    return isinstance(error, RootError | CorruptError) and not passing


def _told(error: Exception, target: Root) -> PlanariaError:
    """The error for the one who trains."""
    if isinstance(error, RootError):
        return error
    told = StorageError(
        f"the mirror {target.storage.url} could not be brought up to date: "
        f"{str(error) or repr(error)}; checkpoints are not affected, and it is tried again after "
        "the next save"
    )
    told.__cause__ = error
    return told


class ListedCopy:
    """The copy of one save, seen from a rank that does not copy itself: by looking there.

    Args:
        target: The mirror.
        step: The step.
        attempt: By which save.
    """

    def __init__(self, target: Root, step: int, attempt: str) -> None:
        self._target, self._step, self._attempt = target, step, attempt

    @property
    def there(self) -> bool:
        """Whether the mirror holds this attempt at the step."""
        with contextlib.suppress(PlanariaError, OSError):
            return self._target.manifest(self._step).attempt == self._attempt
        return False

    def wait(self, deadline: Deadline) -> None:
        """Returns once the mirror holds this attempt at the step.

        Raises:
            DeadlineError: It took longer than the deadline.
        """
        while not self.there:
            deadline.check(f"the copy of step {self._step} to {self._target.storage.url}")
            time.sleep(min(0.5, deadline.remaining()))
