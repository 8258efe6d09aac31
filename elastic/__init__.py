"""Training whose numbers do not depend on who computes them.

In reading order: `rng` (random numbers of a micro-batch), `reduction` (the gradient's sum in a
fixed order), `partition` (blocks, their owners, an optimizer over them), `membership` (who takes
part), `agent` (what starts ranks and keeps them), `engine` and `session` (a training loop that goes
on). README.md says what is not built yet.
"""

import importlib
from typing import TYPE_CHECKING, Any

if not __name__.startswith("planaria."):
    raise ImportError(f"import this package as 'planaria.{__name__}', not as {__name__!r}")

if TYPE_CHECKING:
    from planaria.data import GlobalBatch
    from planaria.elastic.session import Session

_EXPORTS = {"GlobalBatch": "planaria.data", "Session": "planaria.elastic.session"}
__all__ = ["GlobalBatch", "Session"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
