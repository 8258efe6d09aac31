"""When to save.

What hangs on the step number alone is known to every rank (`due`). What hangs on a clock, a signal
or a measurement is not: there a rank only says what it wants (`wants`), and all save once any did.
The ranks find that out by the vote that also tells them to stop (see `planaria.checkpoint.decide`),
which nobody waits for: with several ranks such a save comes one step later.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from planaria.errors import ConfigError


@runtime_checkable
class SavePolicy(Protocol):
    """Decides when to save."""

    def due(self, step: int) -> bool:
        """Whether to save at this step. Must be the same on all ranks."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """What a rank knows at a step boundary. Times are in seconds, of this rank's own clock.

    Attributes:
        step: Steps done.
        rank: This rank; what hangs on a clock should hang on rank 0's alone.
        since_save_s: Since the last save began, or since the checkpointer was made.
        since_save: The same in steps.
        step_s: How long the last step took; None at the first boundary.
        blocked_s: How long training waited for checkpoints, on the rank that waited longest: in the
            last step, with several ranks in the one before it.
        disturbed: Whether a save was under way at any time in the last step.
        saving: Whether one is now, or begins at this boundary.
        persist_s: How long the last committed save took, from call to commit; None before one.
    """

    step: int
    rank: int
    since_save_s: float
    since_save: int
    step_s: float | None
    blocked_s: float
    disturbed: bool
    saving: bool
    persist_s: float | None


class _Joinable:
    """Joins policies by ``|``: a save is made where any of them says so."""

    def __or__(self, other: SavePolicy) -> "AnyOf":
        if not isinstance(other, SavePolicy):
            return NotImplemented
        return AnyOf(self, other)  # type: ignore[arg-type]


class VotedPolicy(_Joinable):
    """A policy that ranks need not answer alike: they vote. Base of one's own, too."""

    def due(self, step: int) -> bool:
        """See `SavePolicy.due`: nothing, as far as the number tells."""
        return False

    def wants(self, progress: Progress) -> bool:
        """Whether this rank wants a save; asked once at each step boundary.

        One rank is enough: all of them save at this boundary, or (of several ranks) at the next.
        """
        raise NotImplementedError

    def open(self) -> None:
        """Called when a checkpointer begins to use the policy, in the thread that made it."""

    def close(self) -> None:
        """Called when the checkpointer is closed."""


@dataclass(frozen=True)
class Every(_Joinable):
    """Saves each time the step number is a multiple of `steps`."""

    steps: int

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps < 1:
            raise ConfigError(f"every={self.steps!r}: give a number of steps, 1 or more")

    def due(self, step: int) -> bool:
        """See `SavePolicy.due`."""
        return step % self.steps == 0


@dataclass(frozen=True)
class EverySeconds(VotedPolicy):
    """Saves at the first step boundary `seconds` after the last save began, by rank 0's clock."""

    seconds: float

    def __post_init__(self) -> None:
        number = isinstance(self.seconds, int | float) and not isinstance(self.seconds, bool)
        if not number or not 0 < self.seconds < math.inf:
            raise ConfigError(f"EverySeconds({self.seconds!r}): give a number of seconds above 0")

    def wants(self, progress: Progress) -> bool:
        """See `VotedPolicy.wants`."""
        return progress.rank == 0 and progress.since_save_s >= self.seconds


class AnyOf(VotedPolicy):
    """Saves where any of several policies says so; what ``a | b`` makes."""

    def __init__(self, *policies: SavePolicy) -> None:
        flat = [p.policies if isinstance(p, AnyOf) else (p,) for p in policies]
        self.policies: tuple[SavePolicy, ...] = tuple(p for part in flat for p in part)

    def due(self, step: int) -> bool:
        """See `SavePolicy.due`."""
        answers = [p.due(step) for p in self.policies]  # all are asked: some may count
        return any(answers)

    def wants(self, progress: Progress) -> bool:
        """See `VotedPolicy.wants`."""
        answers = [p.wants(progress) for p in self._voted()]
        return any(answers)

    def open(self) -> None:
        """See `VotedPolicy.open`."""
        for policy in self._voted():
            policy.open()

    def close(self) -> None:
        """See `VotedPolicy.close`."""
        # In reverse, as for anything that was opened one after the other.
        for policy in reversed(self._voted()):
            policy.close()

    def _voted(self) -> list[VotedPolicy]:
        return [p for p in self.policies if isinstance(p, VotedPolicy)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AnyOf) and self.policies == other.policies

    def __hash__(self) -> int:
        return hash(self.policies)

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.policies))


def save_policy(every: int | SavePolicy | None) -> SavePolicy | None:
    """The policy that an `every=` argument stands for."""
    if every is None or isinstance(every, SavePolicy):
        return every
    return Every(every)
