"""Blocks of an optimizer in a checkpoint, so that any number of ranks restores them.

A block that is a whole parameter is stored as an optimizer's slots are: ``optim.<name>.<slot>``.
One that is a part adds ``@`` and its first row: ``optim.<name>.<slot>@<row>``. Where the master
copy has another dtype than the parameter it is stored as a slot named ``master``. Blocks are also
read out of whole slots, as a plain optimizer has saved them; the other way round,
:func:`join_blocks` makes whole slots of blocks::

    checkpointer.restore(transforms=[join_blocks])       # into a plain optimizer
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from planaria.checkpoint.layout.transforms import SourceTensor
from planaria.checkpoint.state import tree
from planaria.checkpoint.state.entries import Collector
from planaria.checkpoint.state.provider import LoadPlan, Target
from planaria.core.box import Box
from planaria.elastic.partition.blocks import Block
from planaria.elastic.partition.optimizer import ShardedOptimizer
from planaria.elastic.updates import BlockUpdater
from planaria.errors import StateError

if TYPE_CHECKING:
    import torch

_PART = re.compile(r"(?P<slot>.+)@(?P<row>\d+)")


class BlockProvider:
    """State of an optimizer over blocks, see `planaria.checkpoint.state.provider.Provider`.

    Args:
        key: Name of the optimizer in the state.
        updater: What has the blocks.
        optimizer: The user's optimizer, for its options.
        parameters: Name -> parameter.
    """

    def __init__(
        self,
        key: str,
        updater: BlockUpdater,
        optimizer: "torch.optim.Optimizer",
        parameters: "Mapping[str, torch.Tensor]",
    ) -> None:
        self.key, self._updater, self._source = key, updater, optimizer
        self._parameters = parameters
        names = {id(p): name for name, p in parameters.items()}
        # Parameters that need no gradient have no state, and no name here.
        self._grouped = [[names[id(p)] for p in g["params"] if id(p) in names]
                         for g in optimizer.param_groups]  # fmt: skip

    def collect(self, out: Collector) -> None:
        """See `Provider.collect`: owners save their blocks."""
        import torch

        sharded = self._updater.sharded
        for index in sharded.owned:
            block = sharded.placement.partition.blocks[index]
            for slot, value in sharded.export(index).items():
                if slot == "master" and value.dtype == self._parameters[block.name].dtype:
                    continue  # the parameter itself
                if isinstance(value, torch.Tensor):
                    out.tensor(self._name(block, slot), value, lazy=True)
                elif value is not None:
                    raise StateError(
                        f"{block.name!r}: the optimizer keeps a {type(value).__name__} as "
                        f"{slot!r}, which a session cannot save yet"
                    )
        groups = [
            {
                "optimizer": type(self._source).__name__,
                "params": names,
                "settings": tree.encode(
                    {k: v for k, v in group.items() if k != "params"}, f"{self.key}.param_groups"
                ),
            }
            for group, names in zip(self._source.param_groups, self._grouped, strict=True)
        ]
        out.object(f"{self.key}.param_groups", groups)

    def load(self, plan: LoadPlan) -> None:
        """See `Provider.load`: holders read their blocks, shadows, too."""
        sharded = self._updater.sharded
        slots: dict[str, set[str]] = {name: set() for name in self._parameters}
        for full in plan.names(f"{self.key}."):
            name, _, slot = full.removeprefix(f"{self.key}.").rpartition(".")
            if name in slots:
                found = _PART.fullmatch(slot)
                slots[name].add(found["slot"] if found else slot)
                plan.used.add(full)  # where this rank does not hold it, another does
        self._load_groups(plan)
        for index in sharded.held:
            block = sharded.placement.partition.blocks[index]
            self._load_block(plan, sharded, index, block, slots[block.name])

    def _load_block(
        self,
        plan: LoadPlan,
        sharded: ShardedOptimizer,
        index: int,
        block: Block,
        slots: set[str],
    ) -> None:
        import torch

        made: dict[str, Any] = {}
        for slot in sorted(slots):
            whole = f"{self.key}.{block.name}.{slot}"
            name, box = self._name(block, slot), None
            source = plan.sources.get(name)
            if source is None:
                name, source = whole, plan.sources.get(whole)
                box = block.box
            if source is None:
                plan.missing.append(name)
                return
            if not source.shape:
                box, extent = Box.full(()), ()
            elif box is not None and source.shape == block.shape:
                extent = box.extent
            elif source.shape == block.box.extent:
                box, extent = Box.full(block.box.extent), block.box.extent
            else:
                plan.problems.append(f"{name}: shape {list(source.shape)} in the checkpoint, block "
                                     f"{block.box} of {list(block.shape)} here")  # fmt: skip
                return
            made[slot] = torch.empty(extent, dtype=source.dtype.dtype)
            plan.targets.append(Target(name, box, made[slot], source))

        def finish() -> None:
            # The model was read before: a provider of its own comes first.
            parameter = self._parameters[block.name].detach().view(-1)
            part = parameter[block.start : block.stop].view(block.box.extent)
            sharded.load(index, {"master": part, **made})

        plan.then(finish)

    def _load_groups(self, plan: LoadPlan) -> None:
        groups = plan.object(f"{self.key}.param_groups") or []
        settings = {name: group["settings"] for group in groups for name in group["params"]}
        for group, names in zip(self._source.param_groups, self._grouped, strict=True):
            if names and names[0] in settings:
                found = tree.decode(settings[names[0]])
                plan.then(lambda group=group, found=found: group.update(found))

    def _name(self, block: Block, slot: str) -> str:
        name = f"{self.key}.{block.name}.{slot}"
        return name if block.box.extent == block.shape else f"{name}@{block.box.offset[0]}"


def join_blocks(sources: dict[str, SourceTensor]) -> dict[str, SourceTensor]:
    """A transform for `Checkpointer.restore`: blocks of optimizer slots become whole slots."""
    result: dict[str, SourceTensor] = {}
    parts: dict[str, list[tuple[int, SourceTensor]]] = {}
    for name, source in sources.items():
        found = _PART.fullmatch(name)
        if found:
            parts.setdefault(found["slot"], []).append((int(found["row"]), source))
        elif not name.endswith(".master"):
            result[name] = source
    for name, pairs in parts.items():
        pairs.sort(key=lambda pair: pair[0])
        first = pairs[0][1]
        if name.endswith(".master"):
            continue
        if not first.shape:
            result[name] = first
            continue
        boxes = []
        for row, source in pairs:
            shift = [row, *[0] * (len(source.shape) - 1)]
            boxes += [replace(part, box=part.box.shifted(shift)) for part in source.parts]
        rows = pairs[-1][0] + pairs[-1][1].shape[0]
        result[name] = replace(first, shape=(rows, *first.shape[1:]), parts=tuple(boxes))
    return result
