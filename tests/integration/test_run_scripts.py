"""Scripts of the user's under `planaria run`, several nodes, and the examples."""

import sys
from pathlib import Path

import pytest
from launches import LOADED, finish, loaded_planaria, planaria, run, started
from source_tree import ROOT

SCRIPT = """
import os, sys, time
import torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
print("rank", rank, "of", dist.get_world_size(), sys.argv[1:], os.environ["PLANARIA_RUN_DIR"])
if "fail" in sys.argv:
    if rank == 1:
        raise ValueError("out of luck")
    time.sleep(600)  # as a rank that hangs in something else than a collective
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(SCRIPT)
    return path


def test_a_script_runs_in_torchruns_environment(script, tmp_path):
    ended = planaria(tmp_path, "run", "-n", "2", "--", str(script), "--lr", "1")
    assert ended.code == 0, ended.err + ended.out
    folder = tmp_path / "runs" / "own"
    said = f"rank 0 of 2 ['--lr', '1'] {folder}"
    assert said in ended.out
    assert (folder / "logs" / "attempt-0" / "rank-0.log").read_text().strip() == said
    assert "state   done" in ended.out


@pytest.mark.parametrize("code", [2, 3])
def test_a_scripts_own_exit_code_is_not_taken_for_planarias(tmp_path, code):
    path = tmp_path / "own.py"
    path.write_text(f"import sys\nsys.exit({code})\n")
    ended = loaded_planaria(tmp_path, "run", "-n", "1", "--", str(path))
    assert ended.code == 1, ended.err + ended.out
    assert f"rank 0 exited with code {code}" in ended.out


def test_an_error_of_planaria_in_a_script_is_told_by_the_exit_code(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("from planaria.errors import CorruptError\nraise CorruptError('all of it')\n")
    ended = loaded_planaria(tmp_path, "run", "-n", "1", "--", str(path))
    assert ended.code == 3, ended.err + ended.out
    assert "rank 0 failed with CorruptError: all of it" in ended.out


def test_a_rank_that_fails_on_one_node_ends_the_job_on_all(script, tmp_path, free_port):
    def command(node: int) -> list[str]:
        return [*LOADED, "run", "-n", "1", "--nnodes", "2", "--rdzv", f"127.0.0.1:{free_port}",
                "--run", f"node-{node}", "launcher.join_timeout_s=60", "--", str(script), "fail",
                ]  # fmt: skip

    token = {"PLANARIA_TOKEN": "a token of sixteen characters"}
    with (
        started(command(0), tmp_path, **token) as first,
        started(command(1), tmp_path, **token) as second,
    ):
        ended = [finish(first), finish(second)]
    assert [e.code for e in ended] == [1, 1], ended
    told = "".join(e.out + e.err for e in ended)
    assert "rank 1 failed with ValueError: out of luck" in told
    assert "another node gave the job up: rank 1 failed with ValueError" in told


def test_pretrain_under_stock_torchrun(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
    example = str(ROOT / "examples" / "pretrain.py")
    options = ["--out", "out", "--every", "4", "--steps"]
    ended = run([*torchrun, "2", example, *options, "8"], tmp_path, OMP_NUM_THREADS="1")
    assert ended.code == 0, ended.err
    assert "2 ranks, from the start" in ended.out
    ended = run([*torchrun, "1", example, *options, "10"], tmp_path, OMP_NUM_THREADS="1")
    assert ended.code == 0, ended.err
    assert "1 ranks, from step 8" in ended.out
    assert "step  10/10  loss" in ended.out


def test_the_plain_loop_prints_what_it_says(tmp_path):
    example = ROOT / "examples" / "plain_loop.py"
    blocks = [
        block.replace("    ", "").strip()
        for block in example.read_text().split('"""')[1].split("\n\n")
        if block.startswith("    ")
    ]
    _, first, second = blocks
    command = [sys.executable, str(example), "out"]
    assert run(command, tmp_path).out.strip() == first
    assert run(command, tmp_path).out.strip() == second
