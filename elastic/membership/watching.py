"""Who hangs and who is slow: pure functions over what members have said of their progress."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from planaria.elastic.membership.view import IDLE, WAITING
from planaria.errors import WireError

if TYPE_CHECKING:
    from planaria.elastic.membership.rules import Rules

# A member is called slow once it has been for so many seconds and steps.
_LASTING_S, _LASTING_STEPS = 2.0, 5
# Differences below are the machine's, not the member's.
_NOTICED_S = 0.1


@dataclass(frozen=True)
class Beat:
    """What a sign of life says: where a member is, since how many seconds, its step's duration."""

    step: int
    phase: str
    age: float
    step_s: float | None = None

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Beat:
        """Reads a beat.

        Raises:
            WireError: It is malformed.
        """
        try:
            step_s = record["step_s"]
            return Beat(
                int(record["step"]),
                str(record["phase"]),
                max(float(record["age"]), 0.0),
                None if step_s is None else float(step_s),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise WireError(f"a malformed heartbeat: {error!r}") from None


@dataclass
class Watched:
    """What is known of one member's progress."""

    heard: float
    moved: float = field(init=False)
    step: int = field(default=-1, init=False)
    phase: str = field(default=IDLE, init=False)
    step_s: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.moved = self.heard

    def hear(self, beat: Beat, now: float) -> None:
        """Takes a sign of life."""
        self.heard = now
        self.moved = max(self.moved, now - beat.age)
        self.step, self.phase, self.step_s = beat.step, beat.phase, beat.step_s

    def again(self, now: float) -> None:
        """Starts all clocks anew: a generation has begun, or its agent is back."""
        self.heard = self.moved = now


def to_blame(
    watched: Mapping[int, Watched],
    standing: Collection[int],
    regroups_since: float | None,
    rules: Rules,
    now: float,
    stands_since: float | None = None,
) -> dict[int, str]:
    """Members that hang, and why that is said of them.

    A member that merely waits for others is not to blame. Neither is one that takes long over
    something while nobody waits for it: survivors that evaluate, say, hear of a loss once they are
    done, and only then does the first of them begin to wait.

    Args:
        watched: Members in reach that may have a say.
        standing: Those of them that have said where they stand: they wait for the others.
        regroups_since: When regrouping began, None while all train.
        rules: The budgets.
        now: The time.
        stands_since: When the first of them said where it stands.
    """
    hang = rules.hang_s
    found = {}
    for member, each in watched.items():
        if now - each.heard >= hang:
            found[member] = f"no heartbeat for {now - each.heard:.1f} s"
    others = {m: each for m, each in watched.items() if m not in found}
    if regroups_since is not None:
        patience = min(hang, rules.recovery_s / 2)
        for member, each in others.items():
            # Who waits for others is woken by a loss at once.
            since = regroups_since if each.phase in WAITING else stands_since
            if member in standing or since is None or now - since < patience:
                continue
            waited, idle = now - since, now - max(each.moved, since)
            if idle >= patience or waited >= 0.75 * rules.recovery_s:
                found[member] = f"has not regrouped for {waited:.1f} s, it was in {each.phase}"
        return found
    waits = [e for e in others.values() if e.phase in WAITING and now - e.moved >= hang]
    for member, each in others.items():
        if waits and each.phase not in WAITING and now - each.moved >= hang:
            found[member] = (
                f"no progress for {now - each.moved:.1f} s in {each.phase} of step {each.step}, "
                "others wait for it"
            )
    if waits and len(waits) == len(others) > 1 and not found:
        # All wait. Who is a step behind keeps the others waiting.
        last = min(e.step for e in waits)
        if any(e.step > last for e in waits):
            for member, each in others.items():
                if each.step == last:
                    found[member] = f"waits in {each.phase} of step {last}, others are further"
    return found


def slow(watched: Mapping[int, Watched], factor: float) -> dict[int, float]:
    """Members whose own part of a step takes `factor` times the median or more, and that median."""
    times = {m: e.step_s for m, e in watched.items() if e.step_s is not None}
    if len(times) < 3:
        return {}
    middle = statistics.median(times.values())
    return {
        m: middle
        for m, t in sorted(times.items())
        if t >= factor * middle and t - middle > _NOTICED_S
    }


class SlowOnes:
    """Members that have been slow for a while; each is told of once.

    Args:
        factor: As for :func:`slow`.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._since: dict[int, tuple[float, int]] = {}  # when, and at which step
        self._told: set[int] = set()

    def look(self, watched: Mapping[int, Watched], now: float) -> list[tuple[int, float, float]]:
        """Those to be told of now, each with its step's duration and the median."""
        late, found = slow(watched, self._factor), []
        self._since = {m: self._since.get(m, (now, watched[m].step)) for m in late}
        for member, (since, step) in self._since.items():
            each = watched[member]
            lasting = now - since >= _LASTING_S and each.step - step >= _LASTING_STEPS
            if lasting and member not in self._told and each.step_s is not None:
                found.append((member, each.step_s, late[member]))
                self._told.add(member)
        self._told &= set(self._since)
        return found
