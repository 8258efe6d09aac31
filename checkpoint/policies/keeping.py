"""What to keep of the committed steps."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from planaria.errors import ConfigError

#: The metrics that were saved with a step; None where its manifest cannot be read.
MetricsOf = Callable[[int], Mapping[str, Any] | None]


@runtime_checkable
class KeepPolicy(Protocol):
    """Decides what to keep."""

    def keep(self, steps: Sequence[int]) -> set[int]:
        """The steps to keep, of all committed ones in ascending order.

        The newest is kept in any case, and so is the newest that verifies.
        """
        ...


@runtime_checkable
class MetricsKeepPolicy(KeepPolicy, Protocol):
    """A policy that looks at metrics, too."""

    def keep_by(self, steps: Sequence[int], metrics: MetricsOf) -> set[int]:
        """As `KeepPolicy.keep`, which is not called then.

        Args:
            steps: All committed steps in ascending order.
            metrics: Gives the metrics of a step.
        """
        ...


class _Joinable:
    """Joins policies by ``|``: a step is kept if any of them wants it."""

    def __or__(self, other: KeepPolicy) -> "KeepAny":
        if not isinstance(other, KeepPolicy):
            return NotImplemented
        return KeepAny(self, other)  # type: ignore[arg-type]


@dataclass(frozen=True)
class KeepLast(_Joinable):
    """Keeps the newest `count` steps."""

    count: int

    def __post_init__(self) -> None:
        if type(self.count) is not int or self.count < 1:
            raise ConfigError(f"keep={self.count!r}: give a number of checkpoints, 1 or more")

    def keep(self, steps: Sequence[int]) -> set[int]:
        """See `KeepPolicy.keep`."""
        return set(steps[-self.count :])


@dataclass(frozen=True)
class KeepEvery(_Joinable):
    """Keeps the steps whose number is a multiple of `steps`."""

    steps: int

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps < 1:
            raise ConfigError(f"KeepEvery({self.steps!r}): give a number of steps, 1 or more")

    def keep(self, steps: Sequence[int]) -> set[int]:
        """See `KeepPolicy.keep`."""
        return {s for s in steps if s % self.steps == 0}


@dataclass(frozen=True)
class KeepBest(_Joinable):
    """Keeps the `count` steps with the best value of a metric that was passed to `step` or `save`.

    Of equal values the newer step is better. Steps without the metric, or where it is NaN, are not
    among the best; where no step at all has it, all are kept: a misspelt name must not cost them.

    Attributes:
        metric: Its name.
        count: How many.
        mode: ``"min"`` where less is better, ``"max"`` where more is.
    """

    metric: str
    count: int = 1
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise ConfigError(f"KeepBest({self.metric!r}): give the name of a metric")
        if type(self.count) is not int or self.count < 1:
            raise ConfigError(f"KeepBest count={self.count!r}: give a number of steps, 1 or more")
        if self.mode not in ("min", "max"):
            raise ConfigError(f"KeepBest mode={self.mode!r}: use 'min' or 'max'")

    def keep(self, steps: Sequence[int]) -> set[int]:
        """See `KeepPolicy.keep`: all, as nothing is known of their metrics."""
        return set(steps)

    def keep_by(self, steps: Sequence[int], metrics: MetricsOf) -> set[int]:
        """See `MetricsKeepPolicy.keep_by`."""
        sign = 1.0 if self.mode == "min" else -1.0
        values = {step: number((metrics(step) or {}).get(self.metric)) for step in steps}
        ranked = sorted((sign * v, -step) for step, v in values.items() if v is not None)
        return {-step for _, step in ranked[: self.count]} if ranked else set(steps)


class KeepAny(_Joinable):
    """Keeps what any of several policies wants; what ``a | b`` makes."""

    def __init__(self, *policies: KeepPolicy) -> None:
        flat = [p.policies if isinstance(p, KeepAny) else (p,) for p in policies]
        self.policies: tuple[KeepPolicy, ...] = tuple(p for part in flat for p in part)

    def keep(self, steps: Sequence[int]) -> set[int]:
        """See `KeepPolicy.keep`."""
        return {s for p in self.policies for s in p.keep(steps)}

    def keep_by(self, steps: Sequence[int], metrics: MetricsOf) -> set[int]:
        """See `MetricsKeepPolicy.keep_by`."""
        return {s for p in self.policies for s in kept(p, steps, metrics)}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeepAny) and self.policies == other.policies

    def __hash__(self) -> int:
        return hash(self.policies)

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.policies))


def kept(policy: KeepPolicy, steps: Sequence[int], metrics: MetricsOf) -> set[int]:
    """The steps that a policy wants, whichever way it is asked."""
    if isinstance(policy, MetricsKeepPolicy):
        return set(policy.keep_by(steps, metrics))
    return set(policy.keep(steps))


def number(value: Any) -> float | None:
    """A metric as a number that can be compared; None for NaN and for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)


def keep_policy(keep: int | KeepPolicy | None) -> KeepPolicy | None:
    """The policy that a `keep=` argument stands for."""
    if keep is None or isinstance(keep, KeepPolicy):
        return keep
    return KeepLast(keep)
