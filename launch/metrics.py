"""`metrics.jsonl`: one line for each step that rank 0 finished, over all attempts of a run.

::

    {"step": 12, "loss": 3.1415, "loss_hex": "0x1.921cap+1", "tokens": 2048, "seconds": 0.31,
     "lr": 0.0006, "attempt": 0, "time": 1731234567.89}

A step that was lost with a failure and taken again has a line for each time; `loss_hex` is the
loss bit by bit, so that two of them can be compared.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class StepRecord:
    """One finished step.

    Attributes:
        step: Number of the step, from 1; also the number of finished steps.
        loss: Mean loss over the global batch, in nats per token.
        loss_hex: The same in hexadecimal, exact.
        tokens: Tokens of the global batch.
        seconds: Wall time of the step.
        lr: Learning rate of the step.
        attempt: Attempt that took the step.
        time: When it ended, in seconds since the epoch.
    """

    step: int
    loss: float
    loss_hex: str
    tokens: int
    seconds: float
    lr: float
    attempt: int
    time: float


_FIELDS = {f.name for f in fields(StepRecord)}


class MetricsWriter:
    """Appends to `metrics.jsonl`; every line is out of the process when `write` returns."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        # A killed process may have left half a line, which the next one must not be joined to.
        if self._file.tell() and not _ends_line(path):
            self._file.write(b"\n")

    def write(self, record: StepRecord) -> None:
        self._file.write(json.dumps(asdict(record)).encode() + b"\n")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MetricsFollower:
    """Reads `metrics.jsonl` while it grows.

    Args:
        path: The file; it need not exist yet.
        from_end: Skip what is there already.
    """

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self._path = path
        self._offset = path.stat().st_size if from_end and path.exists() else 0

    def poll(self) -> list[StepRecord]:
        """The records added since the last call; a line still being written is left for later."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        parsed = (_parse(line) for line in data.splitlines())
        return [record for record in parsed if record is not None]


def read(path: Path) -> list[StepRecord]:
    """All records of a run, in the order in which they were written."""
    return MetricsFollower(path).poll()


def kept(records: Sequence[StepRecord]) -> dict[int, StepRecord]:
    """The record of each step that counts: the one of the last time it was taken."""
    return dict(sorted({record.step: record for record in records}.items()))


def repeats(records: Sequence[StepRecord]) -> tuple[int, int]:
    """How often a step was taken again, and how often its loss was then the same bit by bit."""
    last: dict[int, str] = {}
    again = same = 0
    for record in records:
        before = last.get(record.step)
        if before is not None:
            again += 1
            same += before == record.loss_hex
        last[record.step] = record.loss_hex
    return again, same


def equal_losses(one: Mapping[int, StepRecord], other: Mapping[int, StepRecord]) -> tuple[int, int]:
    """How many steps both of two runs have, and how many of these have the same loss bit by bit."""
    both = one.keys() & other.keys()
    return len(both), sum(one[step].loss_hex == other[step].loss_hex for step in both)


def _parse(line: bytes) -> StepRecord | None:
    try:
        data = json.loads(line)
        return StepRecord(**{k: v for k, v in data.items() if k in _FIELDS})
    except (ValueError, TypeError, AttributeError):
        return None


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
