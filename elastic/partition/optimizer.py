"""Any optimizer of torch over blocks: each rank updates what it owns, then all get all (ZeRO).

An owner keeps a master copy of its blocks, in float32 where the model is in less, and the
optimizer's slots; each block is an optimizer's tensor of its own. What is updated is sent around
into a second copy of the parameters, and the model is written only when all of it is there: if a
rank dies before, every survivor's model is as it was. (Its masters and slots are not: bring them
back from the last committed step.)
"""

import copy
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.elastic.partition.blocks import ELEMENTWISE, Block
from planaria.elastic.partition.owners import Partition
from planaria.elastic.reduction.buckets import BUCKET_BYTES, Segment, accumulation_dtype
from planaria.elastic.reduction.ordered import clip_coefficient, global_norm, squared_norm
from planaria.elastic.reduction.reducer import Reduced
from planaria.elastic.reduction.transport import Transport
from planaria.errors import ConfigError, NotSupportedError

if TYPE_CHECKING:
    import torch

UPDATE = points.declare("elastic.optimizer.update", "before the own blocks are updated")
SPREAD = points.declare("elastic.optimizer.spread", "before updated parameters are sent to all")

#: Tags of the exchanges of parameters; gradients' buckets count from 0.
PARAMETERS_TAG = 1 << 29


@dataclass(frozen=True)
class Update:
    """What a step did.

    Attributes:
        norm: The 2-norm of the gradient over all blocks, before clipping.
        clipped: What the gradient was multiplied with; 1 without clipping.
        applied: Whether there was an update: not where the norm was not finite and those are
            skipped.
    """

    norm: float
    clipped: float
    applied: bool = True


def segments(partition: Partition) -> list[Segment]:
    """The blocks as a `GradientReducer` wants them; owners are places in `partition.ranks`."""
    place = {rank: i for i, rank in enumerate(partition.ranks)}
    pairs = zip(partition.blocks, partition.owners, strict=True)
    return [Segment(b.name, b.start, b.stop, place[owner]) for b, owner in pairs]


class ShardedOptimizer:
    """An optimizer whose state is spread over ranks, block by block.

    It computes the same bits for any number of ranks. Learning rates and other options are read
    from the optimizer that it was made of at every step, so schedulers go on working with that one.

    Args:
        parameters: Name -> parameter, the same on all ranks; those of the partition's blocks.
        optimizer: An optimizer over these parameters; the state that it has is taken over, and it
            is not stepped itself.
        partition: Who owns which block.
        transport: The ranks; the n-th is the n-th of `partition.ranks`. The transport of the
            gradients will do, between its steps.

    Raises:
        ConfigError: The optimizer has other parameters than the partition, or looks at whole
            tensors where some are cut (see `whole` of `planaria.elastic.partition.cut`).
        NotSupportedError: The optimizer evaluates the loss itself, or a parameter is not
            contiguous.
    """

    def __init__(
        self,
        parameters: "Mapping[str, torch.Tensor]",
        optimizer: "torch.optim.Optimizer",
        partition: Partition,
        transport: Transport,
    ) -> None:
        self._source, self._transport, self._partition = optimizer, transport, partition
        self._parameters = dict(parameters)
        self._check()
        self._me = partition.ranks[transport.rank]
        self._masters = {i: self._master(partition.blocks[i]) for i in partition.of(self._me)}
        # A copy has the class, its options and no patched methods; then its own tensors.
        self._inner = copy.copy(optimizer)
        self._inner.state = defaultdict(dict)
        group_of = {id(p): g for g, group in enumerate(optimizer.param_groups)
                    for p in group["params"]}  # fmt: skip
        self._inner.param_groups = [{**group, "params": []} for group in optimizer.param_groups]
        for i, master in self._masters.items():
            parameter = self._parameters[partition.blocks[i].name]
            self._inner.param_groups[group_of[id(parameter)]]["params"].append(master)
            for key, value in optimizer.state.get(parameter, {}).items():
                self._inner.state[master][key] = _cut_slot(value, parameter, master, i, partition)
        self._parcels = self._make_parcels()

    def step(
        self,
        reduced: Reduced,
        deadline: Deadline,
        *,
        clip_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
    ) -> Update:
        """Updates the own blocks, and the model with everybody's.

        Args:
            reduced: The mean gradient of the own blocks; it is scaled in place where it is clipped.
            deadline: Until when all blocks must be here.
            clip_grad_norm: The norm that the whole gradient is scaled down to; None for as it is.
            skip_nonfinite: Whether a gradient that is infinite or not a number anywhere is left
                out, as a loss scaler does. All ranks see the same norm and do the same.

        Raises:
            CollectiveError: A rank is gone. The model is as before, own masters and slots may not.
            DeadlineError: Some rank did not do its part in time; likewise.
        """
        update = self._set_gradients(reduced, deadline, clip_grad_norm)
        if skip_nonfinite and not math.isfinite(update.norm):
            self._drop_gradients()
            return Update(update.norm, update.clipped, applied=False)
        points.point(UPDATE)
        for ours, theirs in zip(self._inner.param_groups, self._source.param_groups, strict=True):
            ours.update({key: value for key, value in theirs.items() if key != "params"})
        # Not `self._inner.step`: torch's schedulers patch that of an instance. And they warn unless
        # their own optimizer has made a step.
        type(self._inner).step(self._inner)
        self._source._opt_called = True  # pyright: ignore[reportAttributeAccessIssue]
        self._drop_gradients()
        points.point(SPREAD)
        waits = [parcel.send(self._transport, self._masters) for parcel in self._parcels]
        for wait in waits:
            wait(deadline)
        for parcel in self._parcels:
            parcel.apply()
        return update

    def export(self, index: int) -> "dict[str, Any]":
        """The state of an own block, for its next owner: the master copy and the slots.

        Args:
            index: The block's index in the partition.

        Returns:
            ``master`` and the optimizer's slots by name: the tensors themselves, not copies.
        """
        master = self._masters[index]
        return {"master": master.detach(), **self._inner.state.get(master, {})}

    def load(self, index: int, state: "Mapping[str, Any]") -> None:
        """Takes over the state of a block that this rank owns now, as `export` gave it."""
        import torch

        master = self._masters[index]
        slots = {key: value for key, value in state.items() if key != "master"}
        with torch.no_grad():
            master.copy_(state["master"])
        if slots:
            self._inner.state[master] = {
                k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in slots.items()
            }

    def _set_gradients(self, reduced: Reduced, deadline: Deadline, clip: float | None) -> Update:
        found: dict[int, torch.Tensor] = {}
        mine: list[float] = []
        for i, master in self._masters.items():
            block = self._partition.blocks[i]
            value = reduced.segments[
                Segment(block.name, block.start, block.stop, self._transport.rank)
            ]
            mine.append(squared_norm(value))
            found[i] = value.view(master.shape)
        place = {rank: r for r, rank in enumerate(self._partition.ranks)}
        owners = [place[owner] for owner in self._partition.owners]
        norm = global_norm(self._transport, mine, owners, deadline)
        scale = 1.0 if clip is None else clip_coefficient(norm, clip)
        for i, value in found.items():
            if self._partition.blocks[i].name in reduced.touched:
                self._masters[i].grad = value if scale == 1.0 else value.mul_(scale)
        return Update(norm, scale)

    def _drop_gradients(self) -> None:
        for master in self._masters.values():
            master.grad = None

    def _master(self, block: Block) -> "torch.Tensor":
        parameter = self._parameters[block.name]
        part = parameter.detach().view(-1)[block.start : block.stop].view(block.box.extent)
        # float32 where the model is in less.
        return part.to(accumulation_dtype(parameter.dtype), copy=True)

    def _make_parcels(self) -> "list[_Parcel]":
        place = {rank: r for r, rank in enumerate(self._partition.ranks)}
        lists: list[list[tuple[int, int]]] = []
        room: dict[Any, int] = {}
        open_: dict[Any, list[tuple[int, int]]] = {}
        for i, (block, owner) in enumerate(
            zip(self._partition.blocks, self._partition.owners, strict=True)
        ):
            dtype = self._parameters[block.name].dtype
            nbytes = block.box.volume * dtype.itemsize
            if room.get(dtype, 0) < nbytes:
                open_[dtype] = []
                lists.append(open_[dtype])
                room[dtype] = BUCKET_BYTES
            open_[dtype].append((i, place[owner]))
            room[dtype] -= nbytes
        return [
            _Parcel(n, self._partition.blocks, items, self._parameters, self._transport.size)
            for n, items in enumerate(lists)
        ]

    def _check(self) -> None:
        name = type(self._source).__name__
        if name in ("LBFGS", "SparseAdam"):
            raise NotSupportedError(f"{name} cannot be spread over ranks: use another optimizer")
        if len(self._partition.ranks) != self._transport.size:
            raise ConfigError(
                f"a partition over ranks {self._partition.ranks} on a transport of "
                f"{self._transport.size}"
            )
        known = {id(p) for group in self._source.param_groups for p in group["params"]}
        for block in self._partition.blocks:
            parameter = self._parameters.get(block.name)
            if parameter is None or id(parameter) not in known:
                raise ConfigError(f"{block.name!r} is not a parameter of the optimizer")
            if tuple(parameter.shape) != block.shape:
                raise ConfigError(f"{block.name!r} is cut for another shape: {block.shape}")
            if not parameter.is_contiguous():
                raise NotSupportedError(f"{block.name!r} is not contiguous: call .contiguous()")
            if name not in ELEMENTWISE and block.box.volume != parameter.numel():
                raise ConfigError(
                    f"{name} may look at a whole tensor, and {block.name!r} is cut: name it in "
                    "`whole` where the model is cut into blocks"
                )


def _cut_slot(
    value: Any, parameter: "torch.Tensor", master: "torch.Tensor", index: int, partition: Partition
) -> Any:
    """The part of a parameter's slot that belongs to a block."""
    import torch

    block = partition.blocks[index]
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return copy.copy(value) if not isinstance(value, torch.Tensor) else value.clone()
    if value.shape == parameter.shape:
        part = value.reshape(-1)[block.start : block.stop].view(block.box.extent)
        # As for the master copy: float32 where the model is in less.
        return part.to(master.dtype if value.is_floating_point() else value.dtype, copy=True)
    if block.box.volume == parameter.numel():
        return value.clone()
    raise ConfigError(
        f"{block.name!r} is cut, and the optimizer has a slot of {tuple(value.shape)} for it: name "
        "it in `whole` where the model is cut into blocks"
    )


class _Parcel:
    """Blocks of one dtype that are sent to all together, by owner, and applied at once."""

    def __init__(
        self,
        number: int,
        blocks: Sequence[Block],
        items: Sequence[tuple[int, int]],
        parameters: "Mapping[str, torch.Tensor]",
        size: int,
    ) -> None:
        import torch

        self._number = number
        at = 0
        cuts: list[int] = [0]
        dtype = parameters[blocks[items[0][0]].name].dtype
        total = sum(blocks[i].box.volume for i, _ in items)
        flat = torch.empty(total, dtype=dtype)
        self._views: dict[int, torch.Tensor] = {}
        self._targets: list[torch.Tensor] = []
        for rank in range(size):
            for i, owner in items:
                if owner == rank:
                    block = blocks[i]
                    end = at + block.box.volume
                    self._views[i] = flat[at:end]
                    target = parameters[block.name].detach().view(-1)
                    self._targets.append(target[block.start : block.stop])
                    at = end
            cuts.append(at)
        self._parts = [flat[a:b] for a, b in pairwise(cuts)]

    def send(self, transport: Transport, masters: "Mapping[int, torch.Tensor]") -> Any:
        for i, view in self._views.items():
            if i in masters:
                view.copy_(masters[i].detach().view(-1))
        rank, parts = transport.rank, self._parts
        return transport.exchange(
            PARAMETERS_TAG + self._number,
            [[parts[rank]] if r != rank else [] for r in range(transport.size)],
            [[parts[r]] if r != rank else [] for r in range(transport.size)],
        )

    def apply(self) -> None:
        for target, view in zip(self._targets, self._views.values(), strict=True):
            target.copy_(view)
