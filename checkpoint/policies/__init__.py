"""When to save, what to keep, and what a failed save does."""

from typing import Literal

from planaria.checkpoint.policies.adaptive import Adaptive
from planaria.checkpoint.policies.keeping import (
    KeepAny,
    KeepBest,
    KeepEvery,
    KeepLast,
    KeepPolicy,
    MetricsKeepPolicy,
    MetricsOf,
    keep_policy,
)
from planaria.checkpoint.policies.on_signal import OnSignal
from planaria.checkpoint.policies.saving import (
    AnyOf,
    Every,
    EverySeconds,
    Progress,
    SavePolicy,
    VotedPolicy,
    save_policy,
)

#: What a failed save does: stop the run; try again, then stop it; try again, then warn and go on.
FailurePolicy = Literal["fatal", "retry", "degrade"]

__all__ = [
    "Adaptive",
    "AnyOf",
    "Every",
    "EverySeconds",
    "FailurePolicy",
    "KeepAny",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "KeepPolicy",
    "MetricsKeepPolicy",
    "MetricsOf",
    "OnSignal",
    "Progress",
    "SavePolicy",
    "VotedPolicy",
    "keep_policy",
    "save_policy",
]
