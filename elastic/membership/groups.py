"""A generation's process groups: made without waiting for members that die meanwhile."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from planaria.errors import CollectiveError

if TYPE_CHECKING:
    from planaria.core.deadline import Deadline
    from planaria.elastic.membership.view import Membership, View
    from planaria.elastic.reduction.gloo import GlooGroup

_LOOK_UP_S = 0.005


def make_group(membership: Membership, view: View, name: str, deadline: Deadline) -> GlooGroup:
    """Makes a gloo group of a generation's members, outside torch's registry of groups.

    gloo waits for each member until its timeout, and nothing can wake it. So that is done in a
    thread of its own, which is left to itself when a member is lost; what it has connected by then
    is broken.

    Args:
        membership: This process's place.
        view: The generation.
        name: Of the group; no other of the generation has it.
        deadline: In which all members have to turn up; also the group's timeout.

    Raises:
        CollectiveError: A member was lost, or others regroup.
        DeadlineError: Some member did not turn up.
    """
    from planaria.elastic.reduction.gloo import GlooGroup

    making: list[GlooGroup] = []
    failed: list[BaseException] = []
    done = threading.Event()
    left = threading.Event()

    def make() -> None:
        try:
            store = membership.store(view, name)
            seconds = max(deadline.remaining(), 0.001)
            making.append(GlooGroup(store, view.rank, view.world_size, seconds))
            if not left.is_set():
                making[0].make()
        except BaseException as error:
            failed.append(error)
        done.set()

    def give_up() -> None:
        left.set()
        if making:
            making[0].close()

    what = f"the group of generation {view.generation}"
    threading.Thread(target=make, name=f"planaria-group-{view.generation}", daemon=True).start()
    try:
        while not done.wait(_LOOK_UP_S):
            if membership.disturbed():
                raise _regrouping(membership, what)
            deadline.check(what)
        if failed:
            if deadline.expired:
                raise deadline.error(what) from failed[0]
            raise failed[0]
        if membership.disturbed():
            # Whoever is told of losses from now on finds the group; this one came before.
            raise _regrouping(membership, what)
    except BaseException:
        give_up()
        raise
    return making[0]


def _regrouping(membership: Membership, what: str) -> CollectiveError:
    gone = ", ".join(map(str, sorted(membership.gone()))) or "none of them"
    return CollectiveError(f"no {what[4:]}: members regroup, lost: {gone}")
