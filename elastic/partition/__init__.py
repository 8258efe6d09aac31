"""Who owns which part of the optimizer's state, and who sends what to whom when that changes.

In reading order: `blocks` (where parameters are cut), `owners` (who has which block), `moves` (from
one partition to another), `shadows` (who keeps second copies), `holders` (owners and their
shadows), `optimizer` (an optimizer over blocks), `parcels` (what it sends to all), `transfer`
(blocks sent to other holders).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planaria.elastic.partition.blocks import Block, cut
    from planaria.elastic.partition.holders import Placement, fills, place, replace
    from planaria.elastic.partition.moves import Move, TransferPlan, plan_moves
    from planaria.elastic.partition.optimizer import ShardedOptimizer, Update, segments
    from planaria.elastic.partition.owners import Partition, least_moved, respread, spread

_EXPORTS = {
    "Block": "blocks",
    "Move": "moves",
    "Partition": "owners",
    "Placement": "holders",
    "ShardedOptimizer": "optimizer",
    "TransferPlan": "moves",
    "Update": "optimizer",
    "cut": "blocks",
    "fills": "holders",
    "least_moved": "owners",
    "place": "holders",
    "plan_moves": "moves",
    "replace": "holders",
    "respread": "owners",
    "segments": "optimizer",
    "spread": "owners",
}
__all__ = [
    "Block",
    "Move",
    "Partition",
    "Placement",
    "ShardedOptimizer",
    "TransferPlan",
    "Update",
    "cut",
    "fills",
    "least_moved",
    "place",
    "plan_moves",
    "replace",
    "respread",
    "segments",
    "spread",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
