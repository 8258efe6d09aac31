"""One generation's ranks: connected once all of them are there, dropped before the next."""

from planaria.core.deadline import Deadline
from planaria.elastic.membership.groups import make_group
from planaria.elastic.membership.view import Membership, View
from planaria.elastic.reduction.sockets import open_sockets
from planaria.elastic.reduction.transport import Alone, GroupTransport, Transport

#: Members that are connected tell each other of their sockets in milliseconds.
_TELL_S = 10.0


def connect_ranks(membership: Membership, view: View, deadline: Deadline) -> Transport:
    """Connects the members of a generation.

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
    before = open_sockets()
    transport = GroupTransport(make_group(membership, view, "session", deadline))
    # A rank that gives up here has no sockets yet to shut down: this one would wait for it.
    transport.watch(before, deadline.sub(_TELL_S))
    return transport
