"""One generation's ranks: connected once all of them are there, dropped before the next."""

from typing import TYPE_CHECKING

from planaria.core.deadline import Deadline
from planaria.elastic.membership.groups import make_group, make_nccl_group
from planaria.elastic.membership.view import Membership, View
from planaria.elastic.reduction.transport import Alone, GroupTransport, Transport
from planaria.elastic.reduction.waiting import settle

if TYPE_CHECKING:
    import torch

#: For what gloo still reads of a group that was given up; what it is stuck in it reads no more.
_SETTLE_S = 0.1


def connect_ranks(
    membership: Membership, view: View, deadline: Deadline, device: "torch.device | None" = None
) -> Transport:
    """Connects the members of a generation.

    A loss from then on has to close the transport; one before it was handed out may have found
    nothing to close yet, so ask `membership.disturbed()` once more before waiting in it.

    Args:
        membership: This member's place.
        view: The generation.
        deadline: Until when all must be there.
        device: This rank's CUDA device; tensors on it then go by NCCL, all others over gloo.

    Raises:
        CollectiveError: A member is gone.
        DeadlineError: A member did not turn up in time.
    """
    settle(min(_SETTLE_S, deadline.remaining()))  # most often it is long since
    if view.world_size == 1:
        return Alone()
    near = GroupTransport(make_group(membership, view, "session", deadline))
    if device is None:
        return near
    from planaria.elastic.reduction.nccl import DeviceTransport, NcclTransport

    try:
        group = make_nccl_group(membership, view, "session on devices", deadline, device)
    except BaseException:
        near.close()
        raise
    return DeviceTransport(near, NcclTransport(group))
