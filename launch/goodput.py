"""Where the time of a run went, over all its attempts, under the names of ml-goodput.

Every moment from the first start to the last end counts once, on a clock that all ranks share:

=========================================  ========================================================
GOODPUT                                    steps that count, without what follows
PROGRAM_STARTUP                            from the start of an attempt to its first step
DATA_LOADING_SYNC                          training waited for data
UNPRODUCTIVE_CHECKPOINT_SAVE_TIME          any rank was blocked by a save, or waited for it to end
UNPRODUCTIVE_CHECKPOINT_RESTORE_TIME       a checkpoint was loaded
WASTED_PROGRESS_FROM_DISRUPTION            steps that were lost, whole or begun, and taken again
INFRASTRUCTURE_RECOVERY_FROM_DISRUPTION    no attempt ran, after one that had not ended as planned
OTHER                                      between steps, and the end of an attempt
=========================================  ========================================================

Between the end of a finished run and its extension nobody wanted it to train: that is left out.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from planaria import telemetry
from planaria.errors import ConfigError
from planaria.launch import metrics
from planaria.launch.intervals import Interval, common, length, union, without
from planaria.launch.run_folder import DONE, FAILED, PREEMPTED, RUNNING, Attempt, RunFolder

GOODPUT = "GOODPUT"
STARTUP = "PROGRAM_STARTUP"
DATA = "DATA_LOADING_SYNC"
SAVE = "UNPRODUCTIVE_CHECKPOINT_SAVE_TIME"
RESTORE = "UNPRODUCTIVE_CHECKPOINT_RESTORE_TIME"
WASTED = "WASTED_PROGRESS_FROM_DISRUPTION"
RECOVERY = "INFRASTRUCTURE_RECOVERY_FROM_DISRUPTION"
OTHER = "OTHER"
NAMES = (GOODPUT, STARTUP, DATA, SAVE, RESTORE, WASTED, RECOVERY, OTHER)

#: What a span says of the time it covers.
_SPANS = {
    "checkpoint.call": SAVE,
    "checkpoint.gate": SAVE,
    "checkpoint.close": SAVE,
    "checkpoint.restore": RESTORE,
    "data.wait": DATA,
}


@dataclass(frozen=True)
class Taken:
    """A step that was taken, from when to when; a step may be taken several times."""

    step: int
    start: float
    end: float


@dataclass
class Goodput:
    """Where the time of a run went.

    Attributes:
        seconds: Of each of `NAMES`.
        attempts: How many there were.
        steps: Steps that count.
        repeated: Steps that were taken again.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NAMES, 0.0))
    attempts: int = 0
    steps: int = 0
    repeated: int = 0

    @property
    def total_s(self) -> float:
        """Seconds in all."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Goodput as a share of the time."""
        return self.seconds[GOODPUT] / self.total_s if self.total_s else 0.0

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {"goodput": self.share, "total_s": self.total_s, **vars(self)}


def measure(folder: RunFolder) -> Goodput:
    """Adds up a run.

    Raises:
        ConfigError: It was never started.
    """
    records = read_telemetry(folder)
    taken = steps_taken(folder, records)
    attempts = folder.read_status().attempts
    if not attempts:
        raise ConfigError(f"{folder.path} was never started: there is no time to add up")
    if attempts[-1].ended is None and folder.is_active():
        attempts[-1].ended = time.time()
    _end_lost(attempts, [*(r["t"] + r.get("dur", 0.0) for r in records), *(t.end for t in taken)])
    return account(attempts, taken, records)


def _end_lost(attempts: Sequence[Attempt], signs: Sequence[float]) -> None:
    """Lets attempts whose launcher died go on until the last sign of life of their ranks."""
    for attempt, after in zip(attempts, [*attempts[1:], None], strict=True):
        if attempt.ended is None:
            attempt.ended, attempt.outcome = attempt.started, FAILED
        elif attempt.outcome != FAILED:
            continue
        until = math.inf if after is None else after.started
        attempt.ended = max([attempt.ended, *(s for s in signs if attempt.started < s < until)])


def account(
    attempts: Sequence[Attempt], taken: Sequence[Taken], records: Iterable[Mapping[str, Any]]
) -> Goodput:
    """Divides the time from the first start to the last end.

    Args:
        attempts: All of them, in order; each has ended.
        taken: Every step that was taken, in order.
        records: Telemetry of all ranks.
    """
    marks: dict[str, list[Interval]] = {SAVE: [], RESTORE: [], DATA: []}
    for record in records:
        name = _SPANS.get(record.get("name", ""))
        if name is not None and record.get("kind") == "span":
            marks[name].append((record["t"], record["t"] + record["dur"]))
    layers = [(name, union(marks[name])) for name in (RESTORE, SAVE, DATA)]
    final = {t.step: i for i, t in enumerate(taken)}  # the last time that each was taken
    counts = set(final.values())
    result = Goodput(attempts=len(attempts), steps=len(final), repeated=len(taken) - len(final))

    until = attempts[0].started
    for i, attempt in enumerate(attempts):
        start, end = max(attempt.started, until), max(attempt.ended or 0.0, until)
        if i and attempts[i - 1].outcome != DONE:
            result.seconds[RECOVERY] += max(0.0, start - until)
        until = end
        inside = [(j, t) for j, t in enumerate(taken) if start < t.end and t.start < end]
        kept = common(union((t.start, t.end) for j, t in inside if j in counts), [(start, end)])
        lost = common(union((t.start, t.end) for j, t in inside if j not in counts),
                      without([(start, end)], kept))  # fmt: skip
        _divide(result.seconds, kept, layers, GOODPUT)
        result.seconds[WASTED] += length(lost)
        stepped = union([*kept, *lost])
        first, last = (stepped[0][0], stepped[-1][1]) if stepped else (end, end)
        _divide(result.seconds, [(start, first)], layers, STARTUP)
        _divide(result.seconds, without([(first, last)], stepped), layers, OTHER)
        as_planned = attempt.outcome in (DONE, PREEMPTED, RUNNING)
        _divide(result.seconds, [(last, end)], layers, OTHER if as_planned else WASTED)
    return result


def _divide(
    seconds: dict[str, float],
    window: Sequence[Interval],
    layers: Sequence[tuple[str, list[Interval]]],
    rest: str,
) -> None:
    """Gives each part of a window to the first layer that covers it, and what is left to `rest`."""
    left = union(window)
    for name, covered in layers:
        seconds[name] += length(common(left, covered))
        left = without(left, covered)
    seconds[rest] += length(left)


def read_telemetry(folder: RunFolder) -> list[dict[str, Any]]:
    """The records of a run; none where telemetry was off."""
    try:
        return list(telemetry.read(folder.telemetry))
    except ConfigError:
        return []


def steps_taken(folder: RunFolder, records: Iterable[Mapping[str, Any]]) -> list[Taken]:
    """Every step that was taken, in order of time.

    The default job writes them down; of a user's script the calls of `Checkpointer.step` tell.
    """
    noted = metrics.read(folder.metrics)
    if noted:
        return [Taken(r.step, r.time - r.seconds, r.time) for r in noted]
    taken = []
    before: dict[int, float] = {}
    for record in records:
        if record.get("name") != "checkpoint.step" or record.get("rank") != 0:
            continue
        pid, t = int(record["pid"]), float(record["t"])
        # Of the first step of a process only the end is known: it counts as start-up.
        taken.append(Taken(record["step"], before.get(pid, t), t))
        before[pid] = t
    return taken
