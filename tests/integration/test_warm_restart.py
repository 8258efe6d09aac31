"""A worker is killed, the group is started again, and goes on from memory without storage."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launches import TINY, loaded_planaria, run
from memory_jobs import eventually, processes, runtime_folder
from source_tree import ROOT

from planaria.checkpoint.memory.client import NodeClient
from planaria.checkpoint.memory.process import Options
from planaria.checkpoint.memory.starting import connect_or_start
from planaria.core.deadline import Deadline
from planaria.launch.doctor import NOTE, OK, WRONG
from planaria.launch.doctor import snapshots as doctor_module
from planaria.launch.doctor.snapshots import snapshots


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path) -> Iterator[Path]:
    with runtime_folder(tmp_path / "runtime") as folder:
        yield folder


def torchrun(tmp_path: Path, out: str, *args: str, ranks: int = 2) -> str:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(ranks), "--max-restarts", "1", str(ROOT / "examples" / "warm_restart.py"), out, *args,
    ]  # fmt: skip
    # See the example: else torch's own group may find the addresses of the killed ranks.
    ended = run(command, tmp_path, OMP_NUM_THREADS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert ended.code == 0, ended.err + ended.out
    eventually(lambda: not processes(), "the end of the job's snapshot processes")
    return ended.out


def parameters(out: str) -> str:
    found = re.search(r"step 60, parameters (\w+)", out)
    assert found, out
    return found[1]


def test_under_torchrun_a_killed_worker_costs_nothing(tmp_path: Path) -> None:
    out = torchrun(tmp_path, "killed", "--kill", "1")
    assert "2 ranks, from step 30, out of memory" in out
    assert parameters(out)
    assert not list((tmp_path / "killed").glob("step-*"))  # storage was not touched


@pytest.mark.soak
def test_under_torchrun_it_comes_to_the_same_bit_for_bit(tmp_path: Path) -> None:
    killed = torchrun(tmp_path, "killed", "--kill", "0")
    assert "2 ranks, from step 30, out of memory" in killed
    assert parameters(killed) == parameters(torchrun(tmp_path, "undisturbed"))


@pytest.mark.soak
def test_under_torchrun_two_nodes_of_four_are_lost_at_once(tmp_path: Path) -> None:
    nodes = ("--nodes", "4", "--losses", "2")
    out = torchrun(tmp_path, "killed", *nodes, "--kill", "1", "2", ranks=4)
    assert "4 ranks, from step 30, out of memory" in out
    assert not list((tmp_path / "killed").glob("step-*"))
    assert parameters(out) == parameters(torchrun(tmp_path, "undisturbed", ranks=4))


def test_planaria_run_goes_on_from_memory(tmp_path: Path) -> None:
    ended = loaded_planaria(
        tmp_path, "run", "-n", "2", "elastic=warm", "elastic.nodes=2", "elastic.budget=33554432",
        *TINY, "checkpoint.every=null",
        PLANARIA_FAULTS="kill@demo.step:rank=1,step=6,attempt=0",
    )  # fmt: skip
    assert ended.code == 0, ended.err + ended.out
    assert re.search(r"restored step [345] from the memory", ended.out), ended.out
    assert "had bit-identical losses" in ended.out
    assert [p.name for p in (tmp_path / "runs/demo/ckpt").glob("step-*")] == ["step-00000008"]
    eventually(lambda: not processes(), "the end of the run's snapshot processes")


def node(label: str) -> NodeClient:
    options = Options("job", label, 1 << 20, idle_s=60.0)
    return connect_or_start(options, "rank", Deadline(60))


def test_the_doctor_tells_of_snapshot_processes_and_clears_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = snapshots(tmp_path)
    assert found.state == OK
    client = node("one")
    (found,) = snapshots(tmp_path)
    assert (found.state, found.facts["ranks"]) == (OK, ["rank"])
    client.close()
    eventually(lambda: next(snapshots(tmp_path)).state == NOTE, "it is seen to be alone")
    next(snapshots(tmp_path, clean=True))
    assert len(processes()) == 1  # its job may be being started again
    monkeypatch.setattr(doctor_module, "_ALONE_S", 0.0)
    assert "ended" in next(snapshots(tmp_path, clean=True)).text
    assert not processes()
    dead = node("two")
    (info,) = processes()
    os.kill(info.process.pid, signal.SIGKILL)
    eventually(lambda: not info.alive, "its end")
    dead.close()
    (found,) = snapshots(tmp_path)
    assert found.state == WRONG
    (found,) = snapshots(tmp_path, clean=True)
    assert found.state == OK
    (found,) = snapshots(tmp_path)
    assert "no snapshot process" in found.text
