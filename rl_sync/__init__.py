"""Sparse, exact weight sync from trainers to rollout workers."""

import importlib
from typing import TYPE_CHECKING, Any

if not __name__.startswith("planaria."):
    raise ImportError(f"import this package as 'planaria.{__name__}', not as {__name__!r}")

if TYPE_CHECKING:
    from planaria.rl_sync.layout.rollout import RolloutLayout
    from planaria.rl_sync.publisher import Publisher
    from planaria.rl_sync.reports import PublishReport, UpdateReport
    from planaria.rl_sync.subscriber import Subscriber

_EXPORTS = {
    "PublishReport": "reports",
    "Publisher": "publisher",
    "RolloutLayout": "layout.rollout",
    "Subscriber": "subscriber",
    "UpdateReport": "reports",
}
__all__ = ["PublishReport", "Publisher", "RolloutLayout", "Subscriber", "UpdateReport"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
