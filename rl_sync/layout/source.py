"""The trainer's side: which boxes of its tensors a rank holds now, and their bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from planaria.checkpoint.layout.plan import announce
from planaria.checkpoint.state.entries import Collector, TensorEntry
from planaria.checkpoint.state.modules import ModuleProvider
from planaria.errors import NotSupportedError, StateError
from planaria.rl_sync.bits import FORMATS, integers
from planaria.rl_sync.layout.rollout import Origin
from planaria.rl_sync.layout.table import Block


class TrainerTensors:
    """Parameters and persistent buffers of a module: plain, DDP, FSDP2, FSDP2 with TP."""

    def __init__(self, module: nn.Module, only: Callable[[str], bool] | None = None) -> None:
        """Wraps a module.

        Args:
            module: The trainer's module.
            only: Which of its tensors to send, by name (without wrappers' prefixes).
        """
        self._module, self._provider = module, ModuleProvider("", module)
        self._only = only or (lambda name: True)
        self._entries: dict[str, TensorEntry] = {}
        self.refresh()

    def refresh(self) -> None:
        """Looks again where the tensors are: a sharded module may have moved them.

        Raises:
            StateError: A tensor is not there any more, or another part of it is.
            NotSupportedError: A tensor's dtype cannot be synchronised.
        """
        found = Collector()
        self._provider.collect(found)
        entries = {name: e for name, e in found.tensors.items() if self._only(name)}
        for name, entry in entries.items():
            if entry.dtype.name not in FORMATS and entry.dtype.name != "float64":
                raise NotSupportedError(
                    f"tensor {name!r} has dtype {entry.dtype.name}, which cannot be sent; leave it "
                    f"out: only=lambda name: name != {name!r}"
                )
            before = self._entries.get(name)
            if before is not None and (before.box, before.shape) != (entry.box, entry.shape):
                raise StateError(
                    f"this rank held {before.box} of {name!r} and holds {entry.box} now; make a "
                    "new Publisher after the trainer's layout has changed"
                )
        if lost := set(self._entries) - set(entries):
            raise StateError(f"the module has lost {sorted(lost)[0]!r}; make a new Publisher")
        self._entries = entries

    def announcement(self) -> list[Any]:
        """What this rank tells the others, see `planaria.checkpoint.layout.plan.announce`."""
        return announce(self._entries.values())

    def devices(self) -> set[torch.device]:
        """Where this rank's parts are now."""
        return {t.device for t in (*self._module.parameters(), *self._module.buffers())}

    def live(self, block: Block, origins: tuple[Origin, ...]) -> list[torch.Tensor]:
        """The live bits of a block where they are: a flat integer tensor a segment.

        They are cast on their device; constants are made where the block's first tensor is.
        """
        named = (self._entries[o.name].local.device for o in origins if o.name is not None)
        device, pieces = next(named, torch.device("cpu")), []
        for segment, origin in zip(block.segments, origins, strict=True):
            if origin.name is None:
                value = torch.full((segment.box.volume,), origin.fill, device=device)
            else:
                entry = self._entries[origin.name]
                value = entry.local[origin.box.relative_to(entry.box).slices()]
            value = value.detach().to(block.fmt.dtype).contiguous()
            pieces.append(integers(value).view(-1))
        return pieces
