"""A picture of an elastic session: which ranks lived when, and the loss beside a reference's.

matplotlib is an extra, and is imported where something is drawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planaria.errors import ConfigError
from planaria.launch import picture
from planaria.launch.elastic_events import FENCED, GENERATION, LOST
from planaria.launch.metrics import StepRecord, kept

_ALIVE, _GONE, _GENERATION, _REFERENCE = "#6baed6", "#de2d26", "#969696", "#fdae6b"


@dataclass(frozen=True)
class Life:
    """One rank's part in a session.

    Attributes:
        member: Its number, for life.
        start: When it was first a member, in seconds since the epoch.
        end: When it was last known to be one.
        lost: Whether it was lost, and did not leave with the end of the run.
    """

    member: int
    start: float
    end: float
    lost: bool


def lives(events: Sequence[Mapping[str, Any]], until: float) -> list[Life]:
    """When each rank was a member.

    Args:
        events: Of `elastic.jsonl`, in order.
        until: The end of the run, in seconds since the epoch.
    """
    start: dict[int, float] = {}
    gone: dict[int, float] = {}
    found: list[Life] = []
    for event in events:
        if event["kind"] in (LOST, FENCED):
            gone.setdefault(event["member"], event["time"])
        elif event["kind"] == GENERATION:
            now = set(event["members"])
            for member in start.keys() - now:
                end = min(gone.get(member, event["time"]), event["time"])
                found.append(Life(member, start.pop(member), end, member in gone))
            for member in now - start.keys():
                start[member] = event["time"]
                gone.pop(member, None)
    found += [Life(member, begin, until, lost=False) for member, begin in start.items()]
    return sorted(found, key=lambda life: (life.start, life.member))


def draw_session(
    events: Sequence[Mapping[str, Any]],
    records: Sequence[StepRecord],
    reference: Sequence[StepRecord],
    path: Path,
) -> None:
    """Draws the ranks' lives over the time, and the loss over the steps.

    Args:
        events: Of `elastic.jsonl`.
        records: The run's steps.
        reference: Those of a run to compare with; may be empty.
        path: PNG to write.

    Raises:
        ConfigError: There was no session, or the file cannot be written.
        NotSupportedError: matplotlib is not installed.
    """
    if not any(event["kind"] == GENERATION for event in events) or not records:
        raise ConfigError("there was no elastic session with steps: nothing to draw")
    zero, until = events[0]["time"], max(r.time for r in records)
    shown = lives(events, until)
    figure = picture.figure(6.2)
    upper, lower = figure.subplots(2, 1, height_ratios=(1, 1.3))
    for row, life in enumerate(shown):
        left, width = life.start - zero, max(life.end - life.start, 0.05)
        upper.barh(-row, width, left=left, height=0.6, color=_ALIVE)
        if life.lost:
            upper.plot(left + width, -row, "x", color=_GONE, markersize=9, markeredgewidth=2.5)
    changes = [e for e in events if e["kind"] == GENERATION and e["generation"] > 1]
    for event in changes:
        upper.axvline(event["time"] - zero, color=_GENERATION, linewidth=0.8, linestyle=":")
    upper.set_yticks([-i for i in range(len(shown))], [f"rank {life.member}" for life in shown])
    upper.set_xlabel("seconds; a cross is a lost rank, a line a new generation")
    upper.spines[["top", "right"]].set_visible(False)
    if reference:
        steps = kept(reference)
        lower.plot(list(steps), [r.loss for r in steps.values()], color=_REFERENCE, linewidth=5,
                   label="undisturbed reference")  # fmt: skip
    steps = kept(records)
    lower.plot(list(steps), [r.loss for r in steps.values()], color="black", linewidth=1,
               label="this run")  # fmt: skip
    for event in changes:
        if event.get("step") is not None:
            lower.axvline(event["step"], color=_GENERATION, linewidth=0.8, linestyle=":")
    lower.set_xlabel("step")
    lower.set_ylabel("loss")
    lower.spines[["top", "right"]].set_visible(False)
    lower.legend(frameon=False)
    picture.save(figure, path)
