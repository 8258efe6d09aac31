"""Updated parameters on their way from their owners to all ranks, in pieces of about 25 MB."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from planaria.core.deadline import Deadline
from planaria.elastic.partition.blocks import Block
from planaria.elastic.partition.owners import Partition
from planaria.elastic.reduction.buckets import BUCKET_BYTES
from planaria.elastic.reduction.memory import Memory
from planaria.elastic.reduction.transport import Transport, Wait

if TYPE_CHECKING:
    import torch

#: Tags of the exchanges of parameters; gradients' buckets count from 0.
PARAMETERS_TAG = 1 << 29


class Parcel:
    """Blocks of one dtype that are sent to all together, by owner, and written at once.

    Args:
        number: Its place among the parcels.
        blocks: All blocks of the model.
        items: Which of them are in it, as (index, place of the owner among the ranks).
        parameters: Name -> parameter.
        size: Number of ranks.
        memory: Where its memory is taken from.
    """

    def __init__(
        self,
        number: int,
        blocks: Sequence[Block],
        items: Sequence[tuple[int, int]],
        parameters: "Mapping[str, torch.Tensor]",
        size: int,
        memory: Memory,
    ) -> None:
        self._number, self._under_way = number, False
        at = 0
        cuts: list[int] = [0]
        first = parameters[blocks[items[0][0]].name]
        total = sum(blocks[i].box.volume for i, _ in items)
        flat = self._flat = memory.take(total, first.dtype, first.device)
        self._views: list[dict[int, torch.Tensor]] = []
        self._targets: list[torch.Tensor] = []
        for rank in range(size):
            views: dict[int, torch.Tensor] = {}
            for i, owner in items:
                if owner == rank:
                    block = blocks[i]
                    end = at + block.box.volume
                    views[i] = flat[at:end]
                    target = parameters[block.name].detach().view(-1)
                    self._targets.append(target[block.start : block.stop])
                    at = end
            self._views.append(views)
            cuts.append(at)
        self._parts = [flat[a:b] for a, b in pairwise(cuts)]

    def send(self, transport: Transport, masters: "Mapping[int, torch.Tensor]") -> Wait:
        """Starts to send this rank's part to all, in the parameters' dtype, and to get theirs."""
        rank, parts = transport.rank, self._parts
        for i, view in self._views[rank].items():
            view.copy_(masters[i].detach().view(-1))
        self._under_way = True
        wait = transport.exchange(
            PARAMETERS_TAG + self._number,
            [[parts[rank]] if r != rank else [] for r in range(transport.size)],
            [[parts[r]] if r != rank else [] for r in range(transport.size)],
        )

        def finish(deadline: Deadline) -> None:
            wait(deadline)
            self._under_way = False

        return finish

    def leave(self, memory: Memory) -> None:
        """Leaves its memory to others, unless something may still be under way in it."""
        if not self._under_way:
            memory.give(self._flat)

    def apply(self) -> None:
        """Writes all parts to the parameters."""
        views = (view for views in self._views for view in views.values())
        for target, view in zip(self._targets, views, strict=True):
            target.copy_(view)


def make_parcels(
    partition: Partition, parameters: "Mapping[str, torch.Tensor]", size: int, memory: Memory
) -> list[Parcel]:
    """Puts all blocks into parcels: the same ones on all ranks; see `Parcel`."""
    place = {rank: r for r, rank in enumerate(partition.ranks)}
    lists: list[list[tuple[int, int]]] = []
    room: dict[Any, int] = {}
    open_: dict[Any, list[tuple[int, int]]] = {}
    for i, (block, owner) in enumerate(zip(partition.blocks, partition.owners, strict=True)):
        dtype = parameters[block.name].dtype
        nbytes = block.box.volume * dtype.itemsize
        if room.get(dtype, 0) < nbytes:
            open_[dtype] = []
            lists.append(open_[dtype])
            room[dtype] = BUCKET_BYTES
        open_[dtype].append((i, place[owner]))
        room[dtype] -= nbytes
    return [
        Parcel(n, partition.blocks, items, parameters, size, memory)
        for n, items in enumerate(lists)
    ]
