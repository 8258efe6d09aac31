"""What happened in a drill: as text, as JSON, and as the gaps that faults made."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any, Literal

from planaria.elastic.faults.trajectory import Trajectory

What = Literal["start", "born", "died", "fault", "heal", "missed", "end", "left behind"]
Outcome = Literal["done", "failed", "deadline"]


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        t: Seconds since the drill began.
        what: Its sort: `fault` for what the schedule did, `heal` for the end of one that lasted,
            `missed` for one that could not be done, `born` and `died` for ranks.
        text: For people.
        rank: The rank that it concerns, where it is one.
    """

    t: float
    what: What
    text: str
    rank: int | None = None


@dataclass(frozen=True)
class Gap:
    """How long training stood still because of a fault.

    Attributes:
        t: When the fault was, in seconds since the drill began.
        fault: Which.
        seconds: From the last step before it to the first new one after it, without a normal step;
            steps that were taken again are part of it. None if no step came.
    """

    t: float
    fault: str
    seconds: float | None


@dataclass
class Report:
    """A drill from its begin to its end.

    Attributes:
        command: What was run.
        began: When, in seconds since the epoch.
        outcome: Whether the command came to a good end, a bad one, or none in time.
        codes: Exit codes of the command, one each time that it was started; negative for signals.
        seconds: How long the drill took.
        events: What happened, in order.
        trajectory: What the ranks recorded.
        output: The end of what the command last printed.
    """

    command: Sequence[str]
    began: float
    outcome: Outcome = "failed"
    codes: list[int] = field(default_factory=list)
    seconds: float = 0.0
    events: list[Event] = field(default_factory=list)
    trajectory: Trajectory = field(default_factory=lambda: Trajectory(()))
    output: str = ""

    def of(self, what: What) -> list[Event]:
        """The events of one sort."""
        return [event for event in self.events if event.what == what]

    @property
    def faults(self) -> list[Event]:
        """The faults that did happen."""
        return self.of("fault")

    @property
    def missed(self) -> list[Event]:
        """Those that did not: a drill with one of them has tested less than it was to."""
        return self.of("missed")

    def step_times(self) -> dict[int, float]:
        """Step -> when it was first recorded, in seconds since the drill began."""
        times: dict[int, float] = {}
        for step in self.trajectory.records:
            times.setdefault(step.step, step.time - self.began)
        return dict(sorted(times.items()))

    def step_s(self) -> float | None:
        """The median time of a step, None with fewer than two."""
        times = list(self.step_times().values())
        if len(times) < 2:
            return None
        return median(b - a for a, b in pairwise(times))

    def gaps(self) -> list[Gap]:
        """How long training stood still after each fault."""
        times, step_s = list(self.step_times().values()), self.step_s() or 0.0
        return [Gap(e.t, e.text, _gap(times, e.t, step_s)) for e in self.faults]

    def to_json(self) -> dict[str, Any]:
        """All of it but the records of the trajectory, as a JSON object."""
        steps = self.step_times()
        return {
            "command": list(self.command),
            "outcome": self.outcome,
            "codes": self.codes,
            "seconds": round(self.seconds, 3),
            "steps": len(steps),
            "last_step": max(steps, default=None),
            "step_s": self.step_s(),
            "faults": len(self.faults),
            "missed": [event.text for event in self.missed],
            "left_behind": [event.text for event in self.of("left behind")],
            "gaps": [asdict(gap) for gap in self.gaps()],
            "conflicts": self.trajectory.conflicts(),
            "events": [asdict(event) for event in self.events],
        }

    def lines(self) -> list[str]:
        """The timeline as text, one line an event, with the step that training was at."""
        times = sorted(self.step_times().items(), key=lambda pair: pair[1])
        told = []
        for event in self.events:
            at = [step for step, t in times if t <= event.t]
            step = f"step {max(at)}" if at else ""
            told.append(f"{event.t:9.3f} s  {step:<10} {event.what:<11} {event.text}")
        return told


def _gap(times: Sequence[float], t: float, step_s: float) -> float | None:
    """The longest pause between the last step before a moment and the two steps after it.

    The step that was under way at that moment may still have come to its end.
    """
    before = sum(time <= t for time in times)
    around = times[max(0, before - 1) : before + 2]
    if before == len(times) or len(around) < 2:
        return None
    longest = max(b - a for a, b in pairwise(around))
    return max(0.0, longest - step_s)
