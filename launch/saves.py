"""What telemetry says of each save of a run: how long it blocked, was copied and was written."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from planaria.launch.goodput import Taken

_PARTS = {
    "checkpoint.call": "call_s",
    "checkpoint.gate": "gate_s",
    "checkpoint.capture": "capture_s",
    "checkpoint.persist": "persist_s",
    "checkpoint.fsync": "fsync_s",
}


@dataclass
class Save:
    """One save, on the rank that took longest for each part.

    Attributes:
        step: The step that was saved.
        began: When, in seconds since the epoch.
        ok: Whether it was committed.
        call_s: Seconds that the call took.
        gate_s: Seconds that optimizers waited.
        stall_s: Both together, on the rank that was blocked longest.
        capture_s: Seconds of copying, in the background.
        persist_s: Seconds of writing and committing, in the background.
        fsync_s: Seconds of that in which the disk was waited for.
    """

    step: int
    began: float
    ok: bool = False
    call_s: float = 0.0
    gate_s: float = 0.0
    stall_s: float = 0.0
    capture_s: float = 0.0
    persist_s: float = 0.0
    fsync_s: float = 0.0
    _of_rank: dict[int, dict[str, float]] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {k: v for k, v in vars(self).items() if not k.startswith("_")}


def saves_of(records: Iterable[Mapping[str, Any]]) -> list[Save]:
    """Every save of a run, in order.

    All ranks make the same saves, so the n-th call of a step is the same save on each.

    Args:
        records: Telemetry of all ranks, in order of time.
    """
    calls: dict[tuple[int, int], int] = defaultdict(int)
    saves: dict[tuple[int, int], Save] = {}
    for record in records:
        part, step = _PARTS.get(record.get("name", "")), record.get("step")
        if part is None or step is None or record.get("kind") != "span":
            continue
        rank = record.get("rank", 0)
        calls[rank, step] += part == "call_s"
        save = saves.setdefault((step, calls[rank, step]), Save(step, record["t"]))
        times = save._of_rank.setdefault(rank, defaultdict(float))
        times[part] += record["dur"]
        if part == "persist_s" and rank == 0:
            save.ok = bool(record.get("ok"))
    for save in saves.values():
        for part in _PARTS.values():
            setattr(save, part, max(times[part] for times in save._of_rank.values()))
        save.stall_s = max(t["call_s"] + t["gate_s"] for t in save._of_rank.values())
    return sorted(saves.values(), key=lambda save: save.began)


def step_seconds(taken: Sequence[Taken]) -> float | None:
    """The median duration of a step; None where no step is known from start to end."""
    known = [t.end - t.start for t in taken if t.end > t.start]
    return median(known) if known else None
