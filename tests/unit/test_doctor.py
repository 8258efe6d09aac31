"""`planaria doctor`: what it finds, what it removes, and what it never touches."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_jobs import runtime_folder

from planaria.checkpoint import Checkpointer, open_checkpoint
from planaria.launch import doctor as doctor_module
from planaria.launch import exit_codes
from planaria.launch.cli import main
from planaria.launch.config import RunConf
from planaria.launch.doctor import NOTE, OK, WRONG, examine, links, machine
from planaria.launch.run_folder import RUNNING, Attempt, RunFolder, Status

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path) -> Iterator[None]:
    """Snapshot processes of others on this machine are none of these tests' business."""
    with runtime_folder(tmp_path / "runtime"):
        yield


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run that lost its launcher, with one good checkpoint, on a machine that has enough."""
    for name in ("_LEAST_FREE", "_LEAST_SHM"):
        monkeypatch.setattr(machine, name, 1)
    monkeypatch.setattr(machine, "_PROBE_NBYTES", 4 << 20)
    run = RunFolder(tmp_path / "runs" / "demo")
    run.lock()
    run.freeze(RunConf(steps=4), {"python": "3"})
    run.write_status(Status(RUNNING, 1, 4, [Attempt(0, 1, 0.0)]))
    run.unlock()
    with Checkpointer(run.ckpt, {"v": {"w": torch.ones(4)}}) as ckpt:
        ckpt.save(1)
    return run


def litter(run: RunFolder) -> None:
    """What dead jobs leave."""
    ckpt = run.ckpt
    (ckpt / "step-00000002").mkdir()
    (ckpt / "step-00000002" / "rank-00000-00ff.safetensors").write_bytes(b"half")
    (ckpt / "step-00000001" / "manifest.json.tmp-00112233").write_bytes(b"half")
    (ckpt / "planaria.json.tmp-00112233").write_bytes(b"half")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(60)
    owner = {"nonce": "x", "host": socket.gethostname(), "renewals": 3, "lease_s": 30.0,
             "process": [gone.pid, 1, "boot/ns", socket.gethostname()]}  # fmt: skip
    (ckpt / "lock.json").write_text(json.dumps(owner))
    (run.path / f".status.json.{gone.pid}").write_text("half")


def run_json(capsys, *args: object) -> tuple[int, dict[str, list[dict[str, Any]]], Any]:
    code = main(["doctor", *map(str, args), "--quick", "--json"])
    facts = json.loads(capsys.readouterr().out)
    by_check: dict[str, list[dict[str, Any]]] = {}
    for finding in facts["findings"]:
        by_check.setdefault(finding["check"], []).append(finding)
    return code, by_check, facts


def test_all_is_well(folder, capsys) -> None:
    code, found, facts = run_json(capsys, folder.path)
    assert (code, facts["ok"]) == (0, True)
    assert set(found) >= {"disk space", "disk write", "O_DIRECT", "memory", "shared memory",
                          "loopback TCP", "host name", "versions", "checkpoints"}  # fmt: skip
    assert found["disk write"][0]["facts"]["bytes_per_s"] > 0
    assert "torch" in found["versions"][0]["facts"]["versions"]
    assert [f["state"] for f in found["run"]] == [NOTE], "lost its launcher, can go on"
    assert not list(folder.path.glob("*.tmp-*")), "its own probe is gone"
    assert main(["doctor", str(folder.path), "--quick"]) == 0
    assert "all is well" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["run", "runs", "root"])
def test_leftovers_are_found_and_removed(folder, where, capsys) -> None:
    litter(folder)
    path = {"run": folder.path, "runs": folder.path.parent, "root": folder.ckpt}[where]
    code, found, _ = run_json(capsys, path)
    assert code == exit_codes.FOUND
    (told,) = found["checkpoints"]
    assert told["facts"]["leftovers"] == [
        "a lock",
        "planaria.json.tmp-00112233",
        "files of another attempt at step 1",
        "the half-written step 2",
    ]
    assert ("scratch files" in found) == (where != "root")

    code, found, _ = run_json(capsys, path, "--clean")
    assert code == 0, found
    assert sorted(p.name for p in folder.ckpt.iterdir()) == [
        "lock",
        "planaria.json",
        "step-00000001",
    ]
    assert len(list((folder.ckpt / "step-00000001").iterdir())) == 2
    assert open_checkpoint(folder.ckpt).verify() == []
    code, found, _ = run_json(capsys, path)
    assert code == 0
    assert where == "root" or not list(folder.path.glob(".status.json.*"))


def test_a_live_job_is_left_alone(folder, capsys) -> None:
    (folder.ckpt / "step-00000002").mkdir()
    (folder.ckpt / "step-00000002" / "rank-00000-00ff.safetensors").write_bytes(b"under way")
    with Checkpointer(folder.ckpt, {"v": {"w": torch.ones(4)}}):
        code, found, _ = run_json(capsys, folder.path, "--clean")
        assert (code, found["checkpoints"][0]["state"]) == (0, OK)
        assert "live job" in found["checkpoints"][0]["text"]
        assert (folder.ckpt / "step-00000002").exists()
        assert (folder.ckpt / "lock.json").exists()


def test_a_lock_of_another_host_is_only_a_note(folder, capsys) -> None:
    litter(folder)
    owner = json.loads((folder.ckpt / "lock.json").read_text())
    owner["host"] = owner["process"][3] = "elsewhere"
    (folder.ckpt / "lock.json").write_text(json.dumps(owner))
    code, found, _ = run_json(capsys, folder.ckpt)
    assert (code, found["checkpoints"][0]["state"]) == (0, NOTE)
    assert "cannot be told from here" in found["checkpoints"][0]["text"]


def test_what_is_not_ours_stays(folder, capsys) -> None:
    theirs = folder.ckpt / "step-00000002" / "notes.txt"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    code, found, _ = run_json(capsys, folder.path, "--clean")
    assert code == exit_codes.FOUND
    assert "files of others" in found["checkpoints"][0]["text"]
    assert theirs.read_text() == "mine"


def test_processes_that_outlived_their_launcher_are_told_and_not_ended(folder, capsys) -> None:
    env = {**os.environ, "PLANARIA_RUN_DIR": str(folder.path)}
    command = [sys.executable, "-c", "print('up', flush=True); import time; time.sleep(120)"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as orphan:
        try:
            assert orphan.stdout is not None
            orphan.stdout.readline()
            code, found, _ = run_json(capsys, folder.path, "--clean")
            assert code == exit_codes.FOUND
            assert found["processes"][0]["facts"]["pids"] == [orphan.pid]
            assert orphan.poll() is None
        finally:
            orphan.kill()


def test_a_full_disk_and_little_memory_are_wrong(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 1 << 40, 8 << 20))
    code, found, _ = run_json(capsys, tmp_path)
    assert code == exit_codes.FOUND
    assert found["disk space"][0]["state"] == WRONG
    assert found["shared memory"][0]["state"] == WRONG
    (finding,) = machine.memory(1 << 60)
    assert finding.state == WRONG
    (finding,) = machine.shared_memory(tmp_path / "nothing")
    assert finding.state == WRONG


def test_a_state_that_fits_only_once_is_wrong(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 0, 3 << 30))
    by_size = {n: next(iter(machine.disk(tmp_path, n))).state for n in (None, 1 << 30, 2 << 30)}
    assert by_size == {None: OK, 1 << 30: OK, 2 << 30: WRONG}
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    found = {f.check: f for f in machine.disk(tmp_path, None)}
    monkeypatch.undo()
    assert found["disk write"].state == WRONG
    assert "Permission denied" in found["disk write"].text


def test_no_direct_writes_is_a_note(tmp_path, monkeypatch) -> None:
    real = os.write

    def refuse(fd: int, data: Any) -> int:
        if len(data) == 4096:
            raise OSError(22, "Invalid argument")
        return real(fd, data)

    monkeypatch.setattr(os, "write", refuse)
    found = {f.check: f.state for f in machine.disk(tmp_path, None)}
    monkeypatch.undo()
    assert (found["disk write"], found["O_DIRECT"]) == (OK, NOTE)


def test_what_hangs_is_left_behind() -> None:
    release = threading.Event()
    try:
        (finding,) = examine("disk", lambda: release.wait(60) and [], 0.05)  # type: ignore[arg-type]
    finally:
        release.set()
    assert (finding.check, finding.state) == ("disk", WRONG)
    assert "it hangs" in finding.text


def test_an_error_of_the_system_is_a_finding_and_a_bug_is_not() -> None:
    def fails(error: Exception) -> list[Any]:
        raise error

    (finding,) = examine("memory", lambda: fails(OSError(5, "Input/output error")), 10)
    assert finding.state == WRONG
    with pytest.raises(KeyError):
        examine("memory", lambda: fails(KeyError("bug")), 10)


def test_two_ranks_sum() -> None:
    found = {f.check: f.state for f in links.gloo(60)}
    assert found["gloo"] == OK


def test_ranks_that_do_not_come_to_a_sum(monkeypatch) -> None:
    monkeypatch.setattr(links, "_GLOO", "raise SystemExit('no network')")
    (finding,) = links.gloo(60)
    assert (finding.state, "no network" in finding.text) == (WRONG, True)
    monkeypatch.setattr(links, "_GLOO", "import time; time.sleep(100)")
    (finding,) = links.gloo(0.3)
    assert (finding.state, "gave up" in finding.text) == (WRONG, True)


def test_old_and_missing_packages_are_told(monkeypatch) -> None:
    required = ["torch>=99.1", "nowhere-to-be-found>=1", "rich>=13", "s3fs>=1; extra == 's3'"]
    monkeypatch.setattr(links.metadata, "requires", lambda _: required)
    (finding,) = links.versions()
    assert finding.state == WRONG
    assert "is older than 99.1" in finding.text
    assert "nowhere-to-be-found is missing" in finding.text
    assert "s3fs" not in finding.text


@pytest.mark.parametrize(
    ("args", "said"), [(["/nowhere"], "no folder"), ([".", "--deadline", "0"], "above 0")]
)
def test_it_refuses_in_one_line(args, said, capsys) -> None:
    code = main(["doctor", *args])
    err = capsys.readouterr().err
    assert (code, err.count("\n"), said in err) == (2, 1, True)
    assert doctor_module.OK == "ok"
