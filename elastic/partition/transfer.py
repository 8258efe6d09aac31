"""Blocks on their way from rank to rank: what `plan_moves` or `fills` has planned, carried out."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.elastic.partition.moves import Move, TransferPlan
from planaria.elastic.partition.optimizer import ShardedOptimizer
from planaria.elastic.reduction.messages import deliver
from planaria.elastic.reduction.transport import Transport

SEND = points.declare("elastic.partition.send", "before a round of blocks is sent to other holders")

#: Tags of rounds of moves.
MOVES_TAG = (1 << 30) + (1 << 20)

_VALUES = "values"


def transfer(
    plan: TransferPlan,
    ranks: Iterable[int],
    optimizer: ShardedOptimizer,
    transport: Transport,
    deadline: Deadline,
) -> int:
    """Sends and receives what is planned, round by round; all ranks call it.

    The optimizer has the new blocks beside its own then; `ShardedOptimizer.drop` lets go of what
    is no longer needed. Where it fails nothing is lost: who had a block still has it.

    Args:
        plan: What is sent.
        ranks: The names that the plan has for the transport's ranks, in their order.
        optimizer: What has the blocks, and gets them.
        transport: The ranks.
        deadline: Until when all must be there.

    Returns:
        How many bytes this rank has received.

    Raises:
        CollectiveError: A rank is gone.
        DeadlineError: A rank sent nothing in time.
    """
    place = {rank: i for i, rank in enumerate(ranks)}
    received = 0
    for number, moves in enumerate(plan.rounds()):
        points.point(SEND)
        mine = [move for move in moves if place[move.source] == transport.rank]
        outgoing = {place[mine[0].target]: pack(mine, optimizer)} if mine else {}
        found = deliver(transport, outgoing, deadline, tag=MOVES_TAG + 2 * number)
        for data in found.values():
            received += len(data)
            for index, state in unpack(data).items():
                optimizer.load(index, state)
    return received


def pack(moves: Iterable[Move], optimizer: ShardedOptimizer) -> bytes:
    """The state of some blocks as bytes (safetensors)."""
    import torch
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for index in dict.fromkeys(move.index for move in moves):
        for slot, value in optimizer.export(index).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{slot}"] = value.contiguous()
            else:
                values[f"{index}.{slot}"] = value
    text = bytearray(json.dumps(values).encode())
    return save({**tensors, _VALUES: torch.frombuffer(text, dtype=torch.uint8)})


def unpack(data: bytes) -> dict[int, Mapping[str, Any]]:
    """What :func:`pack` has packed, by block."""
    from safetensors.torch import load

    tensors: dict[str, Any] = load(data)
    values = json.loads(tensors.pop(_VALUES).numpy().tobytes())
    found: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **values}.items():
        index, _, slot = key.partition(".")
        found.setdefault(int(index), {})[slot] = value
    return dict(found)
