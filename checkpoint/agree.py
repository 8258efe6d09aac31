"""What ranks settle before any of them captures: whether all can save, and who writes what.

One collective a save, also where nothing has changed: a rank that has failed by then, or was asked
for another step, must be known before anything is written. Plans are only told where they are new.
"""

import contextlib
import secrets
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from planaria import telemetry
from planaria.checkpoint import points
from planaria.checkpoint.capture.pool import BufferPool
from planaria.checkpoint.capture.replicas import (
    first_difference,
    sampled_checksums,
    whole_checksums,
)
from planaria.checkpoint.layout.own_plan import Announcer, OwnPlan
from planaria.checkpoint.layout.plan import make_plan
from planaria.checkpoint.save_job import SaveJob
from planaria.checkpoint.state.objects import check_objects
from planaria.checkpoint.steps_in_use import StepsInUse
from planaria.checkpoint.unchanged import Unchanged
from planaria.core.collective import Ranks
from planaria.core.deadline import Deadline
from planaria.core.points import point
from planaria.errors import SaveFailedError

if TYPE_CHECKING:
    from planaria.checkpoint.memory.saving import MemorySink

Meet = Callable[[SaveJob, Callable[[Any], Any], Any], Any]
"""Calls a collective with a value, for a save."""


class Agreement:
    """How the ranks of a group agree on one save after the other.

    Args:
        ranks: They.
        pool: Whose buffers are the chunks of a file.
        steps: Which steps are in use.
        unchanged: What saves may refer to, None where they write everything.
        memory: Takes snapshots in memory.
        meet: By which they meet.
    """

    def __init__(
        self,
        ranks: Ranks,
        pool: BufferPool,
        steps: StepsInUse,
        unchanged: Unchanged | None,
        memory: "MemorySink | None",
        meet: Meet,
    ) -> None:
        self._ranks, self._pool, self._steps = ranks, pool, steps
        self._unchanged, self._memory, self._meet = unchanged, memory, meet
        self._announce = Announcer()
        self._plans: tuple[tuple[str, ...], OwnPlan] | None = None
        self._drift_told = False

    def __call__(self, job: SaveJob, deadline: Deadline) -> str | None:
        """Finds out whether all ranks can save, and who writes what.

        Args:
            job: The save.
            deadline: Bounds the wait for the removal of an older step of that number.

        Returns:
            The save that wrote the step that this one may refer to.
        """
        mine, report = self._report(job, deadline)
        reports = self._meet(job, self._ranks.all_gather, report)
        failed = [(r, rep["error"]) for r, rep in enumerate(reports) if rep["error"] is not None]
        if not failed and len({rep["step"] for rep in reports}) > 1:
            failed = [(0, f"ranks save different steps: {[rep['step'] for rep in reports]}")]
        if not failed and len({rep["dedup"] for rep in reports}) > 1:
            failed = [(0, "dedup= is not the same on all ranks")]
        if not failed:
            unequal = first_difference([rep["same"] for rep in reports])
            if unequal is not None:
                name, first, other = unequal
                failed = [
                    (
                        other,
                        f"tensor {name!r} differs from rank {first}'s, so one copy cannot stand "
                        "for all; give it a name of its own on each rank, or make it equal",
                    )
                ]
        if not failed and len({rep["memory"] is None for rep in reports}) > 1:
            failed = [(0, "memory= is not the same on all ranks")]
        if failed:
            job.agreed = True
            raise job.error or SaveFailedError(
                f"step {job.step} was not committed: rank {failed[0][0]}: {failed[0][1]}"
            )
        self._meet_nodes(job, [rep["memory"] for rep in reports])
        self._warn_of_drift(job, [rep["sample"] for rep in reports])
        job.attempt = reports[0]["attempt"]
        digests = tuple(rep["digest"] for rep in reports)
        if self._plans is None or self._plans[0] != digests:
            first = digests.index(digests[self._ranks.rank]) == self._ranks.rank
            sent = self._meet(job, self._ranks.all_gather, mine if first else None)
            by_digest = dict(zip(reversed(digests), reversed(sent), strict=True))
            # A plan that cannot be made cannot be made on any rank: all come to the same error.
            job.agreed = True
            size = self._pool.buffer_nbytes if self._unchanged is not None else None
            plan = make_plan([by_digest[d] for d in digests], size)
            self._plans = digests, OwnPlan(plan, self._ranks.rank, self._pool.buffer_nbytes)
            job.agreed = False
        job.own = self._plans[1]
        job.handle.nbytes = job.own.nbytes
        return reports[0]["base"]

    def _meet_nodes(self, job: SaveJob, reports: Sequence[Any]) -> None:
        """Without its nodes there is no snapshot; the checkpoint is made all the same."""
        if self._memory is None or job.memory is None:
            return
        try:
            self._meet(job, partial(self._memory.meet, ranks=self._ranks), reports)
        except SaveFailedError as error:
            job.memory.fail(error)

    def _warn_of_drift(self, job: SaveJob, samples: Sequence[dict[str, int]]) -> None:
        """Tells once that ranks do not have the same model, which one copy would hide."""
        unequal = first_difference(samples)
        if unequal is None or self._drift_told:
            return
        self._drift_told = True
        name, first, other = unequal
        text = (
            f"step {job.step}: {name} differs between ranks {first} and {other}, which should hold "
            "the same; one rank's values are saved for all. Are gradients exchanged (DDP, "
            "fully_shard)? State that is meant to differ needs a name of its own on each rank"
        )
        telemetry.event("checkpoint.drift", step=job.step, tensor=name, ranks=[first, other])
        if self._ranks.rank == 0:
            with contextlib.suppress(Warning):  # warnings may be errors, here they must not
                warnings.warn(text, stacklevel=1)

    def _report(self, job: SaveJob, deadline: Deadline) -> tuple[list[Any], dict[str, Any]]:
        """What this rank tells the others; a failure here is told as well, for they wait."""
        mine: list[Any] = []
        announced = ""
        same: dict[str, int] = {}
        sample: dict[str, int] = {}
        try:
            point(points.PLAN, step=job.step)
            if job.durable:
                self._steps.wait_for_removal(job.step, deadline)
            check_objects(job.objects)
            mine, announced = self._announce(job.entries)
            if self._unchanged is not None and self._ranks.rank == 0:
                job.base = self._unchanged.hold()
            if job.error is None and self._ranks.size > 1:
                same = whole_checksums(job.entries, job.ready)
                sample = sampled_checksums(job.entries, job.ready, job.step)
        except Exception as error:
            job.error = job.error or error
        return mine, {
            "step": job.step,
            "error": None if job.error is None else str(job.error) or repr(job.error),
            "digest": announced,
            "same": same,
            "sample": sample,
            "dedup": self._unchanged is not None,
            "base": None if job.base is None else job.base.attempt,
            "attempt": secrets.token_hex(6),
            "memory": (
                None if self._memory is None or job.memory is None else self._memory.report()
            ),
        }
