"""Faults on purpose, for any trainer: a schedule, a runner that carries it out, and equality.

In reading order: `schedule` (what goes wrong, when, to whom), `trajectory` (losses, compared bit by
bit), `processes`, `sockets` and `actions` (how it is done from outside), `runner` (starts commands,
carries a schedule out, leaves nothing behind), `report` and `picture`. None of them imports torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planaria.elastic.faults.report import Report
    from planaria.elastic.faults.runner import carry_out
    from planaria.elastic.faults.schedule import Fault, random_schedule
    from planaria.elastic.faults.trajectory import (
        Trajectory,
        assert_same,
        differences,
        read_trajectory,
        record,
    )

_EXPORTS = {
    "Fault": "planaria.elastic.faults.schedule",
    "Report": "planaria.elastic.faults.report",
    "Trajectory": "planaria.elastic.faults.trajectory",
    "assert_same": "planaria.elastic.faults.trajectory",
    "carry_out": "planaria.elastic.faults.runner",
    "differences": "planaria.elastic.faults.trajectory",
    "random_schedule": "planaria.elastic.faults.schedule",
    "read_trajectory": "planaria.elastic.faults.trajectory",
    "record": "planaria.elastic.faults.trajectory",
}
__all__ = [
    "Fault",
    "Report",
    "Trajectory",
    "assert_same",
    "carry_out",
    "differences",
    "random_schedule",
    "read_trajectory",
    "record",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
