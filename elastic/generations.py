"""From one generation to the next: agree on the members, connect them, go on from one state.

Members say where they stand (`hello`). Those that have not heard of a committed step apply it;
blocks whose owner is gone go on from their shadows; copies are filled up; then all claims are
certified. Where blocks were lost with all their holders, all go back to what was saved last.
"""

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

from planaria import telemetry
from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.core.node import node_name
from planaria.elastic.certificate import Claim
from planaria.elastic.generation import connect_ranks
from planaria.elastic.hello import Hello, Roll, read_roll, to_mask
from planaria.elastic.membership.view import Standing, View
from planaria.elastic.proof import certify_members, digest_blocks, make_claim
from planaria.elastic.reduction.assignment import assign
from planaria.elastic.reduction.messages import MESSAGES_TAG, deliver, share_json
from planaria.elastic.reduction.reducer import GradientReducer
from planaria.elastic.reduction.staged import Staged
from planaria.elastic.vote import Decision
from planaria.errors import CollectiveError, DeadlineError, StateError

if TYPE_CHECKING:
    from planaria.elastic.engine import Engine

logger = logging.getLogger(__name__)

REGROUPED = points.declare("elastic.session.regrouped", "a new generation is connected")
CAUGHT_UP = points.declare("elastic.session.caught_up", "all have applied what was committed")

HELLO_TAG = MESSAGES_TAG
DECISION_TAG = MESSAGES_TAG + 2
CONFIRM_TAG = MESSAGES_TAG + 4
MODEL_TAG = MESSAGES_TAG + 8


class Generations:
    """Brings a rank's engine from one generation to the next.

    Args:
        engine: The rank's engine.

    Attributes:
        settled: Whether the generation is certified, and nothing is left to do before a step.
    """

    def __init__(self, engine: "Engine") -> None:
        self._engine, self.settled = engine, False
        # Digests of this generation's blocks, made while others were on their way.
        self._known: dict[int, str] = {}

    def start(self, view: View) -> None:
        """Enters the first generation that this rank is a member of."""
        deadline = Deadline(self._engine.settings.recovery_s)
        try:
            self.enter(view, deadline)
        except (CollectiveError, DeadlineError) as error:
            self.recover(error)

    def recover(self, error: Exception) -> None:
        """Goes on with those that are left, from the newest step that any of them saw committed.

        Afterwards `Engine.step` says which that is, and the model is as after it.

        Args:
            error: What went wrong.

        Raises:
            CollectiveError: The run cannot go on.
            DeadlineError: Nothing was agreed within `recovery_s`.
            StateError: Blocks were lost with all their holders.
        """
        engine = self._engine
        deadline = Deadline(engine.settings.recovery_s)
        with telemetry.span("elastic.recover", step=engine.step, reason=_first_line(error)):
            while True:
                self.regroup(_first_line(error), deadline)
                try:
                    self.enter(engine.view, deadline)
                    return
                except (CollectiveError, DeadlineError) as another:
                    if engine.membership.gone():
                        deadline = Deadline(engine.settings.recovery_s)  # one more loss
                    deadline.check(f"a generation that lasts ({_first_line(another)})")
                    error = another

    def regroup(self, reason: str, deadline: Deadline) -> None:
        """Drops all groups, then agrees on the next generation."""
        engine, self.settled = self._engine, False
        with telemetry.span("elastic.regroup", step=engine.step):
            engine.drop_groups()
            engine.torn = engine.torn or engine.restoring
            standing = Standing(engine.view.generation, engine.step, reason)
            engine.view = engine.membership.regroup(standing, deadline)

    def enter(self, view: View, deadline: Deadline) -> None:
        """Connects the members of a generation, and goes on from where they stand.

        Raises:
            CollectiveError: A member is gone: regroup again.
            DeadlineError: A member did not do its part in time; likewise.
            StateError: What they have does not make a whole state.
        """
        engine = self._engine
        engine.view, engine.since = view, 0
        self._known = {}
        # Nobody is to blame for how long a recovery takes, whatever it was in before.
        engine.phase("idle")
        nccl = engine.settings.links == "nccl"
        device = engine.device if nccl else None
        with telemetry.span("elastic.connect", step=engine.step, members=view.world_size):
            transport = connect_ranks(engine.membership, view, deadline, device)
        staged = engine.device is not None and not nccl and view.world_size > 1
        engine.transport = Staged(transport) if staged else transport
        engine.check()  # a loss that was told before there was a transport to close
        points.point(REGROUPED, step=engine.step)
        said = share_json(engine.transport, self._hello().to_json(), deadline, tag=HELLO_TAG)
        roll = read_roll(said)
        engine.updater.nodes = roll.nodes
        again = roll.torn or not roll.committed
        if not again:
            roll.check(view.step)
            self._catch_up(roll, deadline)
            points.point(CAUGHT_UP, step=engine.step)
            engine.roles = dict(roll.roles)
            again = not self.arrange(roll, deadline)
        if again:
            # What is restored may be large: that is no matter of a recovery's budget.
            deadline = Deadline(max(engine.settings.step_timeout_s, deadline.remaining()))
            self._begin_run(roll, deadline)
            self.settle(deadline)
            return
        self._certify(deadline)
        if engine.saving is not None:
            engine.saving.attach(engine.membership, view, deadline)
        self.settled = True

    def arrange(self, roll: Roll, deadline: Deadline) -> bool:
        """Brings blocks to their holders, and parameters to those that lack the last update.

        While that is on its way, all is prepared that does not wait for it.

        Returns:
            False where blocks are lost, and all can be restored.
        """
        engine = self._engine

        def meanwhile(there: Collection[int]) -> None:
            self._prepare()
            if engine.role == "full":
                self._known = digest_blocks(engine.view, engine.updater, there)

        with telemetry.span("elastic.arrange", step=engine.step):
            lost = engine.updater.arrange(
                engine.view.members,
                roll.spare,
                roll.owned,
                roll.held,
                roll.stale,
                engine.transport,
                deadline,
                meanwhile,
            )
        if lost and engine.saving is None:
            names = ", ".join(sorted({block.name for block in lost})[:3])
            raise StateError(
                f"{len(lost)} blocks of the optimizer's state ({names}, ...) were lost with all "
                "their holders: raise redundancy= to survive more losses at a time"
            )
        if not lost and engine.role != "new":
            engine.fresh = engine.step
        return not lost

    def settle(self, deadline: Deadline) -> None:
        """Once it is certain that all is well, lets go of what is not needed; ready to compute.

        Raises:
            CertificateError: Something has no owner, or several, or copies differ.
        """
        self.settled = False
        self._prepare()
        self._certify(deadline)
        self.settled = True

    def _prepare(self) -> None:
        with telemetry.span("elastic.prepare", step=self._engine.step):
            self._make_reducer()

    def _certify(self, deadline: Deadline) -> None:
        engine = self._engine
        full = engine.full()
        claim, known = None, self._known
        self._known = {}
        with telemetry.span("elastic.certify", step=engine.step):
            if engine.role == "full":
                claim = make_claim(
                    engine.view,
                    engine.step,
                    engine.updater,
                    engine.reducer.order,
                    engine.replicated,
                    known,
                ).to_json()
            said = share_json(engine.transport, claim, deadline, tag=CONFIRM_TAG)
            claims = [Claim.from_json(each) for each in said if each is not None]
            engine.certificate = certify_members(
                engine.view, full, claims, engine.updater, engine.settings.micro_batches
            )
        engine.updater.drop()
        if engine.journal is not None:
            digest = engine.certificate.digest
            engine.journal.note_change(engine.view, full, engine.step, digest)

    def _begin_run(self, roll: Roll, deadline: Deadline) -> None:
        """All begin with the model of one rank, or with what was saved last."""
        engine = self._engine
        transport, replicated = engine.transport, engine.replicated
        lead = roll.witness if roll.experienced else 0
        digests = share_json(transport, replicated.digest(), deadline, tag=HELLO_TAG)
        if len(set(digests)) > 1:
            outgoing: dict[int, bytes] = {}
            if transport.rank == lead:
                outgoing = dict.fromkeys(range(transport.size), replicated.pack(model=True))
            found = deliver(transport, outgoing, deadline, tag=MODEL_TAG)
            if lead in found:
                replicated.unpack(found[lead])
        engine.updater.start(engine.view.members, transport)
        step = 0
        if engine.saving is not None:
            engine.restoring = True  # until all have
            engine.saving.attach(engine.membership, engine.view, deadline)
            step = engine.saving.restore()
            share_json(transport, "restored", deadline, tag=CONFIRM_TAG)
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
        engine.step, engine.fresh, engine.decision, engine.pending = step, step, None, None
        engine.torn = engine.restoring = False
        engine.role = "full"
        engine.roles = dict.fromkeys(engine.view.members, "full")

    def _catch_up(self, roll: Roll, deadline: Deadline) -> None:
        """Tells those that have not heard of it what was decided last; they apply it."""
        if all(hello.committed == roll.committed for hello in roll.experienced):
            return
        engine = self._engine
        rank, decision = engine.transport.rank, engine.decision
        said = decision.to_json() if rank == roll.witness and decision is not None else None
        told = share_json(engine.transport, said, deadline, tag=DECISION_TAG)[roll.witness]
        if engine.role != "new" and engine.step < roll.committed:
            if engine.pending is None or told is None or told["step"] != engine.step:
                raise StateError(
                    f"rank {rank} was not prepared for step {engine.step}, which was committed: it "
                    "cannot go on"
                )
            engine.apply(Decision.from_json(told))

    def _make_reducer(self) -> None:
        engine = self._engine
        engine.close_reducer()
        engine.pending = None  # nobody has seen it committed, and its memory is used again
        settings = engine.settings
        leaves = -(-settings.micro_batches // settings.group)
        members = engine.view.members
        busy = [r for r, m in enumerate(members) if engine.roles[m] == "full"][:leaves]
        idle = set(range(len(members))) - set(busy)
        placement = engine.updater.placement
        place = {member: rank for rank, member in enumerate(members)}
        engine.owners = [place[owner] for owner in placement.partition.owners]
        engine.reducer = GradientReducer(
            engine.parameters,
            settings.micro_batches,
            assign(leaves, len(members), idle=idle),
            engine.transport,
            group=settings.group,
            segments=engine.updater.segments(),
            consistency=settings.consistency,
            whole=engine.updater.whole,
            ordered=settings.links == "nccl",
            before=getattr(engine, "reducer", None),
            check=engine.check,
        )

    def _hello(self) -> Hello:
        engine = self._engine
        owned, held = [], set(engine.updater.held)
        if engine.role == "full" and held:
            # What was on its way when a recovery was cut short is not here.
            owned = [i for i in engine.updater.placement.partition.of(engine.view.me) if i in held]
        return Hello(
            engine.view.me,
            engine.role,
            engine.step,
            engine.fresh,
            to_mask(owned),
            to_mask(held),
            engine.torn,
            node_name(),
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300]
