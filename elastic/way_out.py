"""A preemption, carried out: members that have to go bring to safety what would be lost with them.

All members tell each other how long there is, how much there would be to move, and how fast it went
before; so all choose the same way (`grace`). Handing over sends only the blocks that nobody else
holds: those that stay fill the copies up among themselves, once the others have gone.
"""

import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from planaria import telemetry
from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.elastic.grace import Choice, Way, choose
from planaria.elastic.preemption import Leaving
from planaria.elastic.reduction.messages import MESSAGES_TAG, share_json
from planaria.elastic.updates import BlockUpdater
from planaria.errors import CollectiveError, DeadlineError

if TYPE_CHECKING:
    from planaria.elastic.engine import Engine

logger = logging.getLogger(__name__)

HAND_OVER = points.declare("elastic.session.hand_over", "before blocks of those that go are sent")

PLAN_TAG = MESSAGES_TAG + 10
#: What has no time left still gets this many seconds: a wait of none would not even look.
_LEAST_S = 0.05


class WayOut:
    """Brings to safety what those that go hold, in the time that they have.

    Args:
        engine: The rank's engine.
    """

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine

    def take(self, leaving: Leaving, deadline: Deadline) -> None:
        """Chooses a way and takes it; all members call it. Afterwards those that go may do so.

        Where the time was too short for it that is logged: what is lost then is done again from
        what was saved before.

        Args:
            leaving: Who goes.
            deadline: Until when members must have told each other what they have.

        Raises:
            CollectiveError: A member is gone.
            DeadlineError: A member said nothing in time.
        """
        engine = self._engine
        with telemetry.span("elastic.way_out", step=engine.step, members=len(leaving.members)):
            said = share_json(engine.transport, self._say(leaving), deadline, tag=PLAN_TAG)
            left = [each["grace_s"] for each in said if each["grace_s"] is not None]
            grace_s = min(left, default=leaving.grace_s)
            choice = _choose(grace_s, said, handed=bool(self._heirs(leaving)))
            logger.info("members %s have to go: %s", list(leaving.members), choice.says)
            telemetry.event("elastic.way_out", way=choice.way or "none", grace_s=grace_s,
                            step=engine.step, lost_steps=choice.lost_steps)  # fmt: skip
            until = Deadline(max(grace_s, _LEAST_S))
            try:
                begun = all(choice.way in each["begun"] for each in said)
                self._go(choice.way, leaving, until, begun=begun)
                # Nobody goes before all are done.
                share_json(engine.transport, "out", until, tag=PLAN_TAG)
            except DeadlineError as error:
                if not until.expired:
                    raise
                logger.warning("the grace of %.1f s was too short: %s", grace_s, error)
                return
            # And not before all know it: who goes breaks connections that others still hear it by.
            # Whoever is past here may go, whatever becomes of the others.
            with suppress(CollectiveError, DeadlineError):
                share_json(engine.transport, "heard", until, tag=PLAN_TAG)

    def _go(self, way: Way | None, leaving: Leaving, until: Deadline, *, begun: bool) -> None:
        engine = self._engine
        if way == "hand_over":
            points.point(HAND_OVER, step=engine.step)
            engine.updater.hand_over(leaving.members, self._heirs(leaving), until)
        elif way is not None:
            assert engine.saving is not None
            memory = way == "parity"
            engine.saving.last(
                engine.step, engine.metrics(), engine.check, until, begun=begun, memory=memory
            )

    def _heirs(self, leaving: Leaving) -> list[int]:
        """Members that stay, and can be given blocks."""
        return [m for m in leaving.staying if self._engine.roles[m] == "full"]

    def _say(self, leaving: Leaving) -> dict[str, Any]:
        """What this member knows, for all to choose by."""
        engine, saving, heirs = self._engine, self._engine.saving, self._heirs(leaving)
        sizes: dict[str, int] = {}
        if heirs:
            sizes["hand_over"] = engine.updater.sole_bytes(leaving.members, heirs)
        begun: list[str] = []
        if saving is not None:
            begun = [way for way, memory in (("storage", False), ("parity", True))
                     if saving.begun(engine.step, memory=memory)]  # fmt: skip
            held = _owned_bytes(engine.updater) if isinstance(engine.updater, BlockUpdater) else 0
            whole = sum(p.numel() * p.element_size() for p in engine.parameters.values())
            size = saving.nbytes or held + whole // engine.transport.size
            sizes["storage"] = size
            if saving.in_memory:
                sizes["parity"] = size
        return {
            "grace_s": engine.grace() if engine.view.me in leaving.members else None,
            "sizes": sizes,
            "speeds": engine.meter.bandwidths(),
            "begun": begun,
            "unsaved": engine.step - (0 if saving is None else saving.durable),
        }


def _choose(grace_s: float, said: list[Mapping[str, Any]], *, handed: bool) -> Choice:
    """What all members choose, from what all of them say: a pure function.

    Args:
        grace_s: Seconds that are left.
        said: What each member has said.
        handed: Whether anybody stays. Where nobody does the nodes may go, too, so their memory is
            the last resort.
    """
    ways: list[Way] = [w for w in ("hand_over", "parity", "storage")
                       if all(w in each["sizes"] for each in said)]  # fmt: skip
    sizes: dict[Way, int] = {way: max(each["sizes"][way] for each in said) for way in ways}
    speeds: dict[Way, float | None] = {}
    for way in ways:
        found = [v for each in said if (v := each["speeds"].get(way)) is not None]
        speeds[way] = min(found, default=None)
    unsaved = max(0, *(int(each["unsaved"]) for each in said))
    if not handed and "storage" in sizes:
        durable = choose(grace_s, {"storage": sizes["storage"]}, speeds, unsaved_steps=unsaved)
        if durable.way is not None:
            return durable
    return choose(grace_s, sizes, speeds, unsaved_steps=unsaved)


def _owned_bytes(updater: BlockUpdater) -> int:
    return sum(updater.state_bytes(index) for index in updater.sharded.owned)
