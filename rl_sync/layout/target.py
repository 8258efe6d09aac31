"""The rollout's side: where the elements of a block go in a model that is being served."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from planaria.checkpoint.state.entries import Collector, locate, memory_key
from planaria.checkpoint.state.modules import ModuleProvider, named_parameters
from planaria.core.box import Box
from planaria.errors import MismatchError
from planaria.rl_sync.bits import bits_of, integers, tensor_of
from planaria.rl_sync.diff.scan import Bits, Changes, scatter
from planaria.rl_sync.layout.positions import first_of_run, split_changes
from planaria.rl_sync.layout.table import Block, BlockTable, Segment, TableTensor


class _Place:
    """One local tensor: what it holds of a tensor of the table."""

    def __init__(self, box: Box, local: torch.Tensor) -> None:
        self.box, self.local = box, integers(local)
        plain = local.device.type == "cpu" and local.is_contiguous()
        self.flat = bits_of(local) if plain else None

    def read(self, box: Box) -> torch.Tensor:
        return self.local[box.relative_to(self.box).slices()]

    def run(self, box: Box) -> tuple[Bits, int] | None:
        """The memory, and where in it a box begins, if the box is one run of it."""
        inner = box.relative_to(self.box)
        first = first_of_run(self.box.extent, inner)
        return None if self.flat is None or first is None else (self.flat, first)


def tensors_of(model: nn.Module | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, without wrappers' prefixes; tied ones each."""
    if isinstance(model, Mapping):
        return dict(model)
    found: dict[str, torch.Tensor] = dict(named_parameters(model))
    kept = Collector()
    ModuleProvider("", model).collect(kept)
    found.update((name, e.local) for name, e in kept.tensors.items() if name not in found)
    return found


class RolloutTensors:
    """The tensors of a model by the segments of a block table.

    A tensor of the model may be whole, the part that this shard holds, or a DTensor. Names that the
    model has beyond the table's must be known to be left out.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, torch.Tensor],
        table: BlockTable,
        shard: int = 0,
        only: Callable[[str], bool] | None = None,
    ) -> None:
        """Finds a place for everything that the table has for this shard.

        Args:
            model: The module that is served, or its tensors by name.
            table: What versions are made of.
            shard: Which shard of the rollout this is.
            only: Which of the model's tensors are synchronised; the others are left alone.

        Raises:
            MismatchError: Names, shapes or dtypes differ; says all of it.
        """
        self.table, self.shard = table, shard
        self._places: dict[int, list[_Place]] = {}
        here = tensors_of(model)
        number = {t.name: i for i, t in enumerate(table.tensors)}
        number |= {alias: number[name] for alias, name in table.aliases.items()}
        problems = []
        if shard >= table.shards:
            problems.append(f"there are {table.shards} shards, and this is number {shard}")
        memory: dict[tuple, int] = {}
        for name, tensor in here.items():
            if only is not None and not only(name):
                continue
            if name not in number:
                problems.append(f"{name} is not sent by the trainer")
                continue
            wanted = table.tensors[number[name]]
            for place in self._found(name, tensor, wanted, problems):
                if place.box.volume == 0:
                    continue
                key = memory_key(place.local)
                if memory.setdefault(key, number[name]) != number[name]:
                    other = table.tensors[memory[key]].name
                    problems.append(f"{name} and {other} are the same memory here, but not there")
                places = self._places.setdefault(number[name], [])
                if not any(memory_key(p.local) == key for p in places):
                    places.append(place)
        for i, tensor in enumerate(table.tensors):
            boxes = tensor.shard_boxes(shard % table.shards, table.shards)
            if i not in self._places and any(box.volume for box in boxes):
                problems.append(f"{tensor.name} is sent by the trainer and not in the model")
        if problems:
            raise MismatchError(
                "the rollout's model does not fit the trainer's weights: "
                f"{'; '.join(problems[:10])}. Map names with RolloutLayout(transforms=...) on the "
                "trainer, leave out with only="
            )
        self.blocks = [i for i, b in enumerate(table.blocks) if shard in b.audience]

    def _found(
        self, name: str, tensor: torch.Tensor, wanted: TableTensor, problems: list[str]
    ) -> list[_Place]:
        """The boxes that a tensor of the model holds."""
        if tensor.dtype != wanted.fmt.dtype:
            problems.append(f"{name} is {tensor.dtype} here and sent as {wanted.fmt.name}")
            return []
        if isinstance(tensor, DTensor):
            return [_Place(*locate(name, tensor))]
        local = tensor.detach()
        if tuple(tensor.shape) == wanted.shape:
            return [_Place(Box.full(wanted.shape), local)]
        shape = wanted.shard_shape(self.shard % self.table.shards, self.table.shards)
        if tuple(tensor.shape) != shape:
            problems.append(
                f"{name} has shape {list(tensor.shape)} here; the whole is {list(wanted.shape)}, "
                f"and shard {self.shard} of {self.table.shards} holds {list(shape)}"
            )
            return []
        places, begin = [], 0
        dim = wanted.cut_dim or 0
        for box in wanted.shard_boxes(self.shard % self.table.shards, self.table.shards):
            places.append(_Place(box, local.narrow(dim, begin, box.extent[dim])))
            begin += box.extent[dim]
        return places

    def _holding(self, segment: Segment) -> list[_Place]:
        """The places that hold a segment; several where weights are tied here and not there."""
        return [p for p in self._places[segment.tensor] if p.box.contains(segment.box)]

    def read(self, block: Block) -> Bits:
        """The bits of a block as they are now; a view where the block is one run of memory."""
        pieces = []
        for segment in block.segments:
            place = self._holding(segment)[0]
            run = place.run(segment.box)
            if run is not None:
                pieces.append(run[0][run[1] : run[1] + segment.box.volume])
            else:
                pieces.append(bits_of(place.read(segment.box).contiguous().cpu()))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def write(
        self, block: Block, changes: Changes, *, undo: bool = False, mirror: bool = False
    ) -> None:
        """Puts the new bits of changes in place, or the old ones back.

        Args:
            block: The block.
            changes: Its changes.
            undo: Put the old bits back.
            mirror: Where a tensor is tied on the trainer and not here, make the further ones equal
                in all elements; as after a delta they are by themselves.
        """
        for segment, part in split_changes(block, changes):
            values = part.old if undo else part.new
            for place in self._holding(segment):
                run = place.run(segment.box)
                if run is not None:
                    scatter(run[0][run[1] : run[1] + segment.box.volume], part.pos, values)
                else:
                    there = place.read(segment.box)
                    at = np.unravel_index(part.pos.astype(np.int64), segment.box.extent)
                    index = tuple(torch.from_numpy(a).to(there.device) for a in at)
                    there[index] = tensor_of(values).to(there.device)

        if mirror:
            for segment in block.segments:
                first, *others = self._holding(segment)
                for place in others:
                    place.read(segment.box).copy_(first.read(segment.box))

    def mirrored(self, block: Block) -> bool:
        """Whether tensors that are tied on the trainer and not here are equal here."""
        for segment in block.segments:
            first, *others = self._holding(segment)
            if not all(torch.equal(first.read(segment.box), p.read(segment.box)) for p in others):
                return False
        return True
