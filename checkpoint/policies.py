"""When to save and what to keep."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from planaria.errors import ConfigError

#: What a failed save does: stop the run; try again, then stop it; try again, then warn and go on.
FailurePolicy = Literal["fatal", "retry", "degrade"]


class SavePolicy(Protocol):
    """Decides when to save."""

    def due(self, step: int) -> bool:
        """Whether to save at this step. Must be the same on all ranks."""
        ...


class KeepPolicy(Protocol):
    """Decides what to keep."""

    def keep(self, steps: Sequence[int]) -> set[int]:
        """The steps to keep, of all committed ones in ascending order.

        The newest is kept in any case.
        """
        ...


@dataclass(frozen=True)
class Every:
    """Saves each time the step number is a multiple of `steps`."""

    steps: int

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps < 1:
            raise ConfigError(f"every={self.steps!r}: give a number of steps, 1 or more")

    def due(self, step: int) -> bool:
        """See `SavePolicy.due`."""
        return step % self.steps == 0


@dataclass(frozen=True)
class KeepLast:
    """Keeps the newest `count` steps."""

    count: int

    def __post_init__(self) -> None:
        if type(self.count) is not int or self.count < 1:
            raise ConfigError(f"keep={self.count!r}: give a number of checkpoints, 1 or more")

    def keep(self, steps: Sequence[int]) -> set[int]:
        """See `KeepPolicy.keep`."""
        return set(steps[-self.count :])


def save_policy(every: "int | SavePolicy | None") -> SavePolicy | None:
    """The policy that an `every=` argument stands for."""
    if every is None or hasattr(every, "due"):
        return every  # type: ignore[return-value]
    return Every(every)  # type: ignore[arg-type]


def keep_policy(keep: "int | KeepPolicy | None") -> KeepPolicy | None:
    """The policy that a `keep=` argument stands for."""
    if keep is None or hasattr(keep, "keep"):
        return keep  # type: ignore[return-value]
    return KeepLast(keep)  # type: ignore[arg-type]
