"""What happens between two steps: saving, members that come and go, blocks that move to them."""

import math
from collections.abc import Sequence

from planaria import telemetry
from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.elastic.engine import Engine
from planaria.elastic.generations import CONFIRM_TAG
from planaria.elastic.preemption import Leaving, agree
from planaria.elastic.reduction.messages import MESSAGES_TAG, deliver, share_json

WELCOME = points.declare("elastic.session.welcome", "before one that joins is sent what all have")
HAND_OVER = points.declare("elastic.session.hand_over", "before blocks of those that go are sent")

WELCOME_TAG = MESSAGES_TAG + 6


class Boundary:
    """Everything that is not a step, and no recovery.

    A member that joins looks on for one step: it is sent what all ranks have alike, gets the
    parameters as all do when the step is spread, and only then blocks of its own. The others do
    not wait for it meanwhile.

    Args:
        engine: The rank's engine.

    Attributes:
        left: Whether this member has gone.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.left = False

    def cross(self, *, ended: bool = False) -> bool:
        """Does what there is to do before the next step; all members call it.

        Args:
            ended: Whether there is no further step; those that wait are told.

        Returns:
            Whether there is a further step for this member.

        Raises:
            CollectiveError: A rank is gone: `Generations.recover`, then call it again.
            DeadlineError: Some rank did not do its part in time; likewise.
        """
        engine = self._engine
        engine.phase("idle")
        deadline = Deadline(engine.settings.step_timeout_s)
        decision = engine.decision if engine.since else None
        leaving = None
        if decision is not None:
            graces = dict(zip(engine.view.members, decision.graces, strict=True))
            leaving = agree(graces)
            ended = ended or (leaving is not None and not leaving.staying)
        self._save(deadline, ended=ended)
        if decision is not None and not ended:
            if leaving is not None:
                self._hand_over(leaving, deadline)
                if self.left:
                    return False
            if leaving is not None or "join" in decision.changes:
                budget = Deadline(engine.settings.recovery_s)
                engine.since = 0
                with telemetry.span("elastic.change", step=engine.step):
                    engine.generations.regroup("members join or leave", budget)
                    engine.generations.enter(engine.view, budget)
        if "new" in engine.roles.values():
            return self._welcome(ended, deadline)
        if "observer" in engine.roles.values() and engine.since and not ended:
            self._promote(deadline)
        return not ended

    def _save(self, deadline: Deadline, *, ended: bool) -> None:
        """Saves what is due, where all ranks have the state of the last step.

        The last save is waited for, by all: whoever is lost before that is one more loss, after
        which the others save again.
        """
        engine = self._engine
        if engine.saving is None or "new" in engine.roles.values():
            return
        if not engine.since and not ended:
            return
        metrics = {} if engine.decision is None else engine.decision.metrics
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if not ended:
            engine.saving.step(engine.step, finite)
            return
        there = engine.saving.has(engine.step)
        if not all(share_json(engine.transport, there, deadline, tag=CONFIRM_TAG)):
            engine.saving.last(engine.step, finite, engine.check, deadline)
            # Nobody ends before all know.
            share_json(engine.transport, "saved", deadline, tag=CONFIRM_TAG)

    def _welcome(self, ended: bool, deadline: Deadline) -> bool:
        """Sends those that are new all but the blocks; they look on for a step."""
        engine = self._engine
        points.point(WELCOME, step=engine.step)
        members, roles = engine.view.members, engine.roles
        lead = next(r for r, member in enumerate(members) if roles[member] != "new")
        outgoing: dict[int, bytes] = {}
        if engine.transport.rank == lead:
            new = [r for r, member in enumerate(members) if roles[member] == "new"]
            outgoing = dict.fromkeys(new, engine.replicated.pack())
        found = deliver(engine.transport, outgoing, deadline, tag=WELCOME_TAG)
        said = share_json(engine.transport, [engine.step, ended], deadline, tag=CONFIRM_TAG)
        step, ended = said[lead]
        carried = engine.updater.carried
        if engine.role == "new":
            engine.replicated.unpack(found[lead])
            engine.step, engine.fresh = step, step if carried else -1
            engine.role = "full" if carried else "observer"
        for member, role in roles.items():
            if role == "new":
                roles[member] = "full" if carried else "observer"
        engine.since = 0
        if carried:
            engine.generations.settle(deadline)
        return not ended

    def _promote(self, deadline: Deadline) -> None:
        """Gives those that have looked on their share of the blocks and of the work."""
        self._move_blocks((), deadline)
        engine = self._engine
        engine.role = "full"
        engine.roles = dict.fromkeys(engine.roles, "full")
        engine.generations.settle(deadline)

    def _hand_over(self, leaving: Leaving, deadline: Deadline) -> None:
        """Brings what those that go hold to others; then they go."""
        engine = self._engine
        points.point(HAND_OVER, step=engine.step)
        with telemetry.span("elastic.hand_over", step=engine.step, members=len(leaving.members)):
            observers = [m for m, role in engine.roles.items() if role != "full"]
            if set(leaving.staying) - set(observers):
                spare = {*leaving.members, *observers}
                self._move_blocks(sorted(spare), deadline)
            share_json(engine.transport, "handed over", deadline, tag=CONFIRM_TAG)
        if engine.view.me in leaving.members:
            self.left = True
            engine.drop_groups()
            if engine.saving is not None:
                engine.saving.close()
            engine.membership.leave("preempted", deadline)

    def _move_blocks(self, spare: Sequence[int], deadline: Deadline) -> None:
        engine = self._engine
        placement, members = engine.updater.placement, engine.view.members
        owned = {member: placement.partition.of(member) for member in members}
        held = {member: placement.of(member) for member in members}
        engine.generations.arrange(spare, owned, held, deadline)
