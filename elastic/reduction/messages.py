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
#: So much of a message goes with its length: most are no longer, and then there is one round.
HEAD_BYTES = 4096 - 8


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
    others = [peer for peer in range(size) if peer != rank]
    # The same message goes to most: it is made into tensors once.
    made: dict[bytes, tuple[torch.Tensor, torch.Tensor | None]] = {}
    for peer in others:
        message = outgoing.get(peer, b"")
        if message not in made:
            made[message] = _head(message), _rest(message)
    mine = {peer: made[outgoing.get(peer, b"")] for peer in others}
    heads = {peer: torch.empty(8 + HEAD_BYTES, dtype=torch.uint8) for peer in others}
    transport.exchange(
        tag,
        [[mine[peer][0]] if peer != rank else [] for peer in range(size)],
        [[heads[peer]] if peer != rank else [] for peer in range(size)],
    )(deadline)
    said = {peer: head.numpy().tobytes() for peer, head in heads.items()}
    lengths = {peer: int.from_bytes(head[:8], "little") for peer, head in said.items()}
    rests = {
        peer: torch.empty(length - HEAD_BYTES, dtype=torch.uint8)
        for peer, length in lengths.items()
        if length > HEAD_BYTES
    }
    sent = {peer: rest for peer, (_, rest) in mine.items() if rest is not None}
    if sent or rests:
        transport.exchange(
            tag + 1,
            [[sent[peer]] if peer in sent else [] for peer in range(size)],
            [[rests[peer]] if peer in rests else [] for peer in range(size)],
        )(deadline)
    return {
        peer: said[peer][8 : 8 + length] + (rests[peer].numpy().tobytes() if peer in rests else b"")
        for peer, length in lengths.items()
        if length
    }


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


def _head(message: bytes) -> "torch.Tensor":
    """The length of a message, and its beginning."""
    import torch

    length = len(message).to_bytes(8, "little")
    data = bytearray(length + message[:HEAD_BYTES].ljust(HEAD_BYTES, b"\0"))
    return torch.frombuffer(data, dtype=torch.uint8)


def _rest(message: bytes) -> "torch.Tensor | None":
    """What the head has no room for."""
    import torch

    if len(message) <= HEAD_BYTES:
        return None
    return torch.frombuffer(bytearray(memoryview(message)[HEAD_BYTES:]), dtype=torch.uint8)
