"""What happens between two steps: saving, members that come and go, blocks that move to them."""

from planaria import telemetry
from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.elastic.engine import Engine
from planaria.elastic.generations import CONFIRM_TAG
from planaria.elastic.preemption import agree
from planaria.elastic.reduction.messages import MESSAGES_TAG, deliver, share_json
from planaria.elastic.way_out import WayOut

WELCOME = points.declare("elastic.session.welcome", "before one that joins is sent what all have")
PROMOTE = points.declare("elastic.session.promote", "before who has looked on gets blocks and work")

WELCOME_TAG = MESSAGES_TAG + 6


class Boundary:
    """Everything that is not a step, and no recovery.

    A member that joins looks on for a step, or several where it is to hold much: it is sent what
    all ranks have alike, gets the parameters as all do when the step is spread, and meanwhile the
    blocks that it is to hold. The others do not wait for it.

    Args:
        engine: The rank's engine.

    Attributes:
        left: Whether this member has gone.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._way_out = WayOut(engine)
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
        ended = ended or bool(engine.view.last)
        newcomer = engine.role == "new"
        if "new" in engine.roles.values():
            if self._welcome(ended, deadline):
                self._look_on(deadline)
                return True
            ended = True  # as one that is new has just heard
        self._save(deadline, ended=ended, newcomer=newcomer)
        if ended:
            return False
        if leaving is not None:
            self._way_out.take(leaving, deadline)
            if not leaving.staying:
                return False
            if engine.view.me in leaving.members:
                self._leave(deadline)
                return False
        if leaving is not None or (decision is not None and "join" in decision.changes):
            budget = Deadline(engine.settings.recovery_s)
            engine.since = 0
            with telemetry.span("elastic.change", step=engine.step):
                engine.generations.regroup("members join or leave", budget)
                engine.generations.enter(engine.view, budget)
            if engine.view.last or "new" in engine.roles.values():
                return self.cross()
        self._look_on(deadline)
        return True

    def _save(self, deadline: Deadline, *, ended: bool, newcomer: bool) -> None:
        """Saves what is due, where all ranks have the state of the last step.

        The last save is waited for, by all: whoever is lost before that is one more loss, after
        which the others save again.
        """
        engine = self._engine
        if engine.saving is None:
            return
        if not ended:
            if engine.since:
                engine.saving.step(engine.step, engine.metrics())
            return
        # Nothing would be lost with one that has only just been sent everything.
        there = newcomer or engine.saving.has(engine.step)
        mine = [there, engine.saving.begun(engine.step)]
        said = share_json(engine.transport, mine, deadline, tag=CONFIRM_TAG)
        if not all(there for there, _ in said):
            begun = all(begun for _, begun in said)
            engine.saving.last(engine.step, engine.metrics(), engine.check, deadline, begun=begun)
            # Nobody ends before all know.
            share_json(engine.transport, "saved", deadline, tag=CONFIRM_TAG)

    def _welcome(self, ended: bool, deadline: Deadline) -> bool:
        """Sends those that are new all but the blocks; they look on for a step.

        Where there is none any more they are sent the parameters, too: they take part in the last
        save.
        """
        engine = self._engine
        points.point(WELCOME, step=engine.step)
        members, roles = engine.view.members, engine.roles
        lead = next(r for r, member in enumerate(members) if roles[member] != "new")
        outgoing: dict[int, bytes] = {}
        if engine.transport.rank == lead:
            new = [r for r, member in enumerate(members) if roles[member] == "new"]
            outgoing = dict.fromkeys(new, engine.replicated.pack(model=ended))
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

    def _look_on(self, deadline: Deadline) -> None:
        """Has those that look on sent their share of the blocks; those that have it take part."""
        engine = self._engine
        if "observer" not in engine.roles.values():
            return
        if not (engine.since and engine.updater.ready):
            speed = engine.meter.bandwidths()["hand_over"]
            budget = None if speed is None or not engine.compute_s else speed * engine.compute_s
            with telemetry.span("elastic.send_ahead", step=engine.step):
                engine.updater.send_ahead(deadline, budget)
            return
        points.point(PROMOTE, step=engine.step)
        with telemetry.span("elastic.promote", step=engine.step):
            engine.updater.promote()
            engine.role = "full"
            engine.roles = dict.fromkeys(engine.roles, "full")
            engine.generations.settle(deadline)

    def _leave(self, deadline: Deadline) -> None:
        """Goes. What others need of this member they have."""
        engine = self._engine
        self.left = True
        engine.drop_groups()
        if engine.saving is not None:
            engine.saving.close()
        engine.membership.leave("preempted", deadline)
