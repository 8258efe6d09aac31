"""`planaria run` from end to end: it trains, is killed, stopped, resumed, extended, refused."""

import shutil
import signal
from pathlib import Path

import psutil
import pytest
from launches import (
    LOADED,
    PLANARIA,
    finish,
    loaded_planaria,
    planaria,
    ranks_of,
    started,
    wait_until,
)
from launches import TINY as TINY_JOB

from planaria.launch import metrics
from planaria.launch.cli import main
from planaria.launch.run_folder import RunFolder

# Three ranks share four micro-batches: unevenly, and a ring of three sums in an order that depends
# on where a gradient stands, which two ranks would hide.
TINY = [*TINY_JOB, "launcher.nproc=3"]

# Ten processes in a test, some of which load torch.
pytestmark = pytest.mark.timeout(600)


def losses(folder: Path) -> dict[int, str]:
    """The loss of each step that counts, bit by bit."""
    return {n: r.loss_hex for n, r in metrics.kept(metrics.read(folder / "metrics.jsonl")).items()}


def steps_logged(folder: Path) -> int:
    return len(metrics.read(folder / "metrics.jsonl"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A finished run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = planaria(folder.parent, "run", *TINY, "--run", "run")
    assert ended.code == 0, ended.err + ended.out
    lines = ended.out.splitlines()
    assert lines[0] == f"starting {folder} on 3 ranks"
    assert sum(line.startswith("step ") for line in lines) == 8
    assert any(line.startswith("goodput") for line in lines)
    assert any(line.startswith("checkpoints") and "4, " in line for line in lines)
    return folder


def test_it_leaves_a_run_folder(undisturbed, capsys):
    names = {p.name for p in undisturbed.iterdir()}
    assert names == {".lock", "config.yaml", "versions.json", "token", "status.json",
                     "metrics.jsonl", "ckpt", "telemetry", "logs"}  # fmt: skip
    assert sorted(p.name for p in (undisturbed / "logs" / "attempt-0").iterdir()) == [
        "rank-0.log",
        "rank-1.log",
        "rank-2.log",
    ]
    assert list(losses(undisturbed)) == list(range(1, 9))
    assert main(["verify", str(undisturbed)]) == 0
    assert main(["inspect", str(undisturbed)]) == 0
    assert main(["ls", str(undisturbed)]) == 0
    assert "committed" in capsys.readouterr().out


def test_a_finished_run_is_summed_up_and_another_configuration_refused(undisturbed, capsys):
    before = losses(undisturbed)
    assert main(["run", *TINY, "--run", str(undisturbed)]) == 0
    out = capsys.readouterr().out
    assert "done at step 8 of 8" in out
    assert "raise steps=8" in out
    assert main(["run", *TINY, "optim.lr=0.5", "--run", str(undisturbed)]) == 2
    assert "optim.lr: 0.003 -> 0.5" in capsys.readouterr().err
    assert main(["run", *TINY, "steps=4", "--run", str(undisturbed)]) == 2
    assert "not shortened" in capsys.readouterr().err
    assert losses(undisturbed) == before


def test_a_killed_rank_costs_repeated_steps_and_no_bit(undisturbed, tmp_path):
    job = [*TINY, "checkpoint.every=4"]
    args = ["run", *job, "--run", "run", "--json"]
    killed = loaded_planaria(tmp_path, *args, PLANARIA_FAULTS="kill@demo.step:rank=1,step=8")
    assert killed.code == 1, killed.err
    report = killed.json()
    assert report["state"] == "failed"
    assert (report["failures"][0]["rank"], report["failures"][0]["exit_code"]) == (1, -9)
    assert report["resume"].startswith("planaria run ")
    shutil.copytree(tmp_path / "run", tmp_path / "fewer")

    resumed = loaded_planaria(tmp_path, *args)
    assert resumed.code == 0, resumed.err
    report = resumed.json()
    assert (report["state"], report["step"], report["attempts"]) == ("done", 8, 2)
    # From the checkpoint of step 4, or from the start where that was not committed in time.
    assert 2 <= report["repeated_steps"] <= 7
    assert report["identical_repeats"] == report["repeated_steps"]
    assert losses(tmp_path / "run") == losses(undisturbed)

    fewer = loaded_planaria(tmp_path, "run", *job, "--run", "fewer", "-n", "1")
    assert fewer.code == 0, fewer.err
    assert "now 1 ranks instead of 3" in fewer.out
    pairs = zip(losses(tmp_path / "fewer").values(), losses(undisturbed).values(), strict=True)
    for one, two in pairs:
        assert float.fromhex(one) == pytest.approx(float.fromhex(two), rel=1e-4)


def test_stopped_then_its_launcher_killed_then_resumed(undisturbed, tmp_path):
    folder = tmp_path / "run"
    args = ["run", *TINY, "--run", "run"]
    # Long enough for a signal to come before the run's end, on a busy machine too.
    with started([*LOADED, *args], tmp_path, PLANARIA_FAULTS="sleep=5@demo.step:step=4") as process:
        wait_until(lambda: steps_logged(folder) >= 3, "three steps")
        process.send_signal(signal.SIGTERM)
        ended = finish(process)
    assert ended.code == 75, ended.err + ended.out
    assert "stopping" in ended.out
    assert "To go on: planaria run" in ended.out
    status = RunFolder(folder).read_status()
    assert (status.state, status.attempts[0].outcome) == ("preempted", "preempted")
    # The last checkpoint is of the very last step: nothing is repeated.
    stopped_at = steps_logged(folder)
    assert (folder / "ckpt" / f"step-{stopped_at:08d}" / "manifest.json").is_file()

    assert stopped_at in (4, 5)
    later = f"sleep=5@demo.step:step={stopped_at + 2}"
    with started([*PLANARIA, *args], tmp_path, PLANARIA_FAULTS=later) as process:
        wait_until(lambda: steps_logged(folder) > stopped_at, "a further step")
        ranks = ranks_of(process)
        assert len(ranks) == 3
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(ranks, timeout=60)
        assert not alive

    ended = loaded_planaria(tmp_path, *args)
    assert ended.code == 0, ended.err + ended.out
    assert losses(folder) == losses(undisturbed)
    assert [a.outcome for a in RunFolder(folder).read_status().attempts] == [
        "preempted",
        "failed",
        "done",
    ]


def test_ranks_are_started_again_when_asked_for(undisturbed, tmp_path):
    ended = loaded_planaria(
        tmp_path,
        *("run", *TINY, "--run", "run", "launcher.max_restarts=1"),
        PLANARIA_FAULTS="kill@demo.step:rank=0,step=4,attempt=0",
    )
    assert ended.code == 0, ended.err + ended.out
    assert "rank 0 was killed by SIGKILL; starting the ranks again" in ended.out
    assert losses(tmp_path / "run") == losses(undisturbed)


def test_a_finished_run_is_extended(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    ended = loaded_planaria(tmp_path, "run", *TINY, "steps=10", "--run", "run", "-n", "1")
    assert ended.code == 0, ended.err + ended.out
    assert "extended from 8 to 10 steps" in ended.out
    assert "restored step 8" in ended.out
    assert list(losses(folder)) == list(range(1, 11))
    assert {n: x for n, x in losses(folder).items() if n <= 8} == losses(undisturbed)


def test_corrupt_state_is_told_by_the_exit_code(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    for data in folder.glob("ckpt/step-*/*.safetensors"):
        content = bytearray(data.read_bytes())
        content[-1] ^= 1
        data.write_bytes(content)
    assert main(["verify", str(folder)]) == 3
    ended = loaded_planaria(tmp_path, "run", *TINY, "steps=10", "--run", "run", "-n", "1")
    assert ended.code == 3, ended.err + ended.out
    assert "CorruptError" in ended.out
