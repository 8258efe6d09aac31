"""Any optimizer of torch over blocks: each rank updates what it holds, then all get all (ZeRO).

A holder of a block (its owner, and shadows) keeps a master copy of it, in float32 where the model
is in less, and the optimizer's slots; each block is an optimizer's tensor of its own. A step has
three parts: norms, which ranks tell each other; the update of what a rank holds, which asks nobody;
and the spreading of what was updated into a second copy of the parameters. The model is written
only when all of it is there: if a rank dies before, every survivor's model is as it was.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.elastic.partition.blocks import ELEMENTWISE, Block
from planaria.elastic.partition.holders import Placement
from planaria.elastic.partition.owners import Partition
from planaria.elastic.partition.parcels import Parcel, make_parcels
from planaria.elastic.reduction.buckets import Segment, accumulation_dtype
from planaria.elastic.reduction.memory import Memory
from planaria.elastic.reduction.ordered import clip_coefficient, global_norm, squared_norm
from planaria.elastic.reduction.reducer import Reduced
from planaria.elastic.reduction.transport import Transport
from planaria.errors import ConfigError, NotSupportedError

if TYPE_CHECKING:
    import torch

UPDATE = points.declare("elastic.optimizer.update", "before the own blocks are updated")
SPREAD = points.declare("elastic.optimizer.spread", "before updated parameters are sent to all")
WRITE = points.declare("elastic.optimizer.write", "before updated parameters reach the model")


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
    return Placement.plain(partition).segments()


class ShardedOptimizer:
    """An optimizer whose state is spread over ranks, block by block.

    It computes the same bits for any number of ranks. Learning rates and other options are read
    from the optimizer that it was made of at every step, so schedulers go on working with that one.

    Args:
        parameters: Name -> parameter, the same on all ranks; those of the partition's blocks.
        optimizer: An optimizer over these parameters; the state that it has is taken over, and it
            is not stepped itself.
        placement: Who holds which block; a `Partition` where nobody but the owner does.
        transport: The ranks; the n-th is the n-th of `partition.ranks`. The transport of the
            gradients will do, between its steps.
        hold: Whether this rank has what it is to hold, as all do at the beginning; a rank that
            joins gets its blocks by `load`.

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
        placement: Placement | Partition,
        transport: Transport,
        *,
        hold: bool = True,
    ) -> None:
        if isinstance(placement, Partition):
            placement = Placement.plain(placement)
        self._source, self._parameters = optimizer, dict(parameters)
        _check(optimizer, self._parameters, placement.partition)
        self._blocks = placement.partition.blocks
        self._index = {(b.name, b.start): i for i, b in enumerate(self._blocks)}
        # A copy has the class, its options and no patched methods; then its own tensors.
        self._inner = copy.copy(optimizer)
        self._inner.state = defaultdict(dict)
        self._group_of = {
            id(p): g for g, group in enumerate(optimizer.param_groups) for p in group["params"]
        }
        self._masters: dict[int, torch.Tensor] = {}
        self._grouped = False
        self._parcels: list[Parcel] | None = None
        self._memory = Memory()
        self._places: list[int] = []
        self.adopt(placement, transport)
        if hold:
            self.hold_from(optimizer)

    @property
    def placement(self) -> Placement:
        """Who holds which block."""
        return self._placement

    @property
    def transport(self) -> Transport:
        """The ranks."""
        return self._transport

    @property
    def held(self) -> list[int]:
        """The blocks whose state is here, as indices, in order."""
        return sorted(self._masters)

    @property
    def owned(self) -> list[int]:
        """The blocks that are this rank's own, as indices, in order."""
        return self._placement.partition.of(self._me)

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
        partition = self._placement.partition
        place = {rank: r for r, rank in enumerate(partition.ranks)}
        norm = global_norm(
            self._transport,
            self.squared_norms(reduced.segments),
            [place[owner] for owner in partition.owners],
            deadline,
        )
        scale = 1.0 if clip_grad_norm is None else clip_coefficient(norm, clip_grad_norm)
        if skip_nonfinite and not math.isfinite(norm):
            return Update(norm, scale, applied=False)
        self.apply(reduced.segments, reduced.touched, scale)
        self.spread(deadline)
        return Update(norm, scale)

    def squared_norms(self, gradient: "Mapping[Segment, torch.Tensor]") -> list[float]:
        """The squared norms of the own blocks, in block order: what ranks tell each other."""
        found = self._of_blocks(gradient)
        return [squared_norm(found[i]) for i in self.owned]

    def apply(
        self,
        gradient: "Mapping[Segment, torch.Tensor]",
        touched: Collection[str],
        factor: float = 1.0,
    ) -> None:
        """Updates all blocks that are here. It asks no other rank.

        Args:
            gradient: The gradient of the blocks; it is scaled in place.
            touched: The parameters that have a gradient; the others are left as they are.
            factor: What the gradient is multiplied with.
        """
        points.point(UPDATE)
        if not self._grouped:
            self._arrange()
        found = self._of_blocks(gradient)
        for i, master in self._masters.items():
            if self._blocks[i].name in touched:
                value = found[i].view(master.shape)
                master.grad = value if factor == 1.0 else value.mul_(factor)
        if len(self._inner.param_groups) != len(self._source.param_groups):
            raise ConfigError(
                "the optimizer has got other groups of parameters since the session was made: what "
                "is to be trained has to be there from the start"
            )
        for ours, theirs in zip(self._inner.param_groups, self._source.param_groups, strict=True):
            ours.update({key: value for key, value in theirs.items() if key != "params"})
        # Not `self._inner.step`: torch's schedulers patch that of an instance. And they warn unless
        # their own optimizer has made a step.
        type(self._inner).step(self._inner)
        self._source._opt_called = True  # pyright: ignore[reportAttributeAccessIssue]
        for master in self._masters.values():
            master.grad = None

    def spread(self, deadline: Deadline) -> None:
        """Brings all blocks to all ranks, and writes the model.

        Raises:
            CollectiveError: A rank is gone. The model is as before.
            DeadlineError: Some rank did not do its part in time; likewise.
        """
        points.point(SPREAD)
        # A parameter may have got other memory since, as by `p.data = ...` or `model.to(...)`.
        places = [p.data_ptr() for p in self._parameters.values()]
        if self._parcels is None or places != self._places:
            partition, size = self._placement.partition, self._transport.size
            self._parcels = make_parcels(partition, self._parameters, size, self._memory)
            self._places = places
            self._memory.clear()
        waits = [parcel.send(self._transport, self._masters) for parcel in self._parcels]
        for wait in waits:
            wait(deadline)
        points.point(WRITE)
        for parcel in self._parcels:
            parcel.apply()

    def adopt(self, placement: Placement, transport: Transport) -> None:
        """Goes on with other holders. What this rank is to hold must be here before the next step.

        What it holds beyond that stays until `drop`.

        Raises:
            ConfigError: The blocks are others, or the ranks are not those of the transport.
        """
        if placement.partition.blocks != self._blocks:
            raise ConfigError("the new holders are not of the same blocks: cut the model once")
        if len(placement.partition.ranks) != transport.size:
            raise ConfigError(
                f"a partition over ranks {placement.partition.ranks} on a transport of "
                f"{transport.size}"
            )
        self._placement, self._transport = placement, transport
        self._me = placement.partition.ranks[transport.rank]
        for parcel in self._parcels or ():
            parcel.leave(self._memory)
        self._parcels = None

    def hold_from(self, optimizer: "torch.optim.Optimizer") -> None:
        """Takes what this rank is to hold from whole parameters and an optimizer's whole state."""
        for i in self._placement.of(self._me):
            block = self._blocks[i]
            parameter = self._parameters[block.name]
            self._masters[i] = master = self._master(block)
            slots = {
                key: _cut_slot(value, parameter, master, block)
                for key, value in optimizer.state.get(parameter, {}).items()
            }
            self._inner.state.pop(master, None)
            if slots:
                self._inner.state[master] = slots
        self._arrange()

    def export(self, index: int) -> "dict[str, Any]":
        """The state of a block that is here, for another holder: the master copy and the slots.

        Args:
            index: The block's index in the partition.

        Returns:
            ``master`` and the optimizer's slots by name: the tensors themselves, not copies.
        """
        master = self._masters[index]
        return {"master": master.detach(), **self._inner.state.get(master, {})}

    def load(self, index: int, state: "Mapping[str, Any]", *, copy: bool = True) -> None:
        """Takes over the state of a block, as `export` gave it.

        Args:
            index: The block's index in the partition.
            state: ``master`` and the slots.
            copy: Whether the tensors are copied. Without, those of a block that was not here yet
                become the optimizer's own.
        """
        import torch

        slots = {key: value for key, value in state.items() if key != "master"}
        if index in self._masters:
            with torch.no_grad():
                self._masters[index].copy_(state["master"])
        else:
            device = self._parameters[self._blocks[index].name].device
            self._masters[index] = state["master"].to(device, copy=copy)
            self._grouped = False
        self._inner.state.pop(self._masters[index], None)
        if slots:
            self._inner.state[self._masters[index]] = {
                k: v.to(self._slot_device(index, v), copy=copy)
                if isinstance(v, torch.Tensor)
                else v
                for k, v in slots.items()
            }

    def drop(self, keep: Collection[int] = ()) -> None:
        """Lets go of the state of blocks that this rank is no holder of.

        Args:
            keep: Blocks that stay all the same, as indices.
        """
        mine = {*self._placement.of(self._me), *keep}
        for i in self.held:
            if i not in mine:
                self._inner.state.pop(self._masters.pop(i), None)
        self._arrange()

    def _slot_device(self, index: int, slot: "torch.Tensor") -> Any:
        """Where torch keeps a slot: numbers on the host, unless the optimizer is fused or such."""
        parameter = self._parameters[self._blocks[index].name]
        group = self._source.param_groups[self._group_of[id(parameter)]]
        on_host = not slot.dim() and not (group.get("fused") or group.get("capturable"))
        return "cpu" if on_host else parameter.device

    def _arrange(self) -> None:
        """Puts the blocks that are here into the optimizer's groups, in order."""
        groups: list[list[torch.Tensor]] = [[] for _ in self._source.param_groups]
        for i in self.held:
            parameter = self._parameters[self._blocks[i].name]
            groups[self._group_of[id(parameter)]].append(self._masters[i])
        self._inner.param_groups = [
            {**group, "params": params}
            for group, params in zip(self._source.param_groups, groups, strict=True)
        ]
        self._grouped = True

    def _of_blocks(self, gradient: "Mapping[Segment, torch.Tensor]") -> "dict[int, torch.Tensor]":
        return {self._index[s.name, s.start]: value for s, value in gradient.items()}

    def _master(self, block: Block) -> "torch.Tensor":
        parameter = self._parameters[block.name]
        part = parameter.detach().view(-1)[block.start : block.stop].view(block.box.extent)
        # float32 where the model is in less.
        return part.to(accumulation_dtype(parameter.dtype), copy=True)


def _check(
    optimizer: "torch.optim.Optimizer",
    parameters: "Mapping[str, torch.Tensor]",
    partition: Partition,
) -> None:
    name = type(optimizer).__name__
    if name in ("LBFGS", "SparseAdam"):
        raise NotSupportedError(f"{name} cannot be spread over ranks: use another optimizer")
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for block in partition.blocks:
        parameter = parameters.get(block.name)
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


def _cut_slot(value: Any, parameter: "torch.Tensor", master: "torch.Tensor", block: Block) -> Any:
    """The part of a parameter's slot that belongs to a block."""
    import torch

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
