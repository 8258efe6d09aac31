"""Trajectories are compared bit by bit, and where they part is told."""

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planaria.core import points
from planaria.elastic.faults.trajectory import (
    Step,
    Trajectory,
    TrajectoryFollower,
    assert_same,
    differences,
    read_trajectory,
    record,
    ulps,
)
from planaria.errors import ConfigError, FaultError


def made(losses: dict[int, float], rank: int = 0) -> Trajectory:
    return Trajectory(tuple(Step(s, v.hex(), None, rank, float(s)) for s, v in losses.items()))


def test_what_is_recorded_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(1, 0.5)  # nowhere
    monkeypatch.setenv("PLANARIA_TRAJECTORY", str(tmp_path / "steps"))
    monkeypatch.setenv("RANK", "2")
    follower = TrajectoryFollower(tmp_path / "steps")
    assert not follower.poll()
    for step, loss in enumerate([0.1, math.nan, math.inf, -0.0], 1):
        record(step, loss)
    record(5, digest="ab")
    found = follower.poll()
    assert not follower.poll()
    assert [s.loss_hex for s in found] == [(0.1).hex(), "nan", "inf", "-0x0.0p+0", None]
    assert {s.rank for s in found} == {2}
    trajectory = read_trajectory(tmp_path / "steps")
    assert trajectory.records == tuple(found)
    assert_same(trajectory, trajectory)
    (file,) = (tmp_path / "steps").iterdir()
    assert all(json.loads(line) for line in file.read_text().splitlines())
    with file.open("a") as torn:
        torn.write('{"step":6,"lo')
    assert not follower.poll()
    monkeypatch.setenv("PLANARIA_TRAJECTORY", str(file / "no folder"))
    with pytest.raises(ConfigError, match="PLANARIA_TRAJECTORY"):
        record(1, 0.5)


def test_the_metrics_of_a_run_are_a_trajectory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5, "loss_hex": "0x1p-1", "time": 2.0}\nnot json\n7\n')
    assert read_trajectory(path).records == (Step(1, "0x1p-1", None, 0, 2.0),)


def test_faults_happen_once_a_step_is_recorded() -> None:
    with points.armed("raise=Now@elastic.faults.recorded:step=3"):
        record(2, 0.5)
        with pytest.raises(FaultError, match="Now"):
            record(3, 0.5)


def test_equal_ones_are_equal() -> None:
    one = made({1: 0.1, 2: 0.2})
    assert not differences(one, made({2: 0.2, 1: 0.1}))
    assert not differences(made({1: 0.1}), one, prefix=True)
    again = Trajectory((*one.records, *made({2: 0.2}, rank=1).records))
    assert not differences(again, one)
    assert not differences(made({1: math.nan}), made({1: math.nan}))


@pytest.mark.parametrize(
    ("got", "says"),
    [
        ({1: 0.1}, "steps that were not recorded: 2-3"),
        ({1: 0.1, 2: 0.2, 3: 0.3, 5: 1.0}, "the reference does not have: 5"),
        ({1: 0.1, 2: math.nextafter(0.2, 1), 3: 0.3}, r"step 2: .* \(1 ULP apart\)"),
        ({1: 0.1, 2: 0.2, 3: math.nan}, "step 3: nan"),
    ],
)
def test_what_differs_is_told(got: dict[int, float], says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        assert_same(made(got), made({1: 0.1, 2: 0.2, 3: 0.3}))


def test_ranks_and_repetitions_that_disagree_are_told() -> None:
    reference = made({1: 0.1})
    other = Trajectory((*reference.records, *made({1: 0.2}, rank=3).records))
    assert "disagrees with itself, step 1" in differences(other, reference)[0]
    assert "on rank 3" in differences(other, reference)[0]
    assert differences(reference, other)[0].startswith("the reference disagrees")


def test_an_empty_reference_proves_nothing() -> None:
    assert differences(Trajectory(()), Trajectory(())) == ["the reference recorded no step"]


@given(st.floats(allow_nan=False), st.integers(0, 1000))
def test_ulps_count_the_floats_between(value: float, n: int) -> None:
    other = value
    for _ in range(n % 20):
        other = math.nextafter(other, math.inf)
    if math.isfinite(other):
        same = struct.pack("<d", value) == struct.pack("<d", other)
        zeros = value == other == 0
        assert same or zeros or ulps(value.hex(), other.hex()) == n % 20
    assert ulps(None, value.hex()) is None
    assert ulps("nan", value.hex()) is None


def test_no_torch_is_loaded() -> None:
    code = (
        "import sys, planaria.elastic.faults as f; f.record(1, 0.5); f.carry_out; f.Report;"
        "import planaria.elastic.faults.picture; print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ), capture_output=True, timeout=120
    )
    assert done.stdout.strip() == b"False", done.stderr
