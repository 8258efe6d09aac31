"""`planaria diff` and `planaria prune` as a user gives them."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import data_files, flip

from planaria.checkpoint import Checkpointer, KeepLast
from planaria.checkpoint.prune import choose
from planaria.checkpoint.storage import lock
from planaria.checkpoint.storage.local import LocalStorage
from planaria.checkpoint.storage.root import Root
from planaria.core.deadline import Deadline
from planaria.errors import CorruptError
from planaria.launch import exit_codes
from planaria.launch.cli import main
from planaria.launch.config import RunConf
from planaria.launch.run_folder import DONE, Attempt, RunFolder, Status

LOSSES = [3.0, 1.0, 2.0, 4.0]


@pytest.fixture
def made(template: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    return Path(shutil.copytree(template, tmp_path / "runs" / "demo"))


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """The folder of a run with four checkpoints."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "demo")
    folder.lock()
    folder.freeze(RunConf(steps=4), {"python": "3"})
    folder.write_status(Status(DONE, 4, 4, [Attempt(0, 1, 0.0, 1.0, DONE)]))
    folder.unlock()
    state: dict[str, Any] = {"w": torch.ones(4), "n": torch.zeros(3), "lr": 0.1}
    with Checkpointer(folder.ckpt, {"s": state}, every=1) as ckpt:
        for step, loss in enumerate(LOSSES, start=1):
            state["w"][0] += 1
            if step == 4:
                state["n"][1] = math.nan
                state["lr"] = 0.2
            handle = ckpt.step(step, {"loss": loss})
            assert handle is not None
            handle.wait_committed()
    return folder.path


def run(capsys, *args: object) -> tuple[int, str, str]:
    code = main([str(a) for a in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys, *args: object) -> tuple[int, Any]:
    code, out, _ = run(capsys, *args, "--json")

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    return code, json.loads(out, parse_constant=refuse)


def steps(made: Path) -> list[int]:
    return Root(LocalStorage(made / "ckpt")).steps()


# diff


def test_diff_of_the_two_newest(made, capsys) -> None:
    code, facts = run_json(capsys, "diff", made, "--only", "s")
    assert code == exit_codes.FOUND
    assert (facts["a"]["step"], facts["b"]["step"], facts["equal"]) == (3, 4, False)
    by_name = {t["name"]: t for t in facts["tensors"]}
    assert (by_name["s.w"]["differing"], by_name["s.w"]["max_abs"]) == (1, 1.0)
    assert by_name["s.w"]["max_ulp"] == 1 << 21, "4.0 and 5.0 in float32"
    assert by_name["s.n"]["nan"] == 1
    assert [(o["path"], o["a"], o["b"]) for o in facts["objects"]] == [("s.lr", 0.1, 0.2)]
    _, out, _ = run(capsys, "diff", made, "--only", "s")
    for said in ("s.w", "1 of 4", "2097152", "1 NaN", "s.lr", "0.2"):
        assert said in out


@pytest.mark.parametrize(
    ("args", "pair"),
    [
        (["{run}", "--step", "1", "--step", "3"], (1, 3)),
        (["{run}", "{run}", "--step", "2"], (2, 2)),
        (["{run}", "{run}/ckpt"], (4, 4)),
        (["{run}/ckpt/step-00000001", "{run}"], (1, 4)),
        (["{run}/ckpt/step-00000001", "--step", "2"], (1, 2)),
        (["{run}", "{run}", "--step", "2", "--step", "3"], (2, 3)),
        (["{run}/ckpt/step-00000001", "{run}", "--step", "2"], (1, 2)),
    ],
)
def test_diff_of_what_is_named(made, capsys, args, pair) -> None:
    args = [a.format(run=made) for a in args]
    code, facts = run_json(capsys, "diff", *args, "--only", "s.w")
    assert (facts["a"]["step"], facts["b"]["step"]) == pair
    assert code == (exit_codes.DONE if pair[0] == pair[1] else exit_codes.FOUND)
    assert facts["equal"] == (pair[0] == pair[1])


def test_diff_of_equals_says_so(made, capsys) -> None:
    code, out, _ = run(capsys, "diff", made, made)
    assert code == 0
    assert "equal, bit by bit" in out


def test_diff_of_a_damaged_one(made, capsys) -> None:
    flip(data_files(made / "ckpt", 4)[0], -1)
    code, out, err = run(capsys, "diff", made)
    assert (code, out) == (exit_codes.CORRUPT, "")
    assert "chunk 0" in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["{run}/ckpt/step-00000001"], "name another one"),
        (["{run}", "--step", "1"], "second time"),
        (["{run}", "{run}", *["--step", "1"] * 3], "twice at most"),
        (["{run}/ckpt/step-00000001", "{run}", *["--step", "1"] * 2], "that name no step"),
        (["{run}/ckpt/step-00000001", *["--step", "1"] * 2], "names its step already"),
        (["{run}", "--only", "nothing"], "neither checkpoint"),
        (["/nowhere"], "no folder"),
    ],
)
def test_diff_refuses_in_one_line(made, capsys, args, said) -> None:
    code, out, err = run(capsys, "diff", *[a.format(run=made) for a in args])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


# prune


def test_prune_only_shows(made, capsys) -> None:
    code, facts = run_json(capsys, "prune", made, "--keep-last", "2", "--keep-best", "loss")
    assert (code, facts["applied"], facts["removed"]) == (0, False, [1])
    assert facts["bytes"] > 0
    why = {v["step"]: v["why"] for v in facts["steps"]}
    assert why == {1: "", 2: "best loss", 3: "last", 4: "last, newest, newest good"}
    _, out, _ = run(capsys, "prune", made, "--keep-last", "1")
    assert "would go" in out
    assert "--yes does it" in out
    assert steps(made) == [1, 2, 3, 4]
    assert not (made / "ckpt" / "lock.json").exists()


@pytest.mark.parametrize(
    ("args", "left"),
    [
        (["--keep-last", "1"], [4]),
        (["--keep-every", "2"], [2, 4]),
        (["--keep-every", "3"], [3, 4]),
        (["--keep-best", "loss"], [2, 4]),
        (["--keep-best", "loss", "--best-mode", "max"], [4]),
        (["--keep-best", "loss", "--best-count", "2"], [2, 3, 4]),
        (["--keep-last", "1", "--keep-every", "3", "--keep-best", "loss"], [2, 3, 4]),
    ],
)
def test_prune_does_what_it_showed(made, capsys, args, left) -> None:
    _, before = run_json(capsys, "prune", made, *args)
    code, after = run_json(capsys, "prune", made / "ckpt", *args, "--yes")
    assert code == 0
    assert before["removed"] == after["removed"]
    assert after["applied"]
    assert steps(made) == left
    assert sorted(p.name for p in (made / "ckpt").glob("step-*")) == [f"step-{s:08d}" for s in left]
    assert main(["verify", str(made)]) == 0
    capsys.readouterr()
    _, again = run_json(capsys, "prune", made, *args)
    assert again["removed"] == []


def test_prune_reads_before_it_trusts(made, capsys) -> None:
    for step in (3, 4):
        flip(data_files(made / "ckpt", step)[0], -1)
    code, facts = run_json(capsys, "prune", made, "--keep-last", "2", "--apply")
    assert (code, facts["removed"]) == (0, [1])
    assert {v["step"]: v["why"] for v in facts["steps"]}[2] == "newest good"
    flip(data_files(made / "ckpt", 2)[0], -1)
    code, _, err = run(capsys, "prune", made, "--keep-last", "2", "--yes")
    assert code == exit_codes.CORRUPT
    assert "nothing may be removed" in err
    assert steps(made) == [2, 3, 4]
    with pytest.raises(CorruptError):
        choose(Root(LocalStorage(made / "ckpt")), KeepLast(1))


def test_prune_leaves_rewound_steps_unless_told(made, capsys) -> None:
    with Checkpointer(made / "ckpt", {"s": {"w": torch.ones(4)}}) as ckpt:
        ckpt.restore(step=2, only="s.w", strict=False)
        ckpt.save(3).wait_committed()
    assert steps(made) == [1, 2, 3]
    _, facts = run_json(capsys, "prune", made, "--keep-last", "1", "--yes")
    assert facts["removed"] == [1, 2]
    assert [(v["step"], v["why"]) for v in facts["steps"] if v["state"] == "abandoned"] == [
        (4, "of a rewound past")
    ]
    _, facts = run_json(capsys, "prune", made, "--keep-last", "1", "--abandoned", "--yes")
    assert facts["removed"] == [4]
    assert sorted(p.name for p in (made / "ckpt").glob("step-*")) == ["step-00000003"]


def test_prune_leaves_a_live_job_alone(made, capsys, monkeypatch) -> None:
    monkeypatch.setattr(lock, "Deadline", lambda _: Deadline(0.1))  # a dying job gets 5 s
    with Checkpointer(made / "ckpt", {"s": {"w": torch.ones(4)}}):
        code, _, err = run(capsys, "prune", made, "--keep-last", "1", "--yes")
        assert code == 1
        assert "in use by process" in err
        code, facts = run_json(capsys, "prune", made, "--keep-last", "1")
        assert (code, facts["removed"]) == (0, [1, 2, 3]), "looking is free"
    folder = RunFolder(made)
    folder.lock()  # between two attempts no rank holds the root
    for path in (made, made / "ckpt"):
        code, _, err = run(capsys, "prune", path, "--keep-last", "1", "--yes")
        assert code == 1
        assert "being run right now" in err
    folder.unlock()
    assert steps(made) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["{run}"], "say what to keep"),
        (["{run}", "--keep-last", "0"], "1 or more"),
        (["{run}", "--keep-best", "los"], "there are loss"),
        (["{run}", "--keep-best", "loss", "--best-mode", "good"], "'min' or 'max'"),
        (["{run}/ckpt/step-00000001", "--keep-last", "1"], "is one step"),
        (["/nowhere", "--keep-last", "1"], "no folder"),
    ],
)
def test_prune_refuses_in_one_line(made, capsys, args, said) -> None:
    code, out, err = run(capsys, "prune", *[a.format(run=made) for a in args], "--yes")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert steps(made) == [1, 2, 3, 4]
