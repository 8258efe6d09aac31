"""One generation's ranks: connected once all of them are there, dropped before the next."""

import time
from typing import TYPE_CHECKING, Any

from planaria.core.deadline import Deadline
from planaria.elastic.membership.view import Membership, View
from planaria.elastic.reduction.sockets import open_sockets
from planaria.elastic.reduction.transport import Alone, GroupTransport, Transport, own_group
from planaria.errors import CollectiveError

if TYPE_CHECKING:
    from torch.distributed import Store

#: Between two looks at who is there: at first, and at most.
POLL_S = 0.0005, 0.02


def connect_ranks(membership: Membership, view: View, deadline: Deadline) -> Transport:
    """Connects the members of a generation.

    gloo waits its whole timeout for a rank that dies while groups are made. So all say first that
    they are there, and a wait for one that is gone ends at once.

    Args:
        membership: This member's place.
        view: The generation.
        deadline: Until when all must be there.

    Raises:
        CollectiveError: A member is gone.
        DeadlineError: A member did not turn up in time.
    """
    if view.world_size == 1:
        return Alone()
    await_members(membership, view, membership.store(view, "ready"), deadline)
    store = membership.store(view, "session")
    before = open_sockets()
    group = own_group(store, view.rank, view.world_size, max(deadline.remaining(), 0.1))
    transport = GroupTransport(group)
    transport.watch(before, deadline)
    return transport


def await_members(membership: Membership, view: View, store: "Store", deadline: Deadline) -> None:
    """Says on a store that this member is there, and waits for the others.

    Raises:
        CollectiveError: A member is gone, or the store is.
        DeadlineError: A member did not turn up in time.
    """
    missing = [member for member in view.members if member != view.me]
    pause, most = POLL_S
    _guard(store.set, str(view.me), "")
    while missing:
        missing = [m for m in missing if not _guard(store.check, [str(m)])]
        if lost := membership.gone() & set(missing):
            raise CollectiveError(
                f"members {sorted(lost)} of generation {view.generation} are gone already"
            )
        deadline.check(f"members {missing} of generation {view.generation} to turn up")
        if missing:
            time.sleep(pause)
            pause = min(most, pause * 1.5)


def _guard(call: Any, *args: Any) -> Any:
    try:
        return call(*args)
    except RuntimeError as error:
        raise CollectiveError(
            f"the store of the generation does not answer ({str(error).splitlines()[0]})"
        ) from error
