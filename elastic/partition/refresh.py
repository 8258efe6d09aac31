"""Parameters of ranks that lack the last update: from what they hold, and the rest from others.

After a step every rank gets all parameters from the blocks' owners (`parcels`). Where that was cut
short by a loss, not all ranks have them, and most of what those lack is there: a shadow of a block
has the same bits as its owner. So only they are sent something, and only what they do not hold.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.elastic.partition.blocks import Block
from planaria.elastic.partition.optimizer import SPREAD, WRITE, ShardedOptimizer
from planaria.elastic.partition.transfer import MOVES_TAG
from planaria.elastic.reduction.transport import Transport, Wait

if TYPE_CHECKING:
    import torch

REFRESH_TAG = MOVES_TAG + 4

Pair = tuple[int, int]


class Refresh:
    """Brings the parameters of some ranks up to date; all ranks make the same calls.

    Args:
        blocks: All blocks of the model.
        parameters: Name -> parameter.
        optimizer: What has this rank's blocks.
        ranks: The names of the transport's ranks, in their order.
        held: The blocks that each of them has the state of now, as indices.
        soon: Those that it has before :meth:`take` is called.
        stale: The ranks whose parameters lack the last update.
        transport: The ranks.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        parameters: "Mapping[str, torch.Tensor]",
        optimizer: ShardedOptimizer,
        ranks: Sequence[int],
        held: Mapping[int, Collection[int]],
        soon: Mapping[int, Collection[int]],
        stale: Collection[int],
        transport: Transport,
    ) -> None:
        self._blocks, self._parameters = blocks, parameters
        self._optimizer, self._transport = optimizer, transport
        self._mine = ranks[transport.rank] in stale
        self._plan = plan_refresh(blocks, ranks, held, soon, stale) if stale else {}
        self._any = bool(stale)
        self._wait: Wait | None = None
        self._coming: list[tuple[int, torch.Tensor]] = []

    def start(self) -> None:
        """Starts to send what ranks lack, in the parameters' dtype."""
        if not self._any:
            return
        points.point(SPREAD)
        me, size = self._transport.rank, self._transport.size
        outgoing: list[list[torch.Tensor]] = [[] for _ in range(size)]
        incoming: list[list[torch.Tensor]] = [[] for _ in range(size)]
        for (source, target), indices in self._plan.items():
            for kind, chosen in self._by_dtype(indices).items():
                if source == me:
                    outgoing[target].append(self._pack(chosen, kind))
                elif target == me:
                    incoming[source].append(self._expect(chosen, kind))
        self._wait = self._transport.exchange(REFRESH_TAG, outgoing, incoming)

    def take(self, deadline: Deadline) -> None:
        """Waits for what is under way; where all of it is here, writes the parameters.

        Raises:
            CollectiveError: A rank is gone. Parameters are as before.
            DeadlineError: Some rank did not do its part in time; likewise.
        """
        if self._wait is None:
            return
        self._wait(deadline)
        points.point(WRITE)
        if self._mine:
            for index in self._optimizer.held:
                self._write(index, self._optimizer.export(index)["master"])
            for index, value in self._coming:
                self._write(index, value)
        self._wait, self._coming = None, []

    def _by_dtype(self, indices: Sequence[int]) -> "dict[torch.dtype, list[int]]":
        found: dict[torch.dtype, list[int]] = {}
        for index in indices:
            found.setdefault(self._parameters[self._blocks[index].name].dtype, []).append(index)
        return found

    def _pack(self, indices: Sequence[int], dtype: "torch.dtype") -> "torch.Tensor":
        flat, parts = self._room(indices, dtype)
        for index, part in parts:
            part.copy_(self._optimizer.export(index)["master"].view(-1))
        return flat

    def _expect(self, indices: Sequence[int], dtype: "torch.dtype") -> "torch.Tensor":
        flat, parts = self._room(indices, dtype)
        self._coming += parts
        return flat

    def _room(
        self, indices: Sequence[int], dtype: "torch.dtype"
    ) -> "tuple[torch.Tensor, list[tuple[int, torch.Tensor]]]":
        """Flat memory for some blocks, and the part of each."""
        import torch

        device = self._parameters[self._blocks[indices[0]].name].device
        sizes = [self._blocks[index].box.volume for index in indices]
        flat = torch.empty(sum(sizes), dtype=dtype, device=device)
        return flat, list(zip(indices, flat.split(sizes), strict=True))

    def _write(self, index: int, value: "torch.Tensor") -> None:
        block = self._blocks[index]
        target = self._parameters[block.name].detach().view(-1)[block.start : block.stop]
        target.copy_(value.view(-1))


def plan_refresh(
    blocks: Sequence[Block],
    ranks: Sequence[int],
    held: Mapping[int, Collection[int]],
    soon: Mapping[int, Collection[int]],
    stale: Collection[int],
) -> dict[Pair, list[int]]:
    """Who sends which blocks' parameters to whom: a pure function; arguments as for `Refresh`.

    Returns:
        For each pair of places in `ranks` the blocks, in order; nothing to where it is.
    """
    having: list[list[int]] = [[] for _ in blocks]
    for place, rank in enumerate(ranks):
        for index in held.get(rank, ()):
            having[index].append(place)
    sent = [0] * len(ranks)
    plan: dict[Pair, list[int]] = {}
    for target, rank in enumerate(ranks):
        if rank not in stale:
            continue
        there = {*held.get(rank, ()), *soon.get(rank, ())}
        for index, block in enumerate(blocks):
            if index not in there:
                source = min(having[index], key=lambda place: (sent[place], place))
                sent[source] += block.box.volume
                plan.setdefault((source, target), []).append(index)
    return plan
