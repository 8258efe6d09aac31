"""The checkpointer: what a training loop holds."""

import atexit
import os
import random
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch

from planaria import telemetry
from planaria.checkpoint import points
from planaria.checkpoint.at_exit import call_at_exit
from planaria.checkpoint.capture import gate, kernels
from planaria.checkpoint.capture.audit import Audit
from planaria.checkpoint.capture.sources import Source, Sources
from planaria.checkpoint.decide import Decisions
from planaria.checkpoint.format.manifest import Manifest
from planaria.checkpoint.handle import SaveHandle
from planaria.checkpoint.layout.transforms import Transform
from planaria.checkpoint.opening import Options, claim, is_positive, make_pool
from planaria.checkpoint.persist import RETRY_AFTER_S
from planaria.checkpoint.pipeline import Pipeline
from planaria.checkpoint.policies import (
    FailurePolicy,
    KeepPolicy,
    SavePolicy,
)
from planaria.checkpoint.restore import RestoreReport, restore
from planaria.checkpoint.run_info import encode_metrics, run_info
from planaria.checkpoint.save_job import SaveJob
from planaria.checkpoint.state.entries import TensorEntry
from planaria.checkpoint.state.recall import Recalled
from planaria.checkpoint.state.stateset import Collected
from planaria.checkpoint.stop import StopSignals
from planaria.checkpoint.storage.base import Storage
from planaria.checkpoint.storage.mirror import Mirror
from planaria.core.collective import Ranks
from planaria.core.deadline import Deadline
from planaria.core.garbage import no_collection
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
        every: Save when `step` is a multiple of this, or what a policy says (`Every`,
            `EverySeconds`, `OnSignal`, `Adaptive`, joined by ``|``); None to save only by `save`.
        keep: How many of the newest steps to keep, or a policy (`KeepLast`, `KeepEvery`,
            `KeepBest`, joined by ``|``); None keeps all. The newest step that verifies is kept in
            any case.
        on_failure: What a failed save does. ``"fatal"``: it is raised by the next call.
            ``"retry"``: the same, but failed writes are tried again first. ``"degrade"``: tried
            again, then a warning, and training goes on.
        mirror: URL (or `Mirror`) of a second copy, which rank 0 keeps in the background. It is
            restored from where the first is damaged or gone; its failures follow `on_failure`, too.
        pool_bytes: Upper bound of the memory that captures in the background use on this rank, next
            to the copies that are made at the call. By default enough for the state, up to a
            quarter of what the machine has available, over its ranks.
        dedup: Write only what has changed since the last save; for the rest refer to the files of
            the steps that wrote it, which are kept as long as they are needed. Every byte is
            hashed. In local folders only.
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
        mirror: str | Mirror | None = None,
        pool_bytes: int | None = None,
        dedup: bool = False,
        audit: bool = False,
        process_group: "ProcessGroup | None" = None,
        timeout_s: float = 1800.0,
    ) -> None:
        self._pid = os.getpid()
        self._timeout_s = timeout_s if is_positive(timeout_s) else 1800.0
        groups = [Ranks(process_group, timeout_s=self._timeout_s) for _ in range(3)]
        self._ranks, self._capture_ranks, self._commit_ranks = groups
        options: Options | None = None
        error: Exception | None = None
        try:
            options = Options.check(
                path,
                state,
                every=every,
                keep=keep,
                on_failure=on_failure,
                mirror=mirror,
                pool_bytes=pool_bytes,
                dedup=dedup,
                timeout_s=timeout_s,
            )
        except Exception as e:  # told to the other ranks, who wait
            error = e
        due = None if options is None else options.due
        self._decisions = Decisions(due, self._ranks, lambda: self._signals.requested)
        claimed = claim(options, error, groups, self._decisions)
        assert options is not None
        self._root, self._state, self._mirror = options.root, options.state, options.mirror
        self._lock, self._newest_at_open = claimed.lock, claimed.newest
        self._on_failure, self._audit = on_failure, audit
        self._pending: list[SaveHandle] = []
        self._failures: list[PlanariaError] = []
        self._last_saved: int | None = None
        self._restored: int | None = None  # until the first commit after it, on rank 0
        self._goes_on = False  # whether what the root holds is this run's own past
        self._closed = False
        try:
            self._pool = make_pool(pool_bytes, claimed, self._ranks.size)
            kernels.warm()
        except BaseException:
            self._decisions.release()
            if self._lock is not None:
                self._lock.release()
            raise
        self._pipeline = Pipeline(
            self._root,
            self._lock,
            self._capture_ranks,
            self._commit_ranks,
            self._pool,
            keep=options.keep,
            dedup=dedup,
            retries=0 if on_failure == "fatal" else len(RETRY_AFTER_S),
            timeout_s=self._timeout_s,
            rewound_to=self._rewound_to,
            on_done=self._note_outcome,
        )
        if self._lock is not None:
            self._mirror.start(self._pipeline.steps, keep=options.keep, again=on_failure != "fatal",
                               timeout_s=self._timeout_s, failed=self._tell,
                               check_lock=self._lock.check)  # fmt: skip
        self._signals = StopSignals()
        gate.close_gate_for(self)
        self._atexit = call_at_exit(self._close_and_warn)

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
        _check_step(n)
        # First of all, so that ranks still agree where one of them is not told of a failure.
        due = self._decisions.save_due(n)
        telemetry.event("checkpoint.step", step=n)
        if due and self._last_saved != n:
            return self.save(n, metrics)
        _raise(self._take_failures())
        return None

    def save(self, n: int, metrics: Mapping[str, Any] | None = None) -> SaveHandle:
        """Saves now, whatever the policy says; all ranks must call it. Returns at once.

        Args:
            n: Number of steps done.
            metrics: Values to keep with the checkpoint.

        Returns:
            A handle to wait for the capture or the commit.

        Raises:
            SaveFailedError: An earlier save failed (unless ``on_failure="degrade"``); this one is
                under way all the same.
            StateError: The state cannot be saved.
        """
        self._check_open()
        _check_step(n)
        self._check_not_foreign_past(n)
        failures = self._take_failures()
        with telemetry.span("checkpoint.call", step=n), self._decisions.blocked():
            # Two attempts at one step must not overlap.
            self._wait_for([h for h in self._pending if h.step == n])
            self._pending = [h for h in self._pending if not h._done.is_set()]
            handle = self._start(n, metrics)
        # Ranks hear of a failure at different calls: each of them must have begun the same saves.
        _raise(failures)
        return handle

    def _start(self, n: int, metrics: Mapping[str, Any] | None) -> SaveHandle:
        handle = SaveHandle(n, self._timeout_s)
        job = SaveJob(handle, {}, {}, None, {}, {}, run_info())
        try:
            point(points.CALL, step=n)
            job.metrics = encode_metrics(metrics)
            with no_collection():
                self._fill(job, self._state.collect())
        except Exception as error:
            job.error, job.entries = error, {}
        # The caller's mistake is raised here; other ranks learn of it in the background.
        mistake = job.error if isinstance(job.error, StateError | ConfigError) else None
        handle._reported = mistake is not None
        self._pending.append(handle)
        self._last_saved = n
        self._decisions.saving(handle)
        self._pipeline.submit(job)
        if mistake is not None:
            raise mistake
        point(points.CALLED, step=n)
        return handle

    def _fill(self, job: SaveJob, collected: Collected) -> None:
        """Copies what may change at any time, and remembers what the rest looks like."""
        job.entries, job.objects = collected.tensors, collected.objects
        if isinstance(collected.tensors, Recalled):
            collected.tensors.copy_eager()
            devices, watched = collected.tensors.layout.devices, collected.tensors
        else:
            devices, watched = _copy_eager(collected.tensors)
        for device in devices:
            job.ready[device] = torch.cuda.current_stream(device).record_event()
        job.audit = Audit(watched, everything=self._audit, rng=random.Random(os.urandom(8)))

    def before_update(self) -> None:
        """Returns once the state may be changed: everything queued has been captured.

        Optimizers call this by themselves; other code that writes parameters must.

        Raises:
            DeadlineError: The capture is stuck (storage too slow for the pool, or a lost rank).
        """
        waiting = [h for h in self._pending if not h.captured]
        if waiting and os.getpid() == self._pid:  # a forked child has the memory of its own
            step = waiting[-1].step
            with telemetry.span("checkpoint.gate", step=step), self._decisions.blocked():
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
        if step is not None:
            _check_step(step)
        with telemetry.span("checkpoint.restore") as span:
            report = restore(
                self._root,
                self._state,
                self._ranks,
                step=step,
                only=only,
                strict=strict,
                transforms=transforms,
                pool=self._pool,
                mirror=self._mirror,
            )
            if report is not None:
                span.set(step=report.step, bytes=report.nbytes)
                self._restored, self._last_saved = report.step, None
                self._goes_on = True
                self._mirror.restored(report)
                self._pipeline.restored(report)
        return report

    # Looking and stopping

    @property
    def should_stop(self) -> bool:
        """Whether all ranks have agreed to stop after this step; the last save is under way."""
        return self._decisions.stopping

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
        try:
            if not self._closed:
                self._decisions.close()  # a group must not go with a vote under way
        finally:
            with telemetry.span("checkpoint.close"):
                self._close(self._timeout_s)
        _raise(self._take_failures())

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
        self._decisions.release()
        self._signals.close()
        deadline = Deadline(timeout_s)
        ended = self._pipeline.close(timeout_s)
        for handle in self._pending:
            if not handle._done.is_set():
                error = DeadlineError(f"not through within {timeout_s:g} s when closing")
                handle._finish(error)
                self._failures.append(SaveFailedError(f"step {handle.step}: {error}"))
        if (left := self._mirror.close(deadline.remaining())) is not None:
            self._tell(left)
        if self._lock is not None:
            self._lock.release()
        if ended:
            for ranks in (self._ranks, self._capture_ranks, self._commit_ranks):
                ranks.close()

    # Inside

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("this checkpointer is closed; make a new one")
        if os.getpid() != self._pid:
            raise ConfigError(
                f"this checkpointer was made in process {self._pid}, of which this one is a fork; "
                "only that one can save and restore"
            )

    def _wait_for(self, handles: Sequence[SaveHandle]) -> None:
        deadline = Deadline(self._timeout_s)
        for handle in handles:
            deadline.wait(handle._done, f"the save of step {handle.step}")

    def _take_failures(self) -> list[PlanariaError]:
        # One by one: the writing thread may add another meanwhile.
        return [self._failures.pop(0) for _ in range(len(self._failures))]

    def _note_outcome(self, job: SaveJob) -> None:
        """Called by the writing thread when a save has ended."""
        self._decisions.saved(job.handle)
        error = job.handle.error
        if error is None:
            self._restored = None
            self._mirror.committed(job.handle, job.attempt)
        elif not job.handle._reported:
            telemetry.event("checkpoint.failed", step=job.step, error=str(error))
            self._tell(error)

    def _tell(self, error: PlanariaError) -> None:
        """A failure in the background surfaces as the failure policy says."""
        if self._on_failure != "degrade":
            self._failures.append(error)
            return
        try:
            warnings.warn(f"{error}; training goes on without it", stacklevel=1)
        except Warning:  # this run wants warnings to be errors
            self._failures.append(error)

    def _check_not_foreign_past(self, n: int) -> None:
        newest = self._newest_at_open
        if not self._goes_on and newest is not None and n <= newest:
            raise RootError(
                f"{self._root.storage.url} already holds steps up to {newest}, which this run has "
                f"not restored; saving step {n} would mix two runs. Call restore() first, or give "
                "a new folder"
            )

    def _rewound_to(self, manifest: Manifest) -> int | None:
        """At the first commit after a restore: the step it left later ones behind for."""
        if self._restored is not None:
            self._mirror.rewound(self._restored, manifest)
        return self._restored


def _copy_eager(entries: Mapping[str, TensorEntry]) -> tuple[set[torch.device], Sources]:
    """Copies what may change at any time; gives the CUDA devices, and what is captured later."""
    devices = {e.local.device for e in entries.values() if e.local.is_cuda}
    lazy: dict[str, Source] = {}
    for entry in entries.values():
        device = entry.local.device.type
        if entry.lazy and device in ("cpu", "cuda"):
            lazy[entry.name] = entry.source
        else:
            copy = entry.local.detach().clone(memory_format=torch.contiguous_format)
            entry.replace(copy if device in ("cpu", "cuda") else copy.cpu())
    return devices, Sources(lazy)


def _raise(failures: Sequence[PlanariaError]) -> None:
    if failures:
        for other in failures[1:]:
            failures[0].add_note(f"and: {other}")
        raise failures[0]


def _check_step(n: object) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise ConfigError(f"step {n!r}: give the number of steps done, 0 or more")
