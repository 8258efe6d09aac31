"""What decisions go by, and what comes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from planaria.elastic.membership.view import View
from planaria.errors import ConfigError

JOIN, LEAVE, STOP = "join", "leave", "stop"
POLICIES = ("shrink", "replace", "replace_then_shrink", "shrink_then_replace")


@dataclass(frozen=True)
class Rules:
    """How a job deals with losses.

    Attributes:
        world: Members that the job begins with, and that replacing aims at.
        policy: What to do about a lost member. `shrink`: go on with fewer. `replace`: wait for a
            replacement, stop if there is none in time. `replace_then_shrink`: wait for it, go on
            with fewer if it does not come in time. `shrink_then_replace`: go on with fewer at once;
            the replacement joins when it is ready.
        minimum: Fewest members to go on with.
        maximum: Most members; None for `world`.
        hang_s: Seconds without a heartbeat, or without progress while others wait, after which a
            member is killed.
        recovery_s: Seconds in which a job has to regroup.
        replace_s: Seconds to wait for replacements; None for half of `recovery_s`.
        lease_s: Seconds after which members whose agent is out of reach are gone on without, given
            a quorum; None for `hang_s`.
        join_s: Seconds in which the first members have to come.
        start_s: Seconds after which a process that was started and has not asked to join is killed.
        starts: Replacements in a row that may die before they join, or be refused.
        rest_s: Seconds after a loss before its replacement is started, where the others go on
            meanwhile: its start is not to slow down their recovery.
        repeats: Losses in a row without any step committed in between, after which the job stops.
        slow_factor: Times the median of the step time from which on a member is called slow.
        wait_for_joiners: Below the minimum, wait for others' ranks to join, too.
    """

    world: int
    policy: str = "shrink"
    minimum: int = 1
    maximum: int | None = None
    hang_s: float = 30.0
    recovery_s: float = 60.0
    replace_s: float | None = None
    lease_s: float | None = None
    join_s: float = 600.0
    start_s: float = 120.0
    starts: int = 3
    rest_s: float = 0.5
    repeats: int = 8
    slow_factor: float = 1.5
    wait_for_joiners: bool = True

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"policy {self.policy!r} is none of {', '.join(POLICIES)}")
        if not 1 <= self.minimum <= self.world <= self.most:
            raise ConfigError(
                f"a job of {self.world} members needs 1 <= minimum <= {self.world} <= maximum, "
                f"not minimum {self.minimum} and maximum {self.most}"
            )
        for name in ("hang_s", "recovery_s", "join_s", "start_s", "contact_s"):
            if not 0 < getattr(self, name) < math.inf:
                said = "lease_s" if name == "contact_s" else name
                raise ConfigError(
                    f"{said} has to be a number of seconds above 0, not {getattr(self, name)!r}"
                )
        for name in ("patience_s", "rest_s", "starts"):
            if not 0 <= getattr(self, name) < math.inf:
                said = "replace_s" if name == "patience_s" else name
                raise ConfigError(f"{said} has to be 0 or more, not {getattr(self, name)!r}")
        if self.repeats < 1 or not self.slow_factor > 1:
            raise ConfigError(
                f"repeats has to be 1 or more and slow_factor above 1, not {self.repeats!r} and "
                f"{self.slow_factor!r}"
            )

    @property
    def patience_s(self) -> float:
        """Seconds to wait for replacements."""
        return self.recovery_s / 2 if self.replace_s is None else self.replace_s

    @property
    def contact_s(self) -> float:
        """Seconds out of contact after which others may go on without this one."""
        return min(self.hang_s, self.recovery_s / 2) if self.lease_s is None else self.lease_s

    @property
    def most(self) -> int:
        """The most members that there may be."""
        return self.world if self.maximum is None else self.maximum

    @property
    def replaces(self) -> bool:
        """Whether replacements are started."""
        return self.policy != "shrink"

    @property
    def waits(self) -> bool:
        """Whether survivors wait for replacements."""
        return self.policy in ("replace", "replace_then_shrink")


@dataclass(frozen=True)
class Tell:
    """A message for one member."""

    member: int
    message: Mapping[str, Any]


@dataclass(frozen=True)
class Publish:
    """A new generation, for all its members."""

    view: View


@dataclass(frozen=True)
class Fence:
    """A member to be killed, and proven dead."""

    member: int
    reason: str


@dataclass(frozen=True)
class Start:
    """A process to be started under an id, in the place of one that was lost."""

    member: int
    instead_of: int | None


@dataclass(frozen=True)
class Stop:
    """The end of the job: it cannot go on."""

    reason: str


@dataclass(frozen=True)
class Note:
    """Something for the log and the timeline."""

    kind: str
    content: Mapping[str, Any] = field(default_factory=dict)


Action = Tell | Publish | Fence | Start | Stop | Note
