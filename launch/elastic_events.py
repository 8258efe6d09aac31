"""`elastic.jsonl`: what happened to the ranks of an elastic session, and what each change cost.

One line for each event, with the time in seconds since the epoch::

    {"time": 1731234567.89, "kind": "lost", "member": 1, "how": "SIGKILL", ...}
    {"time": 1731234567.93, "kind": "generation", "generation": 2, "members": [0, 2, 3], ...}

The launcher writes what the agent tells it; `transitions` puts it together with the steps that rank
0 noted.
"""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from planaria.launch.metrics import StepRecord

LOST, LEFT, FENCED, GENERATION = "lost", "left", "fenced", "generation"


class EventsWriter:
    """Appends to `elastic.jsonl`; every line is out of the process when `write` returns."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, kind: str, content: Mapping[str, Any]) -> None:
        """Notes an event.

        Args:
            kind: What happened.
            content: More of it, of JSON values; `at` is the time, by default this moment.
        """
        more = {k: v for k, v in content.items() if k not in ("at", "me", "store")}
        record = {"time": content.get("at", time.time()), "kind": kind, **more}
        self._file.write(json.dumps(record).encode() + b"\n")

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All events of a run, in order; none where there was no session."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    found = []
    for line in data.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # torn by a launcher that was killed
        if isinstance(event, dict) and "time" in event and "kind" in event:
            found.append(event)
    return sorted(found, key=lambda event: event["time"])


@dataclass(frozen=True)
class Transition:
    """One change of the ranks.

    Attributes:
        time: When the first sign of it was seen, in seconds since the epoch.
        generation: The generation that it made.
        lost: Members that are gone.
        joined: Members that came.
        world_size: Ranks after it.
        step: Steps that were committed then.
        agreed_s: Seconds until all ranks had agreed; None where that is not known.
        gap_s: From the last step before it to the first one after it, less a usual step, in
            seconds; None where no step followed.
    """

    time: float
    generation: int
    lost: tuple[int, ...]
    joined: tuple[int, ...]
    world_size: int
    step: int | None
    agreed_s: float | None
    gap_s: float | None

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self)


def transitions(
    events: Sequence[Mapping[str, Any]], records: Sequence[StepRecord]
) -> list[Transition]:
    """Every change of the ranks within an attempt, in order.

    Args:
        events: Of `elastic.jsonl`.
        records: The run's steps, in the order in which they were written.
    """
    usual = statistics.median(r.seconds for r in records) if records else 0.0
    ends = sorted(r.time for r in records)
    found: list[Transition] = []
    members: set[int] = set()
    since: float | None = None
    for event in events:
        if event["kind"] in (LOST, FENCED, LEFT) and since is None:
            since = event["time"]
        if event["kind"] != GENERATION:
            continue
        now = set(event["members"])
        if members and event["generation"] > 1 and now != members:
            began = event["time"] if since is None else since
            before = max((end for end in ends if end <= began), default=None)
            after = min((end for end in ends if end > event["time"]), default=None)
            gap = None if before is None or after is None else max(0.0, after - before - usual)
            found.append(
                Transition(
                    began,
                    event["generation"],
                    tuple(sorted(members - now)),
                    tuple(sorted(now - members)),
                    len(now),
                    event.get("step"),
                    None if since is None else event["time"] - since,
                    gap,
                )
            )
        members, since = now, None
    return found
