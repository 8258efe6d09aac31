"""A checkpointer's part in a job whose ranks may change: one attachment after the other.

What is kept from one to the next is what belongs to this process (its arguments, on rank 0 the
lock), what it knows of the run's past, and the saves of which it was not told how they ended.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from planaria import telemetry
from planaria.checkpoint.attachment import Attachment
from planaria.checkpoint.decide import Decisions
from planaria.checkpoint.failures import Failures
from planaria.checkpoint.format.manifest import Manifest
from planaria.checkpoint.handle import SaveHandle
from planaria.checkpoint.opening import Brought, Options
from planaria.checkpoint.past import Past
from planaria.checkpoint.save_job import SaveJob
from planaria.checkpoint.state.stateset import StateSet
from planaria.checkpoint.steps_in_use import StepsInUse
from planaria.checkpoint.storage.lock import RootLock
from planaria.core.collective import rank_in
from planaria.core.deadline import Deadline
from planaria.errors import CollectiveError, ConfigError, DeadlineError, RootError, SaveFailedError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from planaria.checkpoint.capture.pool import BufferPool
    from planaria.core.collective import Meeting


class Job:
    """The ranks of a job, one group after the other, seen from one of them.

    Args:
        options: The checkpointer's arguments.
        failures: Is told what goes wrong in the background.
        decisions: By which ranks decide alike.
        timeout_s: Longest wait for anything, in seconds.

    Attributes:
        options: The checkpointer's arguments.
        past: What is known of the run; anew after each `attach`.
        pending: Saves that were called and had not ended when that was last looked at.
        last_saved: The step that was last saved with these ranks.
        elastic: Whether the ranks may change.
    """

    def __init__(
        self,
        options: Options | None,
        failures: Failures,
        decisions: Decisions,
        timeout_s: float,
        *,
        elastic: bool,
    ) -> None:
        self._maybe_options = options
        self._failures, self._decisions, self._timeout_s = failures, decisions, timeout_s
        self.elastic = elastic
        self.past = Past()
        self.pending: list[SaveHandle] = []
        self.last_saved: int | None = None
        self._pid = os.getpid()
        self._closed = False
        self._was_attached = False
        self._attached: Attachment | None = None
        self._lock: RootLock | None = None
        self._pool: BufferPool | None = None
        self._unknown: list[SaveJob] = []
        self._steps = StepsInUse()

    @property
    def options(self) -> Options:
        """The checkpointer's arguments."""
        assert self._maybe_options is not None  # else no checkpointer was made
        return self._maybe_options

    @property
    def attached(self) -> Attachment:
        """What there is with the ranks of now.

        Raises:
            ConfigError: It is closed, or was not attached yet, or this is another process.
            CollectiveError: The ranks have changed, and it is not known to whom.
        """
        self.check_usable()
        if self._attached is None:
            if self._was_attached:
                raise CollectiveError("the ranks of this checkpointer have changed: call attach()")
            raise ConfigError(
                "this checkpointer does not know its ranks yet: call attach(group), or hand it to "
                "the session of an elastic run, which does"
            )
        if self._attached.given_up:
            raise CollectiveError("the ranks of this checkpointer have changed: call attach()")
        return self._attached

    @property
    def detached(self) -> bool:
        """Whether there are no ranks now."""
        return self._attached is None or self._attached.given_up

    @property
    def attached_now(self) -> Attachment | None:
        """The same without a look at whether it can be used."""
        return self._attached

    def check_usable(self) -> None:
        """Makes sure that it is open, and this process its own.

        Raises:
            ConfigError: It is not.
        """
        if self._closed:
            raise ConfigError("this checkpointer is closed; make a new one")
        if os.getpid() != self._pid:
            raise ConfigError(
                f"this checkpointer was made in process {self._pid}, of which this one is a fork; "
                "only that one can save and restore"
            )

    def open(self, group: ProcessGroup | Meeting | None, error: Exception | None) -> None:
        """Opens the root with ranks that will not change, or tells them what is wrong."""
        self._attach(group, error, None, self._timeout_s)

    def attach(
        self,
        group: ProcessGroup | Meeting | None,
        state: Mapping[str, Any] | None,
        deadline: Deadline,
    ) -> None:
        """See `Checkpointer.attach`."""
        self.elastic = True
        self.detach()
        with telemetry.span("checkpoint.attach") as span:
            if self._attached is not None:
                self._unknown += self._attached.end(deadline)
                self._attached = None
            if self._lock is not None and rank_in(group) != 0:  # a live rank 0 hands over
                self.options.mirror.stop(deadline.remaining())
                lock, self._lock = self._lock, None
                lock.release()
            error: Exception | None = None
            try:
                if state is not None:
                    self.options.state = StateSet(state, watch_small=self.options.audit)
            except Exception as e:  # told to the other ranks, who wait
                error = e
            saves = [(job.step, job.attempt) for job in self._unknown]
            brought = Brought(self.past if self._was_attached else None, saves, self._lock)
            attached = self._attach(group, error, brought, deadline.remaining())
            self._settle(set(attached.claimed.committed))
            span.set(ranks=attached.ranks.size, unknown=len(saves))

    def detach(self) -> None:
        """See `Checkpointer.detach`."""
        attached = self._attached
        if attached is not None:
            attached.give_up()
            # Only now: what is changed from here on can be in no checkpoint.
            for handle in tuple(self.pending):
                handle._captured.set()

    def _attach(
        self,
        group: ProcessGroup | Meeting | None,
        error: Exception | None,
        brought: Brought | None,
        within_s: float,
    ) -> Attachment:
        self._lock = None  # it is taken along, and given free where that fails
        attached = Attachment(
            self._maybe_options,
            error,
            group,
            decisions=self._decisions,
            failures=self._failures,
            steps=self._steps,
            brought=brought,
            pool=self._pool,
            timeout_s=self._timeout_s,
            within_s=within_s,
            elastic=self.elastic,
            rewound_to=self._rewound_to,
            on_done=self._note_outcome,
        )
        self._attached, self._was_attached = attached, True
        self._lock, self._pool = attached.lock, attached.pool
        self.past, self.last_saved = attached.claimed.past, None
        self._decisions.stopping = self.past.stopping
        if self._lock is not None:
            self.options.mirror.start(
                self._steps,
                keep=self.options.keep,
                again=self.options.on_failure != "fatal",
                timeout_s=self._timeout_s,
                failed=self._failures.tell,
                check_lock=self._lock.check,
            )
        return attached

    def _settle(self, committed: set[tuple[int, str]]) -> None:
        """Saves of which it was not known how they ended: now it is."""
        jobs, self._unknown = self._unknown, []
        for job in jobs:
            if (job.step, job.attempt) in committed:
                job.handle._finish(None, first=lambda job=job: self._note_outcome(job))
            else:
                _give_up(job)
        self._failures.forget_lost_ranks()

    def check_not_foreign(self, step: int) -> None:
        """A run must not save among the steps of another one.

        Raises:
            RootError: It would.
        """
        newest = self.past.newest_at_open
        if not self.past.goes_on and newest is not None and step <= newest:
            raise RootError(
                f"{self.options.root.storage.url} already holds steps up to {newest}, which this "
                f"run has not restored; saving step {step} would mix two runs. Call restore() "
                "first, or give a new folder"
            )

    def _note_outcome(self, job: SaveJob) -> None:
        """Called by the writing thread when a save has ended."""
        self._decisions.saved(job.handle)
        error = job.handle.error
        if error is None:
            self.past.restored = None
            self.options.mirror.committed(job.handle, job.attempt)
        elif not job.handle._reported:
            telemetry.event("checkpoint.failed", step=job.step, error=str(error))
            self._failures.tell(error)

    def _rewound_to(self, manifest: Manifest) -> int | None:
        """At the first commit after a restore: the step it left later ones behind for."""
        restored = self.past.restored
        if restored is not None:
            self.options.mirror.rewound(restored, manifest)
        return restored

    def close(self, deadline: Deadline, *, part: bool) -> None:
        """Ends everything; what went wrong is left with the failures.

        Args:
            deadline: How long to wait for the saves under way.
            part: Whether the job ends here.
        """
        self._closed = True
        attached, ended = self._attached, True
        if attached is not None:
            ended = attached.close(deadline, part=part)
            self._unknown += attached.pipeline.unknown
        for job in self._unknown:
            self._failures.add(_give_up(job))
        for handle in self.pending:
            if not handle._done.is_set():
                error = DeadlineError(f"not through within {deadline.budget:g} s when closing")
                handle._finish(error)
                self._failures.add(SaveFailedError(f"step {handle.step}: {error}"))
        if (left := self.options.mirror.close(deadline.remaining())) is not None:
            self._failures.tell(left)
        if self._lock is not None:
            self._lock.release()
        if ended and attached is not None:
            attached.leave()


def _give_up(job: SaveJob) -> SaveFailedError:
    """Ends a save because ranks were lost from it."""
    error = SaveFailedError(
        f"step {job.step} was not committed: it was given up, because the job's ranks have changed"
    )
    error.__cause__ = job.error
    job.handle._finish(error)
    return error
