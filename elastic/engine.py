"""One rank's part in a run: steps that are committed by vote, generation after generation.

A step on a rank: gradients are summed (`reduction`), all ranks vote (`vote`), then each applies the
step to what it holds and spreads it (`updates`). Whoever has all votes knows that every rank is
able to apply the step. So when ranks are lost, the survivors go on from the newest step that any of
them saw committed: those that did not hear of it are told, and apply it, too; and where nobody has
heard of it nobody has applied anything, and the step is repeated.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from planaria import telemetry
from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.elastic.certificate import Certificate, Claim
from planaria.elastic.generation import connect_ranks
from planaria.elastic.hello import Hello, Role, Roll, read_roll, to_mask
from planaria.elastic.journal import Journal
from planaria.elastic.membership.view import Membership, Standing, View
from planaria.elastic.preemption import Notices
from planaria.elastic.proof import certify_members, make_claim
from planaria.elastic.reduction.assignment import assign
from planaria.elastic.reduction.messages import MESSAGES_TAG, deliver, share_json
from planaria.elastic.reduction.ordered import clip_coefficient
from planaria.elastic.reduction.reducer import Collected, Consistency, GradientReducer
from planaria.elastic.reduction.transport import Transport
from planaria.elastic.replicated import Replicated
from planaria.elastic.saving import Saving
from planaria.elastic.scale import LossScale
from planaria.elastic.updates import BlockUpdater, ReplicaUpdater
from planaria.elastic.vote import Ballot, Decision, decide, exchange_ballots
from planaria.errors import CollectiveError, ConfigError, DeadlineError, StateError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

PREPARED = points.declare("elastic.session.prepared", "before this rank's vote is sent")
COMMITTED = points.declare("elastic.session.committed", "all votes are here, nothing applied yet")
DONE = points.declare("elastic.session.done", "a step is applied and spread")
REGROUPED = points.declare("elastic.session.regrouped", "a new generation is connected")
CAUGHT_UP = points.declare("elastic.session.caught_up", "all have applied what was committed")

HELLO_TAG = MESSAGES_TAG
DECISION_TAG = MESSAGES_TAG + 2
CONFIRM_TAG = MESSAGES_TAG + 4
MODEL_TAG = MESSAGES_TAG + 8


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
    """

    micro_batches: int
    group: int = 1
    consistency: Consistency = "bitwise"
    clip_grad_norm: float | None = None
    skip_nonfinite: bool = False
    recovery_s: float = 60.0
    step_timeout_s: float = 600.0


class Engine:
    """Carries out steps, and what happens between them.

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

    Attributes:
        view: The generation.
        role: How far this rank belongs to the run.
        roles: The same of all members.
        certificate: That everything has one owner in this generation.
        step: The number of the next step: as many are committed.
        decision: What the last vote decided.
        applied: Whether the last step changed the model.
        norm: 2-norm of its gradient, before clipping.
    """

    view: View
    transport: Transport
    reducer: GradientReducer
    certificate: Certificate

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
    ) -> None:
        self.membership, self.settings = membership, settings
        self._parameters, self._names = parameters, list(parameters)
        self._place = {name: i for i, name in enumerate(self._names)}
        self.updater, self.replicated = updater, replicated
        self._scheduler, self._scale, self.saving = scheduler, scale, saving
        self.journal, self.notices = journal, notices
        self._torn = self._restoring = False
        self.role: Role = "new"
        self.roles: dict[int, Role] = {}
        self.step, self.fresh, self.since = 0, -1, 0
        self._pending: Collected | None = None
        self.decision: Decision | None = None
        self.applied, self.norm = False, math.nan
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
        self._pending = None
        self.reducer.begin(Deadline(self.settings.step_timeout_s))
        return self.reducer.order

    def commit(self, metrics: Sequence[Mapping[str, float]], *, stop: bool = False) -> Decision:
        """Sums, votes, applies and spreads.

        Args:
            metrics: What was recorded of each of this rank's micro-batches, in their order.
            stop: Whether this rank wants the run to end.

        Raises:
            CollectiveError: A rank is gone: :meth:`recover`.
            DeadlineError: Some rank did not do its part in time; likewise.
        """
        number, deadline = self.step, Deadline(self.settings.step_timeout_s)
        self.membership.progress(number, "reduce")
        with telemetry.span("elastic.reduce", step=number):
            collected = self.reducer.collect()
        self._pending = collected
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
            self._grace(wanted),
        )
        with telemetry.span("elastic.vote", step=number):
            ballots = exchange_ballots(self.transport, ballot, self._owners, deadline)
        decision = decide(number, self.view, ballots, self._owners)
        points.point(COMMITTED, step=number)
        self._apply(decision)
        with telemetry.span("elastic.spread", step=number):
            self.updater.spread(deadline)
        self.fresh = self.step
        self.since += 1
        if self.journal is not None:
            self.journal.note_commit(self.view, self._full())
        points.point(DONE, step=number)
        self.membership.progress(number, "idle")
        return decision

    def _apply(self, decision: Decision) -> None:
        """Applies what was decided, to the gradient that this rank has prepared."""
        collected, settings = self._pending, self.settings
        assert collected is not None
        # From here on the step counts, whatever happens to this rank.
        self._pending, self.decision, self.step = None, decision, decision.step + 1
        self.membership.progress(decision.step, "apply")
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
        if self._scale is not None:
            self._scale.update(finite)
        if self.updater.carried:
            self.fresh = self.step

    # Generations

    def start(self, view: View) -> None:
        """Enters the first generation that this rank is a member of."""
        deadline = Deadline(self.settings.recovery_s)
        try:
            self.enter(view, deadline)
        except (CollectiveError, DeadlineError) as error:
            self.recover(error)

    def recover(self, error: Exception) -> None:
        """Goes on with those that are left, from the newest step that any of them saw committed.

        Afterwards :attr:`step` says which that is, and the model is as after it.

        Args:
            error: What went wrong.

        Raises:
            CollectiveError: The run cannot go on.
            DeadlineError: Nothing was agreed within `recovery_s`.
            StateError: Blocks were lost with all their holders.
        """
        deadline = Deadline(self.settings.recovery_s)
        with telemetry.span("elastic.recover", step=self.step, reason=_first_line(error)):
            while True:
                self.regroup(_first_line(error), deadline)
                try:
                    self.enter(self.view, deadline)
                    return
                except (CollectiveError, DeadlineError) as another:
                    if self.membership.gone():
                        deadline = Deadline(self.settings.recovery_s)  # one more loss
                    deadline.check(f"a generation that lasts ({_first_line(another)})")
                    error = another

    def regroup(self, reason: str, deadline: Deadline) -> None:
        """Drops all groups, then agrees on the next generation."""
        self.drop_groups()
        self._torn = self._torn or self._restoring
        standing = Standing(self.view.generation, self.step, reason)
        self.view = self.membership.regroup(standing, deadline)

    def drop_groups(self) -> None:
        """Ends what hangs in a generation's groups, here and, by that, on other ranks."""
        if self.saving is not None:
            self.saving.detach()
        if hasattr(self, "reducer"):
            self.reducer.close()
        if hasattr(self, "transport"):
            self.transport.close()

    def enter(self, view: View, deadline: Deadline) -> None:
        """Connects the members of a generation, and goes on from where they stand.

        Raises:
            CollectiveError: A member is gone: regroup again.
            DeadlineError: A member did not do its part in time; likewise.
            StateError: What they have does not make a whole state.
        """
        self.view, self.since = view, 0
        # Nobody is to blame for how long a recovery takes, whatever it was in before.
        self.phase("idle")
        self.transport = connect_ranks(self.membership, view, deadline)
        self.check()  # a loss that was told before there was a transport to close
        points.point(REGROUPED, step=self.step)
        said = share_json(self.transport, self._hello().to_json(), deadline, tag=HELLO_TAG)
        roll = read_roll(said)
        again = roll.torn or not roll.committed
        if not again:
            roll.check(view.step)
            self._catch_up(roll, deadline)
            points.point(CAUGHT_UP, step=self.step)
            self.roles = dict(roll.roles)
            again = not self.arrange(roll.spare, roll.owned, roll.held, deadline)
        if again:
            # What is restored may be large: that is no matter of a recovery's budget.
            deadline = Deadline(max(self.settings.step_timeout_s, deadline.remaining()))
            self._begin_run(roll, deadline)
            self.settle(deadline)
            return
        if roll.stale:
            self.updater.spread(deadline)
            self.fresh = self.step if self.role != "new" else -1
        self.settle(deadline)
        if self.saving is not None:
            self.saving.attach(self.membership, view, deadline)

    def _begin_run(self, roll: Roll, deadline: Deadline) -> None:
        """All begin with the model of one rank, or with what was saved last."""
        lead = roll.witness if roll.experienced else 0
        digests = share_json(self.transport, self.replicated.digest(), deadline, tag=HELLO_TAG)
        if len(set(digests)) > 1:
            outgoing: dict[int, bytes] = {}
            if self.transport.rank == lead:
                outgoing = dict.fromkeys(
                    range(self.transport.size), self.replicated.pack(model=True)
                )
            found = deliver(self.transport, outgoing, deadline, tag=MODEL_TAG)
            if lead in found:
                self.replicated.unpack(found[lead])
        self.updater.start(self.view.members, self.transport)
        step = 0
        if self.saving is not None:
            self._restoring = True  # until all have
            self.saving.attach(self.membership, self.view, deadline)
            step = self.saving.restore()
            share_json(self.transport, "restored", deadline, tag=CONFIRM_TAG)
        if step == 0 and roll.committed:
            raise StateError(
                "the optimizer's state was lost with its holders, and nothing was saved to go back "
                "to: give a checkpointer, or raise redundancy="
            )
        if step < roll.committed:
            logger.warning(
                "going back from step %d to step %d, which was saved: blocks of the optimizer's "
                "state were lost with all their holders",
                roll.committed,
                step,
            )
            telemetry.event("elastic.rewind", step=step, committed=roll.committed)
        self.step, self.fresh, self.decision, self._pending = step, step, None, None
        self._torn = self._restoring = False
        self.role = "full"
        self.roles = dict.fromkeys(self.view.members, "full")

    def _catch_up(self, roll: Roll, deadline: Deadline) -> None:
        """Tells those that have not heard of it what was decided last; they apply it."""
        if all(hello.committed == roll.committed for hello in roll.experienced):
            return
        decision = self.decision
        lead = self.transport.rank == roll.witness
        said = decision.to_json() if lead and decision is not None else None
        told = share_json(self.transport, said, deadline, tag=DECISION_TAG)[roll.witness]
        if self.role != "new" and self.step < roll.committed:
            if self._pending is None or told is None or told["step"] != self.step:
                raise StateError(
                    f"rank {self.transport.rank} was not prepared for step {self.step}, which was "
                    "committed: it cannot go on"
                )
            self._apply(Decision.from_json(told))

    def arrange(
        self,
        spare: Sequence[int],
        owned: Mapping[int, Sequence[int]],
        held: Mapping[int, Sequence[int]],
        deadline: Deadline,
    ) -> bool:
        """Brings blocks to their holders; false where some are lost, and all can be restored."""
        lost = self.updater.arrange(self.view.members, spare, owned, held, self.transport, deadline)
        if lost and self.saving is None:
            names = ", ".join(sorted({block.name for block in lost})[:3])
            raise StateError(
                f"{len(lost)} blocks of the optimizer's state ({names}, ...) were lost with all "
                "their holders: raise redundancy= to survive more losses at a time"
            )
        return not lost

    def settle(self, deadline: Deadline) -> None:
        """Once it is certain that all is well, lets go of what is not needed; ready to compute.

        Raises:
            CertificateError: Something has no owner, or several, or copies differ.
        """
        self._make_reducer()
        full = self._full()
        claim = None
        if self.role == "full":
            claim = make_claim(
                self.view, self.step, self.updater, self.reducer.order, self.replicated
            ).to_json()
        said = share_json(self.transport, claim, deadline, tag=CONFIRM_TAG)
        claims = [Claim.from_json(each) for each in said if each is not None]
        self.certificate = certify_members(
            self.view, full, claims, self.updater, self.settings.micro_batches
        )
        self.updater.drop()
        if self.journal is not None:
            self.journal.note_change(self.view, full, self.step, self.certificate.digest)

    def _make_reducer(self) -> None:
        if hasattr(self, "reducer"):
            self.reducer.close()
        settings = self.settings
        leaves = -(-settings.micro_batches // settings.group)
        members = self.view.members
        busy = [r for r, member in enumerate(members) if self.roles[member] == "full"][:leaves]
        idle = set(range(len(members))) - set(busy)
        placement = self.updater.placement
        place = {member: rank for rank, member in enumerate(members)}
        self._owners = [place[owner] for owner in placement.partition.owners]
        self.reducer = GradientReducer(
            self._parameters,
            settings.micro_batches,
            assign(leaves, len(members), idle=idle),
            self.transport,
            group=settings.group,
            segments=placement.segments(),
            consistency=settings.consistency,
            whole=self.updater.whole,
        )

    # Inside

    def _full(self) -> list[int]:
        return [member for member in self.view.members if self.roles[member] == "full"]

    def _grace(self, wanted: str | None) -> float | None:
        """Seconds until this member has to be gone, None where it may stay."""
        notice = None if self.notices is None else self.notices.look()
        if notice is not None:
            return notice.grace_s
        return self.settings.recovery_s if wanted == "leave" else None

    def _hello(self) -> Hello:
        owned = []
        if self.role == "full" and self.updater.held:
            owned = self.updater.placement.partition.of(self.view.me)
        return Hello(
            self.view.me,
            self.role,
            self.step,
            self.fresh,
            to_mask(owned),
            to_mask(self.updater.held),
            self._torn,
        )

    def _note_loss(self, members: frozenset[int]) -> None:
        """Called in another thread, as soon as members are gone."""
        if self.membership.disturbed() and hasattr(self, "transport"):
            self.transport.close()  # ends the waits for those that are gone
            if self.saving is not None:
                self.saving.detach()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300]
