"""Messages of any length between ranks: bytes, and JSON. Never pickled objects."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from planaria.core.deadline import Deadline
from planaria.elastic.reduction.transport import Transport

if TYPE_CHECKING:
    import torch

#: Tags of messages: each takes two. Buckets count from 0, parameters from 1 << 29.
MESSAGES_TAG = (1 << 30) + 1024


def deliver(
    transport: Transport, outgoing: Mapping[int, bytes], deadline: Deadline, *, tag: int
) -> dict[int, bytes]:
    """Sends bytes to some ranks, and receives what others have for this one; all ranks call it.

    Args:
        transport: The ranks.
        outgoing: What goes to whom.
        deadline: Until when all must be there.
        tag: Of the exchange, as for :meth:`Transport.exchange`; the next one is used, too.

    Returns:
        What came from whom; those that sent nothing are left out.

    Raises:
        CollectiveError: A rank is gone.
        DeadlineError: A rank sent nothing in time.
    """
    import torch

    rank, size = transport.rank, transport.size
    data = {peer: _tensor(message) for peer, message in outgoing.items() if peer != rank}
    lengths = [torch.tensor([len(outgoing.get(peer, b""))]) for peer in range(size)]
    due = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    others = [peer for peer in range(size) if peer != rank]
    transport.exchange(
        tag,
        [[lengths[peer]] if peer != rank else [] for peer in range(size)],
        [[due[peer]] if peer != rank else [] for peer in range(size)],
    )(deadline)
    found = {p: torch.empty(int(due[p]), dtype=torch.uint8) for p in others if int(due[p])}
    transport.exchange(
        tag + 1,
        [[data[peer]] if peer in data else [] for peer in range(size)],
        [[found[peer]] if peer in found else [] for peer in range(size)],
    )(deadline)
    return {peer: message.numpy().tobytes() for peer, message in found.items()}


def share_json(transport: Transport, value: Any, deadline: Deadline, *, tag: int) -> list[Any]:
    """Every rank's JSON value, in rank order, on every rank; numbers keep all their bits.

    Raises:
        CollectiveError: A rank is gone.
        DeadlineError: A rank sent nothing in time.
    """
    mine = json.dumps(value).encode()
    found = deliver(transport, dict.fromkeys(range(transport.size), mine), deadline, tag=tag)
    found[transport.rank] = mine
    return [json.loads(found[rank]) for rank in range(transport.size)]


def _tensor(data: bytes) -> "torch.Tensor":
    import torch

    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
