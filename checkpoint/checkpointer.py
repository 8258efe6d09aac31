"""The checkpointer: what a training loop holds."""

import atexit
import contextlib
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import torch

from planaria import telemetry
from planaria.checkpoint import points
from planaria.checkpoint.at_exit import call_at_exit
from planaria.checkpoint.begin import look_at
from planaria.checkpoint.capture import gate
from planaria.checkpoint.capture.warming import warm
from planaria.checkpoint.decide import Decisions
from planaria.checkpoint.failures import Failures, raise_first
from planaria.checkpoint.handle import SaveHandle
from planaria.checkpoint.job import Job
from planaria.checkpoint.later import Later, is_for_later
from planaria.checkpoint.layout.transforms import Transform
from planaria.checkpoint.memory.restoring import find_steps
from planaria.checkpoint.memory.save import MemorySave
from planaria.checkpoint.memory.tier import MemoryTier
from planaria.checkpoint.opening import Options, is_positive
from planaria.checkpoint.policies import (
    FailurePolicy,
    KeepPolicy,
    SavePolicy,
)
from planaria.checkpoint.restore import RestoreReport, restore
from planaria.checkpoint.save_job import SaveJob
from planaria.checkpoint.stop import StopSignals
from planaria.checkpoint.storage.base import Storage
from planaria.checkpoint.storage.mirror import Mirror
from planaria.core.collective import Meeting
from planaria.core.deadline import Deadline
from planaria.core.points import point
from planaria.errors import (
    ConfigError,
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
        audit: Check every captured byte against unnoticed writes, instead of a sample, small
            tensors included; slow, for tests and for hunting a bug.
        process_group: Ranks that save together; all by default. ``LATER`` where they are known
            later, or change: then nothing is opened before `attach` is called, by a session or by
            hand. In an elastic run that is the default, too.
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
        process_group: "ProcessGroup | Meeting | Later | None" = None,
        timeout_s: float = 1800.0,
    ) -> None:
        self._pid, self._closed = os.getpid(), False
        self._timeout_s = timeout_s if is_positive(timeout_s) else 1800.0
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
                audit=audit,
                timeout_s=timeout_s,
            )
        except Exception as e:  # told to the other ranks, who wait
            error = e
        later = is_for_later(process_group)
        if later and error is not None:
            raise error
        self._failures = Failures(on_failure)
        due = None if options is None else options.due
        self._decisions = Decisions(due, lambda: self._signals.requested)
        self._job = Job(options, self._failures, self._decisions, self._timeout_s, elastic=later)
        warm()
        if not isinstance(process_group, Later) and not later:
            self._job.open(process_group, error)
        self._signals = StopSignals()
        gate.close_gate_for(self)
        self._atexit = call_at_exit(self._close_and_warn)

    # Ranks that change

    def attach(
        self,
        process_group: "ProcessGroup | Meeting | None" = None,
        *,
        state: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Opens the root with these ranks, or goes on with them instead of the ones before.

        All of them call it, also those that join. What is not committed is given up: its handles
        fail, unless it turns out that rank 0 had still committed it, and the next `step` saves
        whatever the policy says. Nothing that is committed is lost. The lock of a rank 0 that is
        gone is taken over: **a rank of the group before that is not part of this one must be
        dead**, or have closed its checkpointer.

        Args:
            process_group: The ranks. None stands for all of torch.distributed's, or for one
                process where that is not initialised.
            state: What is saved and restored from now on; by default what it was.
            timeout_s: Budget for all of it, in seconds; by default the checkpointer's own.

        Raises:
            ConfigError: An argument makes no sense.
            CollectiveError: Another rank is gone. It may be called again, with those that are left.
            DeadlineError: This rank commits, and its storage hangs.
            RootError: See `Checkpointer`.
        """
        self._job.check_usable()
        deadline = Deadline(self._timeout_s if timeout_s is None else timeout_s)
        self._job.attach(process_group, state, deadline)

    def detach(self) -> None:
        """Gives up at once what is not committed; to be followed by `attach` or `close`.

        May be called from any thread, as soon as a rank is known to be gone, and does not wait.
        Calls that wait for ranks raise CollectiveError, and the gate opens.
        """
        self._job.detach()

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
        memory = self._job.attached.memory
        _check_step(n)
        # First of all, so that ranks still agree where one of them is not told of a failure.
        due = self._decisions.save_due(n)
        telemetry.event("checkpoint.step", step=n)
        durable = (due or self._job.past.owes) and self._job.last_saved != n
        in_memory = memory is not None and memory.due(n)
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
        memory = self._job.attached.memory
        _check_step(n)
        return self._save(n, metrics, durable=True, in_memory=memory is not None)

    def _save(
        self, n: int, metrics: Mapping[str, Any] | None, *, durable: bool, in_memory: bool
    ) -> SaveHandle:
        job = self._job
        job.check_not_foreign(n)
        failures = self._failures.take()
        with telemetry.span("checkpoint.call", step=n), self._decisions.blocked():
            # Two attempts at one step must not overlap.
            self._wait_for([h for h in job.pending if h.step == n])
            job.pending = [h for h in job.pending if not h._done.is_set()]
            handle = self._start(n, metrics, durable=durable, in_memory=in_memory)
        # Ranks hear of a failure at different calls: each of them must have begun the same saves.
        raise_first(failures)
        return handle

    def _start(
        self, n: int, metrics: Mapping[str, Any] | None, *, durable: bool, in_memory: bool
    ) -> SaveHandle:
        attached, past, options = self._job.attached, self._job.past, self._job.options
        handle = SaveHandle(n, self._timeout_s)
        job = SaveJob(handle, {}, {}, None, {}, {}, torch.get_num_threads(), durable=durable)
        if in_memory:
            handle._memory = SaveHandle(n, self._timeout_s) if durable else handle
            job.memory = MemorySave(handle._memory)
            # What was rewound is set aside with the commit: that is the ranks' own.
            if durable and options.by_nodes and not past.owes:
                job.memory.by_nodes, job.memory.persist = True, options.root.storage.local
        look_at(job, options.state, metrics, audit=options.audit)
        # The caller's mistake is raised here; other ranks learn of it in the background.
        mistake = job.error if isinstance(job.error, StateError | ConfigError) else None
        for each in {handle, handle._memory or handle}:
            each._reported = mistake is not None
            self._job.pending.append(each)
        if attached.memory is not None and in_memory:
            attached.memory.last = handle._memory
        if durable:
            self._job.last_saved, past.owes = n, False
            self._decisions.saving(handle)
        attached.pipeline.submit(job)
        if mistake is not None:
            raise mistake
        point(points.CALLED, step=n)
        return handle

    def before_update(self) -> None:
        """Returns once the state may be changed: everything queued has been captured.

        Optimizers call this by themselves; other code that writes parameters must.

        Raises:
            DeadlineError: The capture is stuck (storage too slow for the pool, or a lost rank).
        """
        waiting = [h for h in self._job.pending if not h.captured]
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
        unless every rank can load all it needs; until it returns, others must not use the state.

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
        attached, options, past = self._job.attached, self._job.options, self._job.past
        memory = attached.memory
        # What is still under way may be what is asked for, or of a past that is about to be left.
        self._wait_for(self._job.pending)
        if step is not None:
            _check_step(step)
        with telemetry.span("checkpoint.restore") as span:
            found = None if memory is None else find_steps(memory, attached.ranks)
            with contextlib.ExitStack() as looking:
                if found is not None:
                    looking.callback(found.close)
                report = restore(
                    options.root,
                    options.state,
                    attached.ranks,
                    step=step,
                    only=only,
                    strict=strict,
                    transforms=transforms,
                    pool=attached.pool,
                    mirror=options.mirror,
                    memory=found,
                )
            if report is not None:
                span.set(step=report.step, bytes=report.nbytes, tier=report.tier,
                         damaged=[step for step, _ in report.fell_back_from])  # fmt: skip
                past.restored, self._job.last_saved = report.step, None
                if memory is not None:
                    memory.last = None
                # What lies ahead in the root must be set aside before more of it is in memory.
                past.owes = step is not None or bool(report.fell_back_from or options.mirror.root)
                past.goes_on = True
                options.mirror.restored(report)
                attached.pipeline.restored(report.step if report.tier == "durable" else None)
        # A node in the place of a lost one gets its share now, not when the next snapshot is due.
        whole = only is None and strict and not transforms and not past.owes
        if found is not None and report is not None and whole and found.exposes(report):
            self._save(report.step, None, durable=False, in_memory=True).wait_captured()
        return report

    # Looking and stopping

    @property
    def keeps_snapshots(self) -> bool:
        """Whether there is a memory tier."""
        return self._job.options.memory is not None

    @property
    def last_snapshot(self) -> SaveHandle | None:
        """The newest snapshot in memory that was begun, None if there was none."""
        attached = self._job.attached_now
        return None if attached is None or attached.memory is None else attached.memory.last

    @property
    def should_stop(self) -> bool:
        """Whether all ranks have agreed to stop after this step; the last save is under way."""
        return self._decisions.stopping

    def request_stop(self) -> None:
        """Asks all ranks to stop at one of the next step boundaries, as a signal does."""
        self._signals.requested = True

    def all_steps(self) -> list[int]:
        """Committed steps, ascending."""
        return self._job.options.root.steps()

    def latest_step(self) -> int | None:
        """The newest committed step, None if there is none."""
        return max(self._job.options.root.steps(), default=None)

    # Ending

    def close(self) -> None:
        """Waits for the saves under way and ends everything; further calls do nothing.

        Raises:
            SaveFailedError: A save failed (unless ``on_failure="degrade"``).
        """
        try:
            if not self._closed and not self._job.detached:
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
        self._job.close(Deadline(timeout_s), part=part)

    def _wait_for(self, handles: Sequence[SaveHandle]) -> None:
        deadline = Deadline(self._timeout_s)
        for handle in handles:
            deadline.wait(handle._done, f"the save of step {handle.step}")


def _check_step(n: object) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise ConfigError(f"step {n!r}: give the number of steps done, 0 or more")
