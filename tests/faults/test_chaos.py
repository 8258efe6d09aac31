"""`planaria chaos`: random faults, a reference beside them, and a verdict."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from launches import TINY, planaria
from source_tree import ROOT

from planaria.elastic.faults import Report
from planaria.elastic.faults.report import Event
from planaria.errors import ConfigError
from planaria.launch import chaos
from planaria.launch.chaos import Job
from planaria.launch.cli import main
from planaria.launch.cli.chaos import seconds

JOB = [
    sys.executable, str(ROOT / "tests" / "support" / "drill_job.py"), "60", "2", ".",
    "hold=1@chaos",
]  # fmt: skip


def test_a_job_that_goes_on_exactly_is_equal(tmp_path: Path) -> None:
    ended = planaria(
        tmp_path, "chaos", "--mtbf", "200ms", "--seed", "7", "--kinds", "kill,stop,slow",
        "--lasting", "200ms", "--json", "--", *JOB,
    )  # fmt: skip
    assert ended.code == 0, ended.err + ended.out
    said = ended.json()
    assert said["equal"]
    assert not said["different"]
    assert said["chaos"]["faults"] >= 1
    assert said["chaos"]["steps"] == said["reference"]["steps"] == 60
    assert not said["chaos"]["left_behind"]
    folder = tmp_path / "chaos" / "seed-7"
    assert json.loads((folder / "report.json").read_text())["seed"] == 7
    assert "fault" in (folder / "timeline.txt").read_text()
    assert (folder / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert planaria(tmp_path, "chaos", "--seed", "7", "--", *JOB).code == 2  # the folder is in use


def test_a_job_that_goes_on_otherwise_is_not(tmp_path: Path) -> None:
    job = [*JOB, "wrong"]
    ended = planaria(tmp_path, "chaos", "--mtbf", "200ms", "--seed", "7", "--out", "x", "--", *job)
    assert ended.code == 4, ended.err + ended.out
    assert "the run disagrees with itself" in ended.out


def test_a_job_that_fails_by_itself_is_told(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('not my day'); sys.exit(3)"]
    ended = planaria(tmp_path, "chaos", "--", *command)
    assert ended.code == 1
    assert "the undisturbed run did not come to its end" in ended.out
    assert "not my day" in ended.out


@pytest.mark.parametrize(
    "args",
    [
        ["--"],
        ["--mtbf", "soon", "--", "true"],
        ["--kinds", "melt", "--", "true"],
        ["--target", "x", "--", "true"],
        ["--kinds", "corrupt_file", "--", "true"],
        ["--", "planaria", "ls"],
    ],
)
def test_wrong_command_lines_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["chaos", *args]) == 2
    assert not (tmp_path / "chaos").exists()


def test_each_run_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    words = ["planaria", "run", "-n", "3", "--run", "x", "steps=3", "--", "train.py", "--run", "y"]
    job = Job.of(words)
    assert job.world() == 3
    assert job.follow(tmp_path) is None  # a script says by `record` what it does
    own = Job.of(["planaria", "run"]).follow(tmp_path)
    assert own == tmp_path / "run" / "metrics.jsonl"
    argv = job.argv(tmp_path / "a")
    assert argv[:2] == [sys.executable, "-m"]
    assert argv[3:] == [
        "run", "--run", str(tmp_path / "a" / "run"), "-n", "3", "steps=3", "--",
        str(tmp_path / "train.py"), "--run", "y",
    ]  # fmt: skip
    assert Job.of(["planaria", "run", "launcher.nproc=4"]).world() == 4
    assert Job.of(["planaria", "run", "--nproc=5"]).world() == 5
    assert Job.of(["torchrun", "train.py"]).argv(tmp_path)[1] == str(tmp_path / "train.py")
    assert Job.of(["torchrun", "x"]).world() is None


def test_ranks_of_all_nodes_are_hit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line says how many one node has."""
    worlds: list[int] = []

    def carry(command: Any, faults: Any, **options: Any) -> Report:
        born = [Event(0.0, "born", "", rank) for rank in range(4)]
        return Report(command, 0.0, outcome="done", events=born)

    def draw(seed: int, *, world: int, **options: Any) -> list[Any]:
        worlds.append(world)
        return []

    monkeypatch.setattr(chaos, "carry_out", carry)
    monkeypatch.setattr(chaos, "random_schedule", draw)
    options: dict[str, Any] = {"mtbf_s": 1, "seed": 0, "kinds": ["kill"], "lasting_s": 1,
                               "deadline_s": 9}  # fmt: skip
    chaos.run(["planaria", "run", "-n", "2", "--nnodes", "2"], tmp_path / "out", **options)
    assert worlds[-1] == 4


@pytest.mark.parametrize(("text", "expected"), [("5s", 5), ("500ms", 0.5), ("2min", 120), ("3", 3)])
def test_times_are_read(text: str, expected: float) -> None:
    assert seconds(text) == expected
    for bad in ("", "s", "-1s", "0s", "5 parsecs"):
        with pytest.raises(ConfigError):
            seconds(bad)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("elastic", "ranks", "options"),
    [
        ("off", 2, ["steps=200"]),
        ("warm", 2, ["steps=200", "elastic.nodes=2", "elastic.budget=33554432"]),
        ("session", 4, ["steps=80", "model.dropout=0.1", "elastic.redundancy=2"]),
    ],
)
def test_a_run_is_equal_to_an_undisturbed_one(
    tmp_path: Path, elastic: str, ranks: int, options: list[str]
) -> None:
    ended = planaria(
        tmp_path, "chaos", "--mtbf", "2s", "--seed", "1", "--deadline", "30min", "--json", "--",
        "planaria", "run", "-n", str(ranks), f"elastic={elastic}", *TINY, *options,
    )  # fmt: skip
    assert ended.code == 0, ended.err + ended.out
    said = ended.json()
    assert said["chaos"]["faults"] >= 1
    assert said["tensors_compared"] > 0
