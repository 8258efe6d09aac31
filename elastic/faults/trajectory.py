"""Trajectories: the loss of each step, bit by bit, written by any trainer in one line.

::

    from planaria.elastic.faults import record
    ...
    record(step, loss)  # on every rank, once the step is done

Where ``PLANARIA_TRAJECTORY`` names a folder, each process appends to a file of its own there::

    {"step":12,"loss_hex":"0x1.92p+1","loss":3.14,"rank":0,"pid":4711,"time":1731234567.89}

Without it nothing is written. The ``metrics.jsonl`` of `planaria run` can be read likewise.
"""

import json
import os
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsFloat

from planaria.core import points
from planaria.elastic.faults.schedule import RECORDED
from planaria.errors import ConfigError

ENV = "PLANARIA_TRAJECTORY"

points.declare(RECORDED, "a rank has written down a step that is done")

_file: tuple[int, str, int] | None = None  # of this process: its id, the folder, the descriptor
_SHOWN = 8


def record(step: int, loss: SupportsFloat | None = None, *, digest: str | None = None) -> None:
    """Writes down that a step is done on this rank; then faults that wait for it happen.

    Args:
        step: The step; a step that is taken again is recorded again.
        loss: Its loss, the same on all ranks: a number, or a tensor of one element.
        digest: A digest of whatever else must be equal, such as the parameters.

    Raises:
        ConfigError: The folder cannot be written.
    """
    folder = os.environ.get(ENV)
    if folder:
        value = None if loss is None else float(loss)
        line = {
            "step": int(step),
            "loss_hex": None if value is None else value.hex(),
            "loss": value if value is not None and abs(value) < float("inf") else None,
            "rank": int(os.environ.get("RANK", "0")),
            "pid": os.getpid(),
            "time": time.time(),
        }
        if digest is not None:
            line["digest"] = digest
        _append(folder, json.dumps(line, separators=(",", ":")).encode() + b"\n")
    points.point(RECORDED, step=int(step))


def _append(folder: str, line: bytes) -> None:
    global _file
    pid = os.getpid()
    try:
        if _file is None or _file[:2] != (pid, folder):
            os.makedirs(folder, exist_ok=True)
            name = f"rank-{os.environ.get('RANK', '0')}.{pid}.{time.time_ns()}.jsonl"
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            _file = pid, folder, os.open(os.path.join(folder, name), flags, 0o644)
        os.write(_file[2], line)
    except OSError as error:
        raise ConfigError(f"{ENV}={folder} cannot be written: {error.strerror}") from error


@dataclass(frozen=True)
class Step:
    """One record of a step.

    Attributes:
        step: The step.
        loss_hex: Its loss, as `float.hex`.
        digest: Of whatever else was recorded.
        rank: Who recorded it.
        time: When, in seconds since the epoch.
    """

    step: int
    loss_hex: str | None
    digest: str | None
    rank: int
    time: float

    @property
    def value(self) -> tuple[str | None, str | None]:
        """What must be equal."""
        return self.loss_hex, self.digest


@dataclass(frozen=True)
class Trajectory:
    """All records of a run, in order of time."""

    records: tuple[Step, ...]

    def steps(self) -> dict[int, Step]:
        """The last record of each step, in order of steps."""
        return dict(sorted({r.step: r for r in self.records}.items()))

    def conflicts(self) -> list[str]:
        """Steps of which ranks, or repetitions, say different things; one line each."""
        values: dict[int, dict[tuple[str | None, str | None], set[int]]] = {}
        for r in self.records:
            values.setdefault(r.step, {}).setdefault(r.value, set()).add(r.rank)
        return [
            f"step {step}: " + ", ".join(
                f"{_show(value)} on rank {', '.join(map(str, sorted(ranks)))}"
                for value, ranks in said.items()
            )
            for step, said in sorted(values.items())
            if len(said) > 1
        ]  # fmt: skip


class TrajectoryFollower:
    """Reads a trajectory while it grows.

    Args:
        path: The folder, or one file; it need not exist yet.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._offsets: dict[Path, int] = {}

    def poll(self) -> list[Step]:
        """The records added since the last call, in order of time; no half lines."""
        files = sorted(self._path.glob("*.jsonl")) if self._path.is_dir() else [self._path]
        found = [step for file in files for step in self._new(file)]
        return sorted(found, key=lambda s: s.time)

    def _new(self, file: Path) -> Iterator[Step]:
        offset = self._offsets.get(file, 0)
        try:
            with file.open("rb") as stream:
                stream.seek(offset)
                data = stream.read()
        except OSError:
            return
        data = data[: data.rfind(b"\n") + 1]
        self._offsets[file] = offset + len(data)
        for line in data.splitlines():
            step = _parse(line)
            if step is not None:
                yield step


def read_trajectory(path: str | os.PathLike[str]) -> Trajectory:
    """Reads a trajectory: a folder that `record` wrote to, or one file, as `metrics.jsonl`."""
    return Trajectory(tuple(TrajectoryFollower(path).poll()))


def differences(got: Trajectory, reference: Trajectory, *, prefix: bool = False) -> list[str]:
    """What is not equal bit by bit, the first step first; one line each.

    Args:
        got: The run with faults.
        reference: The undisturbed one.
        prefix: Whether `got` may end before the reference does.
    """
    ours, theirs = got.steps(), reference.steps()
    found = [f"the run disagrees with itself, {line}" for line in got.conflicts()]
    found += [f"the reference disagrees with itself, {line}" for line in reference.conflicts()]
    last = max(ours, default=-1)
    missing = [s for s in theirs if s not in ours and not (prefix and s > last)]
    strange = [s for s in ours if s not in theirs]
    if not theirs:
        found.append("the reference recorded no step")
    if missing:
        found.append(f"steps that were not recorded: {_ranges(missing)}")
    if strange:
        found.append(f"steps that the reference does not have: {_ranges(strange)}")
    for step in sorted(set(ours) & set(theirs)):
        one, other = ours[step].value, theirs[step].value
        if one != other:
            far = ulps(one[0], other[0])
            away = "" if not far else f" ({far} ULP apart)"
            found.append(f"step {step}: {_show(one)}, the reference has {_show(other)}{away}")
    return found


def assert_same(got: Trajectory, reference: Trajectory, *, prefix: bool = False) -> None:
    """Asserts that two trajectories are equal bit by bit; arguments as for `differences`.

    Raises:
        AssertionError: They are not; it says where they part, and by how much.
    """
    found = differences(got, reference, prefix=prefix)
    if found:
        more = [f"... and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        told = "\n  ".join([*found[:_SHOWN], *more])
        raise AssertionError(f"the trajectories differ:\n  {told}")


def ulps(one: str | None, other: str | None) -> int | None:
    """How many float64 numbers two losses are apart, None if one is missing or no number."""
    values = [None if text is None else float.fromhex(text) for text in (one, other)]
    if any(v is None or v != v for v in values):
        return None
    ordered = [_ordinal(v) for v in values if v is not None]
    return abs(ordered[0] - ordered[1])


def _ordinal(value: float) -> int:
    """The place of a number among all, so that neighbours differ by one."""
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return bits if bits >= 0 else -(bits & 0x7FFF_FFFF_FFFF_FFFF)


def _show(value: tuple[str | None, str | None]) -> str:
    loss, digest = value
    told = [] if loss is None else [f"{float.fromhex(loss)!r} ({loss})"]
    return ", ".join([*told, *([] if digest is None else [f"digest {digest}"])]) or "nothing"


def _ranges(steps: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for step in sorted(steps):
        if runs and step == runs[-1][-1] + 1:
            runs[-1][1:] = [step]
        else:
            runs.append([step])
    return ", ".join("-".join(map(str, run)) for run in runs[:_SHOWN]) + " ..." * (
        len(runs) > _SHOWN
    )


def _parse(line: bytes) -> Step | None:
    try:
        data: Any = json.loads(line)
        loss = data.get("loss_hex")
        if loss is not None:
            float.fromhex(loss)
        return Step(
            int(data["step"]), loss, data.get("digest"), int(data.get("rank", 0)),
            float(data.get("time", 0.0)),
        )  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
