"""Lazy, durable checkpoints that load at any topology."""

import importlib
from typing import TYPE_CHECKING, Any

if not __name__.startswith("planaria."):
    raise ImportError(f"import this package as 'planaria.{__name__}', not as {__name__!r}")

if TYPE_CHECKING:
    from planaria.checkpoint.checkpointer import Checkpointer
    from planaria.checkpoint.handle import SaveHandle
    from planaria.checkpoint.later import LATER
    from planaria.checkpoint.layout.transforms import Fuse, Pad, Rename, Split
    from planaria.checkpoint.memory.communicating import communicating, mark_communication
    from planaria.checkpoint.memory.tier import MemoryTier
    from planaria.checkpoint.policies import (
        Adaptive,
        Every,
        EverySeconds,
        KeepBest,
        KeepEvery,
        KeepLast,
        KeepPolicy,
        OnSignal,
        SavePolicy,
    )
    from planaria.checkpoint.reader import Checkpoint, open_checkpoint
    from planaria.checkpoint.restore import RestoreReport
    from planaria.checkpoint.storage.mirror import Mirror

_EXPORTS = {
    "LATER": "later",
    "Adaptive": "policies",
    "Checkpoint": "reader",
    "Checkpointer": "checkpointer",
    "Every": "policies",
    "EverySeconds": "policies",
    "Fuse": "layout.transforms",
    "KeepBest": "policies",
    "KeepEvery": "policies",
    "KeepLast": "policies",
    "KeepPolicy": "policies",
    "OnSignal": "policies",
    "MemoryTier": "memory.tier",
    "Mirror": "storage.mirror",
    "Pad": "layout.transforms",
    "Rename": "layout.transforms",
    "RestoreReport": "restore",
    "SaveHandle": "handle",
    "SavePolicy": "policies",
    "Split": "layout.transforms",
    "communicating": "memory.communicating",
    "mark_communication": "memory.communicating",
    "open_checkpoint": "reader",
}
__all__ = [
    "LATER",
    "Adaptive",
    "Checkpoint",
    "Checkpointer",
    "Every",
    "EverySeconds",
    "Fuse",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "KeepPolicy",
    "MemoryTier",
    "Mirror",
    "OnSignal",
    "Pad",
    "Rename",
    "RestoreReport",
    "SaveHandle",
    "SavePolicy",
    "Split",
    "communicating",
    "mark_communication",
    "open_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
