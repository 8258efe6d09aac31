"""A generation's process groups: made without waiting for members that die meanwhile."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from planaria.errors import CollectiveError

if TYPE_CHECKING:
    from planaria.core.deadline import Deadline
    from planaria.elastic.membership.view import Membership, View

_LOOK_UP_S = 0.005


def make_group(membership: Membership, view: View, name: str, deadline: Deadline) -> Any:
    """Makes a gloo group of a generation's members, outside torch's registry of groups.

    gloo waits for each member until its timeout, and nothing can wake it. So that is done in a
    thread of its own, which is left to itself when a member is lost.

    Args:
        membership: This process's place.
        view: The generation.
        name: Of the group; no other of the generation has it.
        deadline: In which all members have to turn up; also the group's timeout.

    Raises:
        CollectiveError: A member was lost, or others regroup.
        DeadlineError: Some member did not turn up.
    """
    from planaria.elastic.reduction.transport import own_group

    made: list[Any] = []
    failed: list[BaseException] = []
    done = threading.Event()

    def make() -> None:
        try:
            store = membership.store(view, name)
            left = max(deadline.remaining(), 0.001)
            made.append(own_group(store, view.rank, view.world_size, left))
        except BaseException as error:
            failed.append(error)
        done.set()

    what = f"the group of generation {view.generation}"
    threading.Thread(target=make, name=f"planaria-group-{view.generation}", daemon=True).start()
    while not done.wait(_LOOK_UP_S):
        if membership.disturbed():
            gone = ", ".join(map(str, sorted(membership.gone()))) or "none of them"
            raise CollectiveError(f"no {what[4:]}: members regroup, lost: {gone}")
        deadline.check(what)
    if failed:
        if deadline.expired:
            raise deadline.error(what) from failed[0]
        raise failed[0]
    return made[0]
