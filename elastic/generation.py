"""One generation's ranks: connected once all of them are there, dropped before the next."""

from planaria.core.deadline import Deadline
from planaria.elastic.membership.groups import make_group
from planaria.elastic.membership.view import Membership, View
from planaria.elastic.reduction.transport import Alone, GroupTransport, Transport


def connect_ranks(membership: Membership, view: View, deadline: Deadline) -> Transport:
    """Connects the members of a generation.

    A loss from then on has to close the transport; one before it was handed out may have found
    nothing to close yet, so ask `membership.disturbed()` once more before waiting in it.

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
    return GroupTransport(make_group(membership, view, "session", deadline))
