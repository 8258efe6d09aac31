"""Schedules are the same for the same seed, and refuse what cannot be done."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planaria.core import points
from planaria.elastic.faults import runner, schedule
from planaria.elastic.faults.report import Event, Report
from planaria.elastic.faults.schedule import KINDS, Fault, armed_inside, random_schedule
from planaria.elastic.faults.trajectory import Step, Trajectory
from planaria.errors import ConfigError

OUTSIDE = [kind for kind in KINDS if kind not in schedule.INSIDE]


@given(
    st.integers(0, 2**32),
    st.integers(1, 8),
    st.sets(st.sampled_from(OUTSIDE), min_size=1),
)
def test_a_seed_draws_the_same_schedule(seed: int, world: int, kinds: set[str]) -> None:
    def draw() -> list[Fault]:
        targets = {"corrupt_file": "*.bin", "corrupt_memory": "/memfd:*"}
        return random_schedule(
            seed, mtbf_s=5, horizon_s=60, world=world, kinds=kinds, targets=targets
        )

    faults = draw()
    assert faults == draw()
    assert schedule.load(schedule.dump(faults)) == faults
    times = [f.at_s for f in faults]
    assert times == sorted(times, key=lambda t: t or 0)
    assert all(f.kind in kinds and 0 <= f.ranks[0] < world for f in faults)


def test_as_many_faults_come_as_the_mean_says() -> None:
    count = sum(len(random_schedule(seed, mtbf_s=5, horizon_s=100, world=4)) for seed in range(100))
    assert 1800 < count < 2200


def test_some_ranks_are_spared() -> None:
    faults = random_schedule(1, mtbf_s=1, horizon_s=100, world=3, spare=(0,))
    assert {f.ranks[0] for f in faults} == {1, 2}


def test_faults_at_points_are_armed_in_the_ranks() -> None:
    faults = [
        Fault("kill", (1, 2), step=5, point="demo.step"),
        Fault("disk_full", point="checkpoint.write.*"),
        Fault("kill", (0,), step=3),
    ]
    spec = armed_inside(faults, "sleep=1@x")
    assert spec.split(";") == [
        "sleep=1@x", "kill@demo.step:rank=1,step=5", "kill@demo.step:rank=2,step=5",
        "enospc@checkpoint.write.*",
    ]  # fmt: skip
    assert len(points.parse(spec)) == 4
    with pytest.raises(ConfigError, match="not a pattern"):
        armed_inside([Fault("kill", point="A B")])


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "melt", "step": 1},
        {"kind": "kill"},
        {"kind": "kill", "step": 1, "at_s": 1.0},
        {"kind": "kill", "at_s": 1.0, "point": "a"},
        {"kind": "disk_full", "step": 1},
        {"kind": "slow", "step": 1},
        {"kind": "slow", "step": 1, "for_s": 1.0, "share": 0.0},
        {"kind": "slow", "point": "a", "for_s": 1.0},
        {"kind": "stop", "point": "a", "for_s": 1.0},
        {"kind": "corrupt_file", "step": 1},
        {"kind": "partition", "step": 1, "for_s": 1.0},
        {"kind": "kill", "at_s": -1.0},
        {"kind": "kill", "at_s": math.nan},
        {"kind": "kill", "step": 1.5},
        {"kind": "kill", "step": "5"},
        {"kind": "kill", "step": 1, "ranks": ("1",)},
        {"kind": "slow", "step": 1, "for_s": math.nan},
    ],
)
def test_faults_that_make_no_sense_are_refused(bad: dict) -> None:
    with pytest.raises(ConfigError, match="fault "):
        Fault(**bad)


def test_an_endless_fault_survives_json() -> None:
    fault = Fault("stop", (1,), step=3, for_s=math.inf)
    assert schedule.load(schedule.dump([fault])) == [fault]
    for text in ("{", "{}", "[1]", '[{"kind": "kill", "step": 1, "colour": 1}]'):
        with pytest.raises(ConfigError):
            schedule.load(text)


@pytest.mark.parametrize(
    "bad",
    [
        {"kinds": ["disk_full"]},
        {"kinds": []},
        {"spare": (0, 1)},
        {"mtbf_s": math.inf},
        {"lasting_s": math.inf},
    ],
)
def test_schedules_that_make_no_sense_are_refused(bad: dict) -> None:
    with pytest.raises(ConfigError):
        random_schedule(0, **{"mtbf_s": 1, "horizon_s": 1, "world": 2, **bad})


def report(times: dict[int, float], *faults: float) -> Report:
    made = Report(["x"], began=100.0)
    made.trajectory = Trajectory(tuple(Step(s, None, None, 0, 100.0 + t) for s, t in times.items()))
    made.events = [Event(t, "fault", "kill") for t in faults]
    return made


def test_the_gap_of_a_fault_is_the_pause_without_a_step() -> None:
    steady = {s: float(s) for s in range(10)}
    late = {s: float(s) + (3.0 if s > 5 else 0.0) for s in range(10)}
    assert report(steady, 5.5).gaps()[0].seconds == 0.0
    assert report(late, 5.5).gaps()[0].seconds == 3.0
    # The step that was under way came to its end; the pause is after it.
    assert report(late, 4.5).gaps()[0].seconds == 3.0
    assert report(late, 20.0).gaps()[0].seconds is None
    assert report({1: 1.0}, 0.5).gaps()[0].seconds is None


def test_steps_taken_again_are_part_of_the_gap() -> None:
    made = report({s: float(s) for s in range(6)}, 5.5)
    again = [Step(s, None, None, 0, 108.0 + s) for s in (3, 4, 5, 6)]
    made.trajectory = Trajectory((*made.trajectory.records, *again))
    assert made.gaps()[0].seconds == 8.0  # from 5.0 to 14.0, without a step


def test_a_report_is_told() -> None:
    made = report({1: 1.0, 2: 2.0}, 1.5)
    made.events.append(Event(2.5, "missed", "stop rank 3: it never came to it"))
    said = made.to_json()
    assert (said["steps"], said["faults"], said["missed"]) == (
        2, 1, ["stop rank 3: it never came to it"],
    )  # fmt: skip
    assert "step 1" in made.lines()[0]
    assert "step 2" in made.lines()[1]


def test_seconds_of_training_stand_still_until_there_are_new_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: now[0]))
    clock = runner._Clock()

    def after(seconds: float, reached: int) -> float:
        now[0] += seconds
        return clock.at(reached)

    assert after(5, -1) == -1.0  # nothing is recorded yet
    assert after(1, 1) == 0.0
    assert after(1, 2) == 1.0
    clock.pause()
    assert after(7, 2) == 1.0
    assert after(1, 3) == 1.0  # this one may have been under way
    assert clock.paused
    assert after(1, 4) == 1.0
    assert not clock.paused
    assert after(2, 4) == 3.0
    assert after(1, 1) == 4.0  # a step that is taken again
