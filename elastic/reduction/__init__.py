"""The sum of gradients in a fixed order, whatever rank computed which micro-batch.

In reading order: `tree` (what is added to what), `assignment` (who computes which leaves),
`partial` (the sums that a rank has open), `transport` (parts of sums between ranks), `exchange`
(the tree over ranks), `buckets` and `accumulate` (flat pieces of the gradient), `worker` (the
thread that sends while backward runs), `ordered` (norms and metrics), `reducer` (all of it).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planaria.elastic.reduction.assignment import Assignment, assign
    from planaria.elastic.reduction.reducer import GradientReducer, Reduced
    from planaria.elastic.reduction.transport import Alone, GroupTransport, Transport

_EXPORTS = {
    "Alone": "transport",
    "Assignment": "assignment",
    "GradientReducer": "reducer",
    "GroupTransport": "transport",
    "Reduced": "reducer",
    "Transport": "transport",
    "assign": "assignment",
}
__all__ = [
    "Alone",
    "Assignment",
    "GradientReducer",
    "GroupTransport",
    "Reduced",
    "Transport",
    "assign",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
