"""One rank's part in a run: steps that are committed by vote.

A step on a rank: gradients are summed (`reduction`), all ranks vote (`vote`), then each applies the
step to what it holds and spreads it (`updates`). Whoever has all votes knows that every rank is
able to apply the step. So when ranks are lost, the survivors go on from the newest step that any of
them saw committed: those that did not hear of it are told, and apply it, too; and where nobody has
heard of it nobody has applied anything, and the step is repeated.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from planaria import telemetry
from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.elastic.certificate import Certificate
from planaria.elastic.generations import Generations
from planaria.elastic.grace import Meter
from planaria.elastic.hello import Role
from planaria.elastic.journal import Journal
from planaria.elastic.membership.view import Membership, View
from planaria.elastic.preemption import Notices
from planaria.elastic.reduction.ordered import clip_coefficient
from planaria.elastic.reduction.reducer import Collected, Consistency, GradientReducer
from planaria.elastic.reduction.transport import Transport
from planaria.elastic.replicated import Replicated
from planaria.elastic.saving import Saving
from planaria.elastic.scale import LossScale
from planaria.elastic.updates import BlockUpdater, ReplicaUpdater
from planaria.elastic.vote import Ballot, Decision, decide, exchange_ballots
from planaria.errors import CollectiveError, ConfigError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

PREPARED = points.declare("elastic.session.prepared", "before this rank's vote is sent")
COMMITTED = points.declare("elastic.session.committed", "all votes are here, nothing applied yet")
DONE = points.declare("elastic.session.done", "a step is applied and spread")


@dataclass(frozen=True)
class Settings:
    """What a run is made with; the first four are part of what fixes its bits.

    Attributes:
        micro_batches: Micro-batches of a step.
        group: Micro-batches of a leaf of the sum.
        consistency: "bitwise" or "fast".
        clip_grad_norm: The norm that gradients are scaled down to; None for as they are.
        skip_nonfinite: Whether a step whose gradient is not finite is left out.
        recovery_s: Seconds for a change of members, from the first error to the next step.
        step_timeout_s: Seconds that ranks wait for each other in a step.
        links: What tensors on a CUDA device go by: "host", copied to gloo, or "nccl".
    """

    micro_batches: int
    group: int = 1
    consistency: Consistency = "bitwise"
    clip_grad_norm: float | None = None
    skip_nonfinite: bool = False
    recovery_s: float = 60.0
    step_timeout_s: float = 600.0
    links: Literal["host", "nccl"] = "host"


class Engine:
    """Carries out steps; `generations` brings it from one set of members to the next.

    Args:
        membership: This rank's place among the others.
        parameters: Name -> parameter, those that need a gradient.
        updater: What applies steps.
        replicated: What all ranks have alike.
        scheduler: Stepped after every step that was applied, or None.
        scale: The scale of the loss, or None.
        settings: Everything else.
        saving: What saves and restores, or None.
        journal: What keeps the record of the run, or None.
        notices: What tells that this member has to go, or None.
        meter: The speeds of what was moved before.

    Attributes:
        device: The CUDA device that the model is on; None on the CPU.
        view: The generation.
        halfway: Whether a committed step is being applied. Where that ended with an error, some of
            the state has it and some has not.
        role: How far this rank belongs to the run.
        roles: The same of all members.
        certificate: That everything has one owner in this generation.
        step: The number of the next step: as many are committed.
        decision: What the last vote decided.
        applied: Whether the last step changed the model.
        norm: 2-norm of its gradient, before clipping.
        compute_s: Seconds that this rank has computed for the last step; 0 before there was one.
    """

    view: View
    transport: Transport
    reducer: GradientReducer
    certificate: Certificate
    owners: list[int]
    """The rank of each block."""

    def __init__(
        self,
        membership: Membership,
        parameters: "Mapping[str, torch.Tensor]",
        updater: BlockUpdater | ReplicaUpdater,
        replicated: Replicated,
        scheduler: Any,
        scale: LossScale | None,
        settings: Settings,
        saving: Saving | None = None,
        journal: Journal | None = None,
        notices: Notices | None = None,
        meter: Meter | None = None,
    ) -> None:
        self.membership, self.settings = membership, settings
        self.parameters, self._names = parameters, list(parameters)
        self.device = next((p.device for p in parameters.values() if p.is_cuda), None)
        self._place = {name: i for i, name in enumerate(self._names)}
        self.updater, self.replicated = updater, replicated
        self._scheduler, self._scale, self.saving = scheduler, scale, saving
        self.journal, self.notices = journal, notices
        self.meter = meter or Meter()
        self.torn = self.restoring = self.halfway = False
        self.role: Role = "new"
        self.roles: dict[int, Role] = {}
        self.step, self.fresh, self.since = 0, -1, 0
        self.pending: Collected | None = None
        self.decision: Decision | None = None
        self.applied, self.norm = False, math.nan
        self._began = self.compute_s = 0.0
        self.generations = Generations(self)  # pyright: ignore[reportArgumentType]
        membership.on_loss(self._note_loss)

    @property
    def join_timeout_s(self) -> float:
        """Seconds to be admitted, or to be let go at the end."""
        return self.settings.step_timeout_s

    def check(self) -> None:
        """Gives a step up early where its generation is of no more use.

        Raises:
            CollectiveError: Members are gone, or others regroup.
        """
        if self.membership.disturbed():
            gone = sorted(self.membership.gone())
            raise CollectiveError(f"members {gone} are gone, or others regroup")

    def phase(self, name: str) -> None:
        """Tells whoever watches for hangs what this rank is doing."""
        self.membership.progress(self.step, name)

    # Steps

    def begin(self) -> list[int]:
        """Begins the next step; returns this rank's micro-batches, in the order to compute."""
        self.pending, self._began = None, time.monotonic()
        self.reducer.begin(Deadline(self.settings.step_timeout_s))
        return self.reducer.order

    def commit(self, metrics: Sequence[Mapping[str, float]], *, stop: bool = False) -> Decision:
        """Sums, votes, applies and spreads.

        Args:
            metrics: What was recorded of each of this rank's micro-batches, in their order.
            stop: Whether this rank wants the run to end.

        Raises:
            CollectiveError: A rank is gone: `Generations.recover`.
            DeadlineError: Some rank did not do its part in time; likewise.
        """
        number, deadline = self.step, Deadline(self.settings.step_timeout_s)
        self.compute_s = time.monotonic() - self._began
        self.membership.progress(number, "reduce")
        with telemetry.span("elastic.reduce", step=number):
            collected = self.reducer.collect()
            self.updater.take_ahead(deadline)
        self.pending = collected
        points.point(PREPARED, step=number)
        self.membership.progress(number, "vote")
        wanted = self.membership.change_wanted()
        rows = [(i, w, dict(m)) for (i, w, _), m in zip(collected.rows, metrics, strict=True)]
        ballot = Ballot(
            rows,
            sorted(self._place[name] for name in collected.touched),
            self.updater.squared_norms(collected.segments),
            None if wanted == "stop" else wanted,
            stop or wanted == "stop",
            self.grace(),
        )
        with telemetry.span("elastic.vote", step=number):
            ballots = exchange_ballots(self.transport, ballot, self.owners, deadline)
        decision = decide(number, self.view, ballots, self.owners)
        points.point(COMMITTED, step=number)
        self.apply(decision)
        with (
            telemetry.span("elastic.spread", step=number),
            # Bytes from rank to rank, as blocks are that are handed over.
            self.meter.time("hand_over", self.updater.spread_bytes),
        ):
            self.updater.spread(deadline)
        self.fresh = self.step
        self.since += 1
        if self.journal is not None:
            self.journal.note_commit(self.view, self.full())
        points.point(DONE, step=number)
        self.membership.progress(number, "idle")
        return decision

    def apply(self, decision: Decision) -> None:
        """Applies what was decided, to the gradient that this rank has prepared."""
        collected, settings = self.pending, self.settings
        assert collected is not None
        # From here on the step counts, whatever happens to this rank.
        self.pending, self.decision, self.step = None, decision, decision.step + 1
        self.membership.progress(decision.step, "apply")
        self.halfway = True
        if self.journal is not None:
            self.journal.remember(decision)
        if not decision.weight:
            raise ConfigError("the weights of all micro-batches are 0: there is no mean gradient")
        unit = decision.weight * (self._scale.value if self._scale is not None else 1.0)
        norm = decision.norm / abs(unit)
        finite = math.isfinite(norm)
        self.norm, self.applied = norm, finite or not settings.skip_nonfinite
        if self.applied:
            clip = settings.clip_grad_norm
            factor = (1.0 if clip is None else clip_coefficient(norm, clip)) / unit
            touched = {self._names[place] for place in decision.touched}
            with telemetry.span("elastic.apply", step=decision.step):
                self.updater.apply(collected.segments, touched, factor)
            if self._scheduler is not None:
                self._scheduler.step()
        elif self.saving is not None:
            # No optimizer's step opens the gate, and the spread writes the model all the same.
            self.saving.before_update()
        if self._scale is not None:
            self._scale.update(finite)
        if self.updater.carried:
            self.fresh = self.step
        self.halfway = False

    # Generations

    def grace(self) -> float | None:
        """Seconds until this member has to be gone, None where it may stay."""
        notice = None if self.notices is None else self.notices.look()
        if notice is not None:
            return notice.grace_s
        return self.settings.recovery_s if self.membership.change_wanted() == "leave" else None

    def metrics(self) -> dict[str, float]:
        """What a save of the last step is kept with: its metrics that are finite."""
        found = {} if self.decision is None else self.decision.metrics
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def full(self) -> list[int]:
        """Members that take part, in order."""
        return [member for member in self.view.members if self.roles[member] == "full"]

    def drop_groups(self, *, saves: bool = True) -> None:
        """Ends what hangs in a generation's groups, here and, by that, on other ranks.

        Args:
            saves: Whether saves that are under way are given up, too.
        """
        if self.saving is not None and saves:
            self.saving.detach()
        self.close_reducer()
        if hasattr(self, "transport"):
            self.transport.close()

    def close_reducer(self) -> None:
        """Ends what the generation's sums have running, if there was one."""
        if hasattr(self, "reducer"):
            self.reducer.close()

    # Inside

    def _note_loss(self, members: frozenset[int]) -> None:
        """Called in another thread, as soon as members are gone."""
        if self.membership.disturbed() and hasattr(self, "transport"):
            self.transport.close()  # ends the waits for those that are gone
            if self.saving is not None:
                self.saving.detach()
