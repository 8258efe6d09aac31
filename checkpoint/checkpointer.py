"""The checkpointer: what a training loop holds."""

import atexit
import os
import random
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch

from planaria import errors, telemetry
from planaria.checkpoint import points
from planaria.checkpoint.capture import gate, kernels
from planaria.checkpoint.capture.audit import Audit
from planaria.checkpoint.capture.pool import BufferPool, fair_limit
from planaria.checkpoint.capture.sources import Source
from planaria.checkpoint.handle import SaveHandle
from planaria.checkpoint.layout.transforms import Transform
from planaria.checkpoint.pipeline import RETRY_AFTER_S, Pipeline, SaveJob
from planaria.checkpoint.policies import (
    FailurePolicy,
    KeepPolicy,
    SavePolicy,
    keep_policy,
    save_policy,
)
from planaria.checkpoint.restore import RestoreReport, restore
from planaria.checkpoint.run_info import encode_metrics, run_info
from planaria.checkpoint.state.entries import Collector
from planaria.checkpoint.state.stateset import StateSet
from planaria.checkpoint.stop import StopSignals
from planaria.checkpoint.storage.base import Storage, open_storage
from planaria.checkpoint.storage.lock import RootLock
from planaria.checkpoint.storage.root import Root
from planaria.core.collective import Ranks
from planaria.core.deadline import Deadline
from planaria.core.points import point
from planaria.errors import (
    ConfigError,
    DeadlineError,
    PlanariaError,
    RootError,
    SaveFailedError,
    StateError,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CHUNK_NBYTES = 4 << 20


class Checkpointer:
    """Saves training state lazily while training goes on, and restores it at any topology.

    Every rank makes one, with the same arguments, after torch.distributed is initialised (if it is
    used). Parameters and optimizer state are copied in the background while the next forward and
    backward run; any optimizer's step waits until what it would change has been copied. Code that
    writes parameters otherwise calls `before_update` first.

    Args:
        path: Folder, or fsspec URL, that holds the checkpoints of one run.
        state: Name -> module, optimizer, scheduler or other object with a state_dict, or tree of
            tensors and values. Random number generators are always included, as ``rng``.
        every: Save when `step` is a multiple of this, or what a policy says; None to save only by
            `save`.
        keep: How many of the newest steps to keep, or a policy; None keeps all.
        on_failure: What a failed save does. ``"fatal"``: it is raised by the next call.
            ``"retry"``: the same, but failed writes are tried again first. ``"degrade"``: tried
            again, then a warning, and training goes on.
        pool_bytes: Upper bound of the memory that captures in the background use on this rank, next
            to the copies that are made at the call. By default enough for the state, up to a
            quarter of what the machine has available, over its ranks.
        audit: Check every captured byte against unnoticed writes, instead of a sample; slow, for
            tests and for hunting a bug.
        process_group: Ranks that save together; all by default.
        timeout_s: Longest wait for other ranks, for storage and for a free buffer, in seconds.

    Raises:
        ConfigError: An argument makes no sense.
        RootError: The folder is not ours, cannot be written, or is in use by another job.
    """

    def __init__(
        self,
        path: "str | os.PathLike[str] | Storage",
        state: Mapping[str, Any],
        *,
        every: int | SavePolicy | None = None,
        keep: int | KeepPolicy | None = None,
        on_failure: FailurePolicy = "retry",
        pool_bytes: int | None = None,
        audit: bool = False,
        process_group: "ProcessGroup | None" = None,
        timeout_s: float = 1800.0,
    ) -> None:
        if on_failure not in ("fatal", "retry", "degrade"):
            raise ConfigError(f"on_failure={on_failure!r}: use 'fatal', 'retry' or 'degrade'")
        if pool_bytes is not None and pool_bytes < CHUNK_NBYTES:
            raise ConfigError(f"pool_bytes={pool_bytes}: give at least {CHUNK_NBYTES} (one chunk)")
        self._due, keep = save_policy(every), keep_policy(keep)
        self._state, self._root = StateSet(state), Root(open_storage(path))
        self._on_failure, self._audit, self._timeout_s = on_failure, audit, timeout_s
        self._pending: list[SaveHandle] = []
        self._failures: list[PlanariaError] = []
        self._last_saved: int | None = None
        self._restored: int | None = None  # until the first commit after it, on rank 0
        self._goes_on = False  # whether what the root holds is this run's own past
        self._stopping = False
        self._stop_vote: Callable[[], list[int]] | None = None
        self._closed, self._pid = False, os.getpid()
        self._lock: RootLock | None = None
        self._ranks = Ranks(process_group, timeout_s=timeout_s)
        self._capture_ranks = Ranks(process_group, timeout_s=timeout_s)
        self._commit_ranks = Ranks(process_group, timeout_s=timeout_s)
        self._newest_at_open, held, pinned = self._claim_root()
        try:
            self._pool = self._make_pool(pool_bytes, held, pinned)
            kernels.warm()
        except BaseException:
            if self._lock is not None:
                self._lock.release()
            raise
        self._pipeline = Pipeline(
            self._root,
            self._lock,
            self._capture_ranks,
            self._commit_ranks,
            self._pool,
            keep=keep,
            retries=0 if on_failure == "fatal" else len(RETRY_AFTER_S),
            timeout_s=timeout_s,
            rewound_to=lambda: self._restored,
            on_done=self._note_outcome,
        )
        self._signals = StopSignals()
        gate.close_gate_for(self)
        self._atexit = _close_at_exit(self)

    # Saving

    def step(self, n: int, metrics: Mapping[str, Any] | None = None) -> SaveHandle | None:
        """Tells that `n` steps are done; saves if that is due. Returns at once.

        Args:
            n: Number of steps done, the same on all ranks: the state is that before step `n`.
            metrics: Values to keep with the checkpoint, such as a validation loss.

        Returns:
            The save, if there is one.

        Raises:
            SaveFailedError: An earlier save failed (unless ``on_failure="degrade"``).
            StateError: The state cannot be saved.
            CollectiveError: Another rank is gone.
        """
        self._check_open()
        # First of all, so that ranks still agree where one of them is not told of a failure.
        self._agree_to_stop()
        self._raise_failures()
        due = self._stopping or (self._due is not None and self._due.due(n))
        return self.save(n, metrics) if due and self._last_saved != n else None

    def save(self, n: int, metrics: Mapping[str, Any] | None = None) -> SaveHandle:
        """Saves now, whatever the policy says; all ranks must call it. Returns at once.

        Args:
            n: Number of steps done.
            metrics: Values to keep with the checkpoint.

        Returns:
            A handle to wait for the capture or the commit.

        Raises:
            SaveFailedError: An earlier save failed (unless ``on_failure="degrade"``).
            StateError: The state cannot be saved.
        """
        self._check_open()
        self._raise_failures()
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ConfigError(f"step {n!r}: give the number of steps done, 0 or more")
        self._check_not_foreign_past(n)
        with telemetry.span("checkpoint.call", step=n):
            # Two attempts at one step must not overlap.
            self._wait_for([h for h in self._pending if h.step == n])
            self._pending = [h for h in self._pending if not h._done.is_set()]
            return self._start(n, metrics)

    def _start(self, n: int, metrics: Mapping[str, Any] | None) -> SaveHandle:
        handle = SaveHandle(n, self._timeout_s)
        job = SaveJob(handle, {}, {}, None, {}, {}, run_info())
        try:
            point(points.CALL, step=n)
            job.metrics = encode_metrics(metrics)
            self._fill(job, self._state.collect())
        except Exception as error:
            job.error, job.entries = error, {}
        # The caller's mistake is raised here; other ranks learn of it in the background.
        mistake = job.error if isinstance(job.error, StateError | ConfigError) else None
        handle._reported = mistake is not None
        self._pending.append(handle)
        self._last_saved = n
        self._pipeline.submit(job)
        if mistake is not None:
            raise mistake
        point(points.CALLED, step=n)
        return handle

    def _fill(self, job: SaveJob, collected: Collector) -> None:
        """Copies what may change at any time, and remembers what the rest looks like."""
        lazy: dict[str, Source] = {}
        for entry in collected.tensors.values():
            device = entry.local.device.type
            if entry.lazy and device in ("cpu", "cuda"):
                lazy[entry.name] = Source(entry.local)
            else:
                copy = entry.local.detach().clone(memory_format=torch.contiguous_format)
                entry.local = copy if device in ("cpu", "cuda") else copy.cpu()
        for device in {e.local.device for e in collected.tensors.values() if e.local.is_cuda}:
            job.ready[device] = torch.cuda.current_stream(device).record_event()
        job.entries, job.objects = collected.tensors, collected.objects
        job.audit = Audit(lazy, everything=self._audit, rng=random.Random(os.urandom(8)))

    def before_update(self) -> None:
        """Returns once the state may be changed: everything queued has been captured.

        Optimizers call this by themselves; other code that writes parameters must.

        Raises:
            DeadlineError: The capture is stuck (storage too slow for the pool, or a lost rank).
        """
        waiting = [h for h in self._pending if not h.captured]
        if waiting and os.getpid() == self._pid:  # a forked child has the memory of its own
            with telemetry.span("checkpoint.gate", step=waiting[-1].step):
                for handle in waiting:
                    handle.wait_captured()

    # Restoring

    def restore(
        self,
        step: int | None = None,
        *,
        only: Collection[str] | str | None = None,
        strict: bool = True,
        transforms: Sequence[Transform] = (),
    ) -> RestoreReport | None:
        """Loads the newest step that verifies, or a given one, into the state, in place.

        Any number of ranks and any layout will do. All ranks must call it. Nothing is changed
        unless every rank can load all it needs.

        Args:
            step: Step to load; by default the newest good one.
            only: Names to load: whole names, prefixes (``"model"``) or patterns with ``*``.
            strict: Raise where names, shapes or dtypes differ; else load what matches.
            transforms: Map the checkpoint's names and shapes to the state's, in order.

        Returns:
            What was done; None if nothing is committed.

        Raises:
            MismatchError: Checkpoint and state differ; lists how.
            CorruptError: No committed step could be read whole.
            NotCommittedError: The step asked for does not exist.
            FormatError: A newer version wrote the step.
        """
        self._check_open()
        # What is still under way may be what is asked for, or of a past that is about to be left.
        self._wait_for(self._pending)
        with telemetry.span("checkpoint.restore") as span:
            report = restore(
                self._root,
                self._state,
                self._ranks,
                step=step,
                only=only,
                strict=strict,
                transforms=transforms,
                keep_nbytes=self._pool.limit * self._pool.buffer_nbytes,
            )
            if report is not None:
                span.set(step=report.step, bytes=report.nbytes)
                self._restored, self._last_saved = report.step, None
                self._goes_on = True
        return report

    # Looking and stopping

    @property
    def should_stop(self) -> bool:
        """Whether all ranks have agreed to stop after this step; the last save is under way."""
        return self._stopping

    def request_stop(self) -> None:
        """Asks all ranks to stop at one of the next step boundaries, as a signal does."""
        self._signals.requested = True

    def all_steps(self) -> list[int]:
        """Committed steps, ascending."""
        return self._root.steps()

    def latest_step(self) -> int | None:
        """The newest committed step, None if there is none."""
        steps = self._root.steps()
        return steps[-1] if steps else None

    # Ending

    def close(self) -> None:
        """Waits for the saves under way and ends everything; further calls do nothing.

        Raises:
            SaveFailedError: A save failed (unless ``on_failure="degrade"``).
        """
        vote, self._stop_vote = self._stop_vote, None
        try:
            if vote is not None and not self._closed:
                vote()  # every rank has cast it; a group must not go with it under way
        finally:
            self._close(self._timeout_s)
        self._raise_failures()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        # Another rank may be gone with what it owed us: wait a little, and do not hide the cause.
        self._close_and_warn()

    def _close_and_warn(self) -> None:
        """Closes where nobody can be told by an error."""
        if self._closed:
            return
        self._close(min(self._timeout_s, 60.0))
        for failure in self._failures:
            warnings.warn(str(failure), stacklevel=3)

    def _close(self, timeout_s: float) -> None:
        if self._closed or os.getpid() != self._pid:  # a forked child has a copy, but no threads
            return
        self._closed = True
        atexit.unregister(self._atexit)
        gate.forget(self)
        self._signals.close()
        ended = self._pipeline.close(timeout_s)
        for handle in self._pending:
            if not handle._done.is_set():
                error = DeadlineError(f"not through within {timeout_s:g} s when closing")
                handle._finish(error)
                self._failures.append(SaveFailedError(f"step {handle.step}: {error}"))
        if self._lock is not None:
            self._lock.release()
        if ended:
            for ranks in (self._ranks, self._capture_ranks, self._commit_ranks):
                ranks.close()

    # Inside

    def _claim_root(self) -> tuple[int | None, int, bool]:
        """Checks the state on all ranks, and the root on rank 0, which locks it.

        Returns:
            The newest committed step, the bytes of state here, and whether any lies on a GPU.
        """
        error: Exception | None = None
        newest, held, pinned = None, 0, False
        try:
            entries = self._state.collect().tensors.values()
            held = sum(e.nbytes for e in entries if e.alias_of is None)
            pinned = any(e.local.is_cuda for e in entries)
            if self._ranks.rank == 0:
                self._root.claim()
                self._lock = RootLock(self._root.storage)
                newest = max(self._root.steps(), default=None)
        except OSError as e:
            error = RootError(
                f"cannot use {self._root.storage.url}: {e}; give a folder that can be read and "
                "written, on a disk with room"
            )
            error.__cause__ = e
        except Exception as e:
            error = e
        said = None if error is None else [type(error).__name__, str(error) or repr(error)]
        outcomes = self._ranks.all_gather({"error": said, "newest": newest})
        failed = [(r, *o["error"]) for r, o in enumerate(outcomes) if o["error"] is not None]
        if failed:
            if self._lock is not None:
                self._lock.release()
            for ranks in (self._ranks, self._capture_ranks, self._commit_ranks):
                ranks.close()
            rank, kind, message = failed[0]
            raise error or getattr(errors, kind, RootError)(f"rank {rank}: {message}")
        return outcomes[0]["newest"], held, pinned

    def _make_pool(self, limit: int | None, held: int, pinned: bool) -> BufferPool:
        optimizers_to_come = held * 2  # two slots a parameter is what the usual ones will add
        expected = (held + optimizers_to_come) // self._ranks.size + CHUNK_NBYTES
        if limit is None:
            limit = fair_limit(3 * held + CHUNK_NBYTES)
        pool = BufferPool(limit, CHUNK_NBYTES, pinned=pinned)
        pool.reserve(min(expected, limit))
        return pool

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("this checkpointer is closed; make a new one")

    def _wait_for(self, handles: Sequence[SaveHandle]) -> None:
        deadline = Deadline(self._timeout_s)
        for handle in handles:
            deadline.wait(handle._done, f"the save of step {handle.step}")

    def _raise_failures(self) -> None:
        # One by one: the writing thread may add another meanwhile.
        failures = [self._failures.pop(0) for _ in range(len(self._failures))]
        if failures:
            for other in failures[1:]:
                failures[0].add_note(f"and: {other}")
            raise failures[0]

    def _note_outcome(self, job: SaveJob) -> None:
        """Called by the writing thread when a save has ended."""
        error = job.handle.error
        if error is None:
            self._restored = None
        if error is None or job.handle._reported:
            return
        telemetry.event("checkpoint.failed", step=job.step, error=str(error))
        if self._on_failure != "degrade":
            self._failures.append(error)
            return
        try:
            warnings.warn(f"{error}; training goes on without it", stacklevel=1)
        except Warning:  # this run wants warnings to be errors
            self._failures.append(error)

    def _agree_to_stop(self) -> None:
        """Asks whether any rank was told to stop, one step late so that nobody waits for it."""
        if self._stopping:
            return
        if self._ranks.size == 1:
            self._stopping = self._signals.requested
            return
        if self._stop_vote is not None:
            self._stopping = bool(self._stop_vote()[0])
        self._stop_vote = None
        if not self._stopping:
            self._stop_vote = self._ranks.max_async([int(self._signals.requested)])

    def _check_not_foreign_past(self, n: int) -> None:
        newest = self._newest_at_open
        if not self._goes_on and newest is not None and n <= newest:
            raise RootError(
                f"{self._root.storage.url} already holds steps up to {newest}, which this run has "
                f"not restored; saving step {n} would mix two runs. Call restore() first, or give "
                "a new folder"
            )


def _close_at_exit(checkpointer: Checkpointer) -> Callable[[], None]:
    """Finishes the saves of a checkpointer that was not closed, when the process ends."""
    ref = weakref.ref(checkpointer)

    def close() -> None:
        alive = ref()
        if alive is not None:
            alive._close_and_warn()

    atexit.register(close)
    return close
