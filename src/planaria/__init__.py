"""Planaria: elastic PyTorch training.

Importing this package is cheap: nothing below it, torch included, is loaded before it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "Checkpointer": "planaria.checkpoint",
    "open_checkpoint": "planaria.checkpoint",
    "GlobalBatch": "planaria.data",
    "PlanariaError": "planaria.errors",
}

__all__ = ["Checkpointer", "GlobalBatch", "PlanariaError", "__version__", "open_checkpoint"]

if TYPE_CHECKING:
    from planaria.checkpoint import Checkpointer, open_checkpoint
    from planaria.data import GlobalBatch
    from planaria.errors import PlanariaError


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'planaria' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
