"""Telemetry of all ranks as one trace in Chrome's event format, which Perfetto opens.

Every rank of every attempt is a process there, with its threads; the launcher's attempts are one
more. Times are microseconds since the first record.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from planaria.launch.run_folder import Attempt

#: What a record has of its own; the rest are attributes.
_OWN = {"t", "kind", "name", "dur", "rank", "pid", "thread", "value"}
#: Spans are timed by another clock than the one that places them: so much may they overlap.
_SLACK_US = 500.0


def chrome_trace(
    records: Sequence[Mapping[str, Any]],
    attempts: Sequence[Attempt] = (),
    changes: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Builds the trace.

    Args:
        records: Telemetry of all ranks, in order of time.
        attempts: The launcher's starts of the ranks; each has ended.
        changes: Events of an elastic session: ranks that were lost or came.
    """
    times = [r["t"] for r in records] + [a.started for a in attempts]
    zero = min(times + [change["time"] for change in changes], default=0.0)
    tracks = _Tracks(attempts)
    events: list[dict[str, Any]] = []
    spans: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        pid = tracks.process(record)
        event = {
            "name": record["name"],
            "cat": record["name"].partition(".")[0],
            "ts": round((record["t"] - zero) * 1e6, 3),
            "pid": pid,
            "args": {k: v for k, v in record.items() if k not in _OWN},
        }
        kind = record.get("kind")
        if kind == "span":
            event |= {"ph": "X", "dur": round(record["dur"] * 1e6, 3)}
            spans[pid, record.get("thread", "")].append(event)
        elif kind == "count":
            events.append({**event, "ph": "C", "args": {"value": record.get("value", 0)}})
        else:
            tid = tracks.thread(pid, record.get("thread", ""))
            events.append({**event, "ph": "i", "s": "t", "tid": tid})
    for (pid, thread), found in spans.items():
        events += _nest(found, lambda lane, p=pid, t=thread: tracks.thread(p, t, lane))
    events += [
        {
            "name": f"attempt {a.attempt}: {a.outcome}",
            "cat": "launcher",
            "ph": "X",
            "ts": round((a.started - zero) * 1e6, 3),
            "dur": round(((a.ended or a.started) - a.started) * 1e6, 3),
            "pid": 0,
            "tid": 0,
            "args": {"ranks": a.ranks, "reason": a.reason},
        }
        for a in attempts
    ]
    events += [
        {
            "name": f"{change['kind']} {change.get('member', change.get('generation', ''))}",
            "cat": "elastic",
            "ph": "i",
            "s": "g",
            "ts": round((change["time"] - zero) * 1e6, 3),
            "pid": 0,
            "tid": 0,
            "args": {k: v for k, v in change.items() if k not in ("time", "kind")},
        }
        for change in changes
    ]
    return {
        "traceEvents": [*tracks.names(), *sorted(events, key=lambda e: e["ts"])],
        "displayTimeUnit": "ms",
        "otherData": {"epoch_s": zero},
    }


class _Tracks:
    """Numbers for processes and threads, and their names."""

    def __init__(self, attempts: Sequence[Attempt]) -> None:
        self._attempts = attempts
        self._processes: dict[tuple[int, int, int], int] = {}
        self._threads: dict[tuple[int, str, int], int] = {}
        self._labels: dict[int, tuple[str, int]] = {}
        if attempts:
            self._labels[0] = "launcher", -1

    def process(self, record: Mapping[str, Any]) -> int:
        """The trace's process for a rank's; process ids come round, so it has a number of its own.

        A rank's process belongs to the attempt that had begun last when it first told something.
        """
        rank, pid = record.get("rank", 0), record.get("pid", 0)
        begun = [a.attempt for a in self._attempts if a.started <= record["t"]]
        key = rank, pid, begun[-1] if begun else 0
        if key not in self._processes:
            number = self._processes[key] = len(self._processes) + 1
            several = f", attempt {key[2]}" if len(self._attempts) > 1 else ""
            self._labels[number] = f"rank {rank}{several} (pid {pid})", key[2] * 100_000 + rank
        return self._processes[key]

    def thread(self, process: int, name: str, lane: int = 0) -> int:
        """The trace's thread; spans that do not nest in one get further lanes of it."""
        key = process, name, lane
        if key not in self._threads:
            self._threads[key] = len(self._threads) + 1
        return self._threads[key]

    def names(self) -> list[dict[str, Any]]:
        """The events that name processes and threads."""
        meta: list[dict[str, Any]] = []
        for pid, (label, order) in self._labels.items():
            meta.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": label}})
            meta.append(
                {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": order}}
            )
        for (pid, name, lane), tid in self._threads.items():
            label = f"{name} ({lane + 1})" if lane else name
            meta.append(
                {
                    "ph": "M",
                    "name": "thread_name",
                    "pid": pid,
                    "tid": tid,
                    "args": {"name": label},
                }
            )
        return meta


def _nest(spans: Sequence[dict[str, Any]], thread: Callable[[int], int]) -> list[dict[str, Any]]:
    """Puts the spans of one thread on lanes such that on each they nest, as the format demands.

    Args:
        spans: The spans.
        thread: Gives the trace's thread for a lane.
    """
    lanes: list[list[float]] = []  # the ends of the spans that are open on each
    placed = []
    for event in sorted(spans, key=lambda e: (e["ts"], -e["dur"])):
        start, end = event["ts"], event["ts"] + event["dur"]
        lane = _lane(lanes, start, end)
        open_ends = lanes[lane]
        if open_ends:
            end = min(end, open_ends[-1])
        open_ends.append(end)
        placed.append({**event, "dur": round(end - start, 3), "tid": thread(lane)})
    return placed


def _lane(lanes: list[list[float]], start: float, end: float) -> int:
    """The first lane on which a span nests; a new one where it does on none."""
    for number, open_ends in enumerate(lanes):
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        if not open_ends or end <= open_ends[-1] + _SLACK_US:
            return number
    lanes.append([])
    return len(lanes) - 1
