"""Blocks on their way from rank to rank: what `plan_moves` or `fills` has planned, carried out.

What a holder has of a block does not change from one update to the next. So it is sent from the
block itself, and may be sent ahead, while a step is computed: nobody waits for it before the update
of that step is due. Who gets it then is a shadow of it in that step: it is sent the gradient, too,
and makes the same update. At the next boundary it has what the owner has.
"""

import json
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.elastic.partition.moves import Move
from planaria.elastic.partition.optimizer import ShardedOptimizer
from planaria.elastic.reduction.messages import deliver
from planaria.elastic.reduction.transport import Transport, Wait

if TYPE_CHECKING:
    import torch

SEND = points.declare("elastic.partition.send", "before ranks say which blocks they send whom")
UNDER_WAY = points.declare("elastic.partition.under_way", "blocks are on their way to others")
ARRIVED = points.declare("elastic.partition.arrived", "blocks are here, and not taken over yet")

#: Tags of what is announced, and of the blocks.
MOVES_TAG = (1 << 30) + (1 << 20)
#: However slow the links seem to be, in each step goes so much ahead, in bytes and as a share.
LEAST_BYTES = 16 << 20
LEAST_SHARE = 1 / 8

Pair = tuple[int, int]


class Transfer:
    """Blocks on their way, at once or in several steps; all ranks make the same calls.

    The optimizer has the new blocks beside its own then; `ShardedOptimizer.drop` lets go of what is
    no longer needed. Where it fails nothing is lost: who had a block still has it.

    Args:
        moves: All that is to be sent.
        ranks: The names that the moves have for the transport's ranks, in their order.
        optimizer: What has this rank's blocks, and gets them.
        transport: The ranks.
    """

    def __init__(
        self,
        moves: Iterable[Move],
        ranks: Sequence[int],
        optimizer: ShardedOptimizer,
        transport: Transport,
    ) -> None:
        self._optimizer, self._transport = optimizer, transport
        place = {rank: i for i, rank in enumerate(ranks)}
        self._left: dict[Pair, list[Move]] = {}
        ends: dict[tuple[str, int], int] = {}
        for move in moves:
            pair = place[move.source], place[move.target]
            self._left.setdefault(pair, []).append(move)
            for end in zip(("from", "to"), pair, strict=True):
                ends[end] = ends.get(end, 0) + move.block.nbytes
        self._total = {pair: _size(found) for pair, found in self._left.items()}
        # Of what a rank's links carry, the part of a pair's.
        self._share = {
            (a, b): size / max(ends["from", a], ends["to", b], 1)
            for (a, b), size in self._total.items()
        }
        self._wait: Wait | None = None
        self._coming: dict[int, dict[str, Any]] = {}

    @property
    def done(self) -> bool:
        """Whether everything is where it is to be."""
        return not self._left and self._wait is None

    def start(self, deadline: Deadline, budget: float | None = None) -> None:
        """Starts to send what is left, or what there is time for until the next update.

        Args:
            deadline: Until when all must have said what they send.
            budget: Bytes that this rank's links carry until then; None for everything.

        Raises:
            CollectiveError: A rank is gone.
            DeadlineError: A rank said nothing in time.
        """
        points.point(SEND)
        me, size = self._transport.rank, self._transport.size
        chosen = {pair[1]: self._choose(pair, budget) for pair in self._left if pair[0] == me}
        counts = {target: len(moves) for target, moves in chosen.items()}
        sent = {target: [self._optimizer.export(move.index) for move in moves]
                for target, moves in chosen.items()}  # fmt: skip
        said = {
            peer: json.dumps([list(counts.items()), [
                [move.index, *_describe(state)]
                for move, state in zip(chosen.get(peer, ()), sent.get(peer, ()), strict=True)
            ]]).encode()
            for peer in range(size)
        }  # fmt: skip
        found = deliver(self._transport, said, deadline, tag=MOVES_TAG)
        incoming: list[list[torch.Tensor]] = [[] for _ in range(size)]
        for source, text in found.items():
            numbers, blocks = json.loads(text)
            self._strike(source, dict(numbers))
            for index, tensors, values in blocks:
                made = {slot: _empty(*kind) for slot, *kind in tensors}
                incoming[source] += [each.view(-1) for each in made.values()]
                self._coming[index] = {**made, **values}
        self._strike(me, counts)
        outgoing = [[t for state in sent.get(peer, ()) for t in _flat(state)]
                    for peer in range(size)]  # fmt: skip
        self._wait = self._transport.exchange(MOVES_TAG + 2, outgoing, incoming)
        points.point(UNDER_WAY)

    def take(self, deadline: Deadline) -> None:
        """Waits for what is under way, and takes it over. Blocks may be updated again then.

        Raises:
            CollectiveError: A rank is gone. Nothing was taken over.
            DeadlineError: It did not come in time; likewise.
        """
        if self._wait is None:
            return
        self._wait(deadline)
        points.point(ARRIVED)
        self._wait = None
        coming, self._coming = self._coming, {}
        for index, state in coming.items():
            self._optimizer.load(index, state, copy=False)

    def _choose(self, pair: Pair, budget: float | None) -> list[Move]:
        """The next blocks of a pair: one at least, and no more than there is time for."""
        left = self._left[pair]
        if budget is None:
            return left
        room = max(budget * self._share[pair], self._total[pair] * LEAST_SHARE, LEAST_BYTES)
        count, size = 1, left[0].block.nbytes
        for move in left[1:]:
            size += move.block.nbytes
            if size > room:
                break
            count += 1
        return left[:count]

    def _strike(self, source: int, counts: dict[int, int]) -> None:
        """Notes what a rank sends now."""
        for target, count in counts.items():
            left = self._left.pop((source, target))[count:]
            if left:
                self._left[source, target] = left


def transfer(
    moves: Collection[Move],
    ranks: Sequence[int],
    optimizer: ShardedOptimizer,
    transport: Transport,
    deadline: Deadline,
) -> None:
    """Sends and receives what is planned, and waits for it; arguments as for `Transfer`.

    Raises:
        CollectiveError: A rank is gone.
        DeadlineError: A rank sent nothing in time.
    """
    if moves:
        way = Transfer(moves, ranks, optimizer, transport)
        way.start(deadline)
        way.take(deadline)


def _size(moves: Iterable[Move]) -> int:
    return sum(move.block.nbytes for move in moves)


def _describe(state: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """What the receiver has to know of a block's tensors, and all that is no tensor."""
    import torch

    tensors = [
        [slot, str(value.dtype).removeprefix("torch."), list(value.shape)]
        for slot, value in state.items()
        if isinstance(value, torch.Tensor)
    ]
    return tensors, {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}


def _flat(state: dict[str, Any]) -> "list[torch.Tensor]":
    """A block's tensors, in the host's memory: any links carry those."""
    import torch

    return [
        value.detach().cpu().contiguous().view(-1)
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]


def _empty(dtype: str, shape: list[int]) -> "torch.Tensor":
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype))
