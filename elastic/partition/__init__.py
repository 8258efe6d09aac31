"""Who owns which part of the optimizer's state, and who sends what to whom when that changes.

In reading order: `blocks` (where parameters are cut), `owners` (who has which block), `moves` (from
one partition to another), `optimizer` (an optimizer over blocks).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planaria.elastic.partition.blocks import Block, cut
    from planaria.elastic.partition.moves import Move, TransferPlan, plan_moves
    from planaria.elastic.partition.optimizer import ShardedOptimizer, Update, segments
    from planaria.elastic.partition.owners import Partition, least_moved, respread, spread

_EXPORTS = {
    "Block": "blocks",
    "Move": "moves",
    "Partition": "owners",
    "ShardedOptimizer": "optimizer",
    "TransferPlan": "moves",
    "Update": "optimizer",
    "cut": "blocks",
    "least_moved": "owners",
    "plan_moves": "moves",
    "respread": "owners",
    "segments": "optimizer",
    "spread": "owners",
}
__all__ = [
    "Block",
    "Move",
    "Partition",
    "ShardedOptimizer",
    "TransferPlan",
    "Update",
    "cut",
    "least_moved",
    "plan_moves",
    "respread",
    "segments",
    "spread",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
