"""The checkpointer: what a training loop holds."""

import atexit
import os
import random
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import torch

from planaria import telemetry
from planaria.checkpoint import points
from planaria.checkpoint.at_exit import call_at_exit
from planaria.checkpoint.capture import gate, kernels
from planaria.checkpoint.capture.audit import Audit
from planaria.checkpoint.capture.eager import copy_eager
from planaria.checkpoint.decide import Decisions
from planaria.checkpoint.failures import Failures, raise_first
from planaria.checkpoint.format.manifest import Manifest
from planaria.checkpoint.handle import SaveHandle
from planaria.checkpoint.layout.transforms import Transform
from planaria.checkpoint.memory.restoring import find_steps
from planaria.checkpoint.memory.save import MemorySave
from planaria.checkpoint.memory.saving import open_memory
from planaria.checkpoint.memory.tier import MemoryTier
from planaria.checkpoint.opening import Options, claim, is_positive, make_pool
from planaria.checkpoint.persist import RETRY_AFTER_S
from planaria.checkpoint.pipeline import Pipeline
from planaria.checkpoint.policies import FailurePolicy, KeepPolicy, SavePolicy
from planaria.checkpoint.restore import RestoreReport, restore
from planaria.checkpoint.run_info import encode_metrics, run_info
from planaria.checkpoint.save_job import SaveJob
from planaria.checkpoint.state.recall import Recalled
from planaria.checkpoint.state.stateset import Collected
from planaria.checkpoint.stop import StopSignals
from planaria.checkpoint.storage.base import Storage
from planaria.checkpoint.storage.mirror import Mirror
from planaria.core.collective import Ranks
from planaria.core.deadline import Deadline
from planaria.core.garbage import no_collection
from planaria.core.points import point
from planaria.errors import ConfigError, DeadlineError, RootError, SaveFailedError, StateError

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
        memory: Also keep snapshots in the memory of the job's nodes, as often as each step: what a
            restart goes on from without touching storage, while no more nodes are lost than it was
            made for. Their failures are warned of, or raised with ``on_failure="fatal"``.
        writer: Who writes checkpoints to storage: the ranks, or with ``"snapshot"`` the snapshot
            processes, so that ranks that die meanwhile cost no checkpoint. Local folders only.
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
        memory: MemoryTier | None = None,
        writer: Literal["trainer", "snapshot"] = "trainer",
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
                memory=memory,
                writer=writer,
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
        self._audit, self._by_nodes = audit, writer == "snapshot"
        self._pending: list[SaveHandle] = []
        self._failures = Failures(on_failure)
        self._last_saved: int | None = None
        self._rewound = False  # until the first checkpoint after it, on all ranks
        self._restored: int | None = None  # until the first commit after it, on rank 0
        self._goes_on = False  # whether what the root holds is this run's own past
        self._closed = False
        try:
            self._pool = make_pool(pool_bytes, claimed, self._ranks.size)
            kernels.warm()
            self._memory = open_memory(options.memory, claimed.root_id, self._root.storage.url,
                                       process_group, self._timeout_s, self._failures)  # fmt: skip
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
            memory=self._memory,
            rewound_to=self._rewound_to,
            on_done=self._note_outcome,
        )
        if self._lock is not None:
            self._mirror.start(self._pipeline.steps, keep=options.keep, again=on_failure != "fatal",
                               timeout_s=self._timeout_s, failed=self._failures.tell,
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
            The save, if there is one; for a snapshot in memory alone see `last_snapshot`.

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
        durable = (due or self._rewound) and self._last_saved != n
        in_memory = self._memory is not None and self._memory.due(n)
        if durable or in_memory:
            handle = self._save(n, metrics, durable=durable, in_memory=in_memory)
            return handle if durable else None
        raise_first(self._failures.take())
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
        return self._save(n, metrics, durable=True, in_memory=self._memory is not None)

    def _save(
        self, n: int, metrics: Mapping[str, Any] | None, *, durable: bool, in_memory: bool
    ) -> SaveHandle:
        self._check_not_foreign_past(n)
        failures = self._failures.take()
        with telemetry.span("checkpoint.call", step=n), self._decisions.blocked():
            # Two attempts at one step must not overlap.
            self._wait_for([h for h in self._pending if h.step == n])
            self._pending = [h for h in self._pending if not h._done.is_set()]
            handle = self._start(n, metrics, durable=durable, in_memory=in_memory)
        # Ranks hear of a failure at different calls: each of them must have begun the same saves.
        raise_first(failures)
        return handle

    def _start(
        self, n: int, metrics: Mapping[str, Any] | None, *, durable: bool, in_memory: bool
    ) -> SaveHandle:
        handle = SaveHandle(n, self._timeout_s)
        job = SaveJob(handle, {}, {}, None, {}, {}, run_info(), durable=durable)
        if in_memory:
            handle._memory = SaveHandle(n, self._timeout_s) if durable else handle
            job.memory = MemorySave(handle._memory)
            # What was rewound is set aside with the commit: that is the ranks' own.
            if durable and self._by_nodes and not self._rewound:
                job.memory.by_nodes, job.memory.persist = True, self._root.storage.local
        try:
            point(points.CALL, step=n)
            job.metrics = encode_metrics(metrics)
            with no_collection():
                self._fill(job, self._state.collect())
        except Exception as error:
            job.error, job.entries = error, {}
        # The caller's mistake is raised here; other ranks learn of it in the background.
        mistake = job.error if isinstance(job.error, StateError | ConfigError) else None
        for each in {handle, handle._memory or handle}:
            each._reported = mistake is not None
            self._pending.append(each)
        if self._memory is not None and in_memory:
            self._memory.last = handle._memory
        if durable:
            self._last_saved, self._rewound = n, False
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
            devices, watched = copy_eager(collected.tensors)
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
            memory = None if self._memory is None else find_steps(self._memory, self._ranks)
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
                memory=memory,
            )
            if report is not None:
                span.set(step=report.step, bytes=report.nbytes, tier=report.tier,
                         damaged=[step for step, _ in report.fell_back_from])  # fmt: skip
                self._restored, self._last_saved = report.step, None
                if self._memory is not None:
                    self._memory.last = None
                # What lies ahead in the root must be set aside before more of it is in memory.
                self._rewound = step is not None or bool(report.fell_back_from or self._mirror.root)
                self._goes_on = True
                self._mirror.restored(report)
                self._pipeline.restored(report)
        # A node in the place of a lost one gets its share now, not when the next snapshot is due.
        whole = only is None and strict and not transforms and not self._rewound
        if memory is not None and report is not None and whole and memory.exposes(report):
            self._save(report.step, None, durable=False, in_memory=True).wait_captured()
        return report

    # Looking and stopping

    @property
    def last_snapshot(self) -> SaveHandle | None:
        """The newest snapshot in memory that was begun, None if there was none."""
        return None if self._memory is None else self._memory.last

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
        return max(self._root.steps(), default=None)

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
                self._close(self._timeout_s, part=True)
        raise_first(self._failures.take())

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
        for failure in self._failures.take():
            warnings.warn(str(failure), stacklevel=3)

    def _close(self, timeout_s: float, *, part: bool = False) -> None:
        if self._closed or os.getpid() != self._pid:  # a forked child has a copy, but no threads
            return
        self._closed = True
        atexit.unregister(self._atexit)
        gate.forget(self)
        self._decisions.release()
        self._signals.close()
        deadline = Deadline(timeout_s)
        ended = self._pipeline.close(timeout_s)
        if self._memory is not None:
            ended = self._memory.close(deadline.remaining(), part=part) and ended
        for handle in self._pending:
            if not handle._done.is_set():
                error = DeadlineError(f"not through within {timeout_s:g} s when closing")
                handle._finish(error)
                self._failures.add(SaveFailedError(f"step {handle.step}: {error}"))
        if (left := self._mirror.close(deadline.remaining())) is not None:
            self._failures.tell(left)
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

    def _note_outcome(self, job: SaveJob) -> None:
        """Called by the writing thread when a save has ended."""
        self._decisions.saved(job.handle)
        error = job.handle.error
        if error is None:
            self._restored = None
            self._mirror.committed(job.handle, job.attempt)
        elif not job.handle._reported:
            telemetry.event("checkpoint.failed", step=job.step, error=str(error))
            self._failures.tell(error)

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


def _check_step(n: object) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise ConfigError(f"step {n!r}: give the number of steps done, 0 or more")
