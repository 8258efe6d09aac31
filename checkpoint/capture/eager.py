"""What may change at any time is copied at the call of a save; the rest is captured later."""

from collections.abc import Mapping

import torch

from planaria.checkpoint.capture.sources import Source, Sources
from planaria.checkpoint.state.entries import TensorEntry


def copy_eager(entries: Mapping[str, TensorEntry]) -> tuple[set[torch.device], Sources]:
    """Copies what may change at any time; gives the CUDA devices, and what is captured later."""
    devices = {e.local.device for e in entries.values() if e.local.is_cuda}
    lazy: dict[str, Source] = {}
    for entry in entries.values():
        device = entry.local.device.type
        if entry.lazy and device in ("cpu", "cuda"):
            lazy[entry.name] = entry.source
        else:
            copy = entry.local.detach().clone(memory_format=torch.contiguous_format)
            entry.replace(copy if device in ("cpu", "cuda") else copy.cpu())
    return devices, Sources(lazy)
