"""The order of the data: a global batch that does not depend on who computes it.

In reading order: `order` (which sample stands where), `rng` (the random numbers of a
micro-batch), `streams` (iterable datasets), `feed` (fetching, in this process or ahead of it),
`global_batch` (what a training loop uses).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planaria.data.global_batch import GlobalBatch
    from planaria.data.order import Permutation
    from planaria.data.rng import micro_batch_seed

_EXPORTS = {
    "GlobalBatch": "global_batch",
    "Permutation": "order",
    "micro_batch_seed": "rng",
}
__all__ = ["GlobalBatch", "Permutation", "micro_batch_seed"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
