"""What starts the ranks of a node, keeps the others alive when one dies, and fences what hangs.

In reading order: `environment`, `ranks` (failures, log files, requests to stop), `trainers` (the
processes), `stores` (where members meet), `node` (an agent's part in the job), `agent` (torch's
elastic agent on all of that).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planaria.elastic.agent.agent import ElasticAgent, JobEnd
    from planaria.elastic.agent.ranks import RankFailure, RankLogs, StopRequest

_EXPORTS = {
    "ElasticAgent": "agent",
    "JobEnd": "agent",
    "RankFailure": "ranks",
    "RankLogs": "ranks",
    "StopRequest": "ranks",
}
__all__ = ["ElasticAgent", "JobEnd", "RankFailure", "RankLogs", "StopRequest"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
