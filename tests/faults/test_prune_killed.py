"""`planaria prune` killed at every point: nothing that is kept is lost, the next one ends it."""

import functools
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from checkpoints import data_files, flip, must_notice
from launches import PLANARIA, run
from ranks import RankDied, try_ranks

from planaria.checkpoint import Checkpointer, KeepEvery, KeepLast, open_checkpoint, points
from planaria.checkpoint.prune import prune
from planaria.checkpoint.retention import Retention
from planaria.checkpoint.storage.local import LocalStorage
from planaria.checkpoint.storage.root import Root
from planaria.core.points import arm
from planaria.launch.cli import main

STEPS = 6
POLICY = KeepLast(2) | KeepEvery(3)
KEPT = [3, 5, 6]


@functools.cache
def template() -> tempfile.TemporaryDirectory[str]:
    """A root with six steps, and what a crashed save left."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "root"
    state = {"v": {"w": torch.arange(2000.0)}}
    with Checkpointer(path, state) as ckpt:
        for step in range(1, STEPS + 1):
            state["v"]["w"] += 1
            ckpt.save(step).wait_committed()
    (path / "step-00000009").mkdir()
    (path / "step-00000009" / "rank-00000-00ff.safetensors").write_bytes(b"half")
    return folder


def make(path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(Path(template().name) / "root", path))


def body(rank: int, path: Path, faults: str) -> list[int]:
    """Prunes in a process of its own."""
    arm(faults)
    root = Root(LocalStorage(path))
    prune(root, POLICY)
    return root.steps()


def check_nothing_lost(path: Path) -> None:
    """All that is kept verifies, and what goes is whole or does not exist."""
    steps = Root(LocalStorage(path)).steps()
    assert set(KEPT) <= set(steps), "something that is kept is gone"
    for step in steps:
        assert open_checkpoint(path, step).verify() == []
        w = open_checkpoint(path, step).read("v.w")
        assert torch.equal(w, torch.arange(2000.0) + step)


def cases() -> list[str]:
    steps = [1, 4]  # the first that goes, and the last
    named = {points.PRUNE_NEXT, points.PRUNE_REMOVED, points.RETENTION_UNLISTED}
    return [
        f"kill@{point}" + (f":step={step}" if step else "")
        for point in points.PRUNE
        for step in (steps if point in named else [0])
    ]


@pytest.mark.parametrize("fault", cases())
def test_killed_at_any_point(tmp_path: Path, fault: str) -> None:
    path = make(tmp_path / "root")
    (result,) = try_ranks(1, body, path, fault, init_group=False)
    assert isinstance(result.error, RankDied), "the point was not passed"
    assert result.exitcode == -signal.SIGKILL
    check_nothing_lost(path)
    # The next one takes over from the dead one's lock, and ends what it began.
    (again,) = try_ranks(1, body, path, "", init_group=False)
    assert again.value == KEPT, again.error
    check_nothing_lost(path)
    left = sorted(p.name for p in path.iterdir())
    assert left == ["lock", "planaria.json", *(f"step-{s:08d}" for s in KEPT)]


@pytest.mark.parametrize("action", ["eio", "raise=on purpose"])
def test_an_error_in_the_midst_loses_nothing(tmp_path: Path, action: str) -> None:
    path = make(tmp_path / "root")
    fault = f"{action}@{points.RETENTION_UNLISTED}:step=2"
    (result,) = try_ranks(1, body, path, fault, init_group=False)
    assert type(result.error).__name__ == ("RootError" if action == "eio" else "FaultError")
    check_nothing_lost(path)
    with Checkpointer(path, {"v": {"w": torch.zeros(2000)}}) as ckpt:  # the lock is free
        report = ckpt.restore()
        assert report is not None
        assert report.step == 6


def test_the_command_is_killed_and_repeated(tmp_path: Path) -> None:
    path = make(tmp_path / "root")
    command = [*PLANARIA, "prune", "root", "--keep-last", "2", "--keep-every", "3", "--yes"]
    killed = run(command, tmp_path, PLANARIA_FAULTS=f"kill@{points.RETENTION_UNLISTED}:step=4")
    assert killed.code == -signal.SIGKILL
    check_nothing_lost(path)
    assert main(["prune", str(path), *command[-5:]]) == 0
    assert Root(LocalStorage(path)).steps() == KEPT


def check_damaged_newest(path: Path) -> None:
    """The newest is damaged in a way that only reading it tells: what stands in for it stays."""
    make(path)
    for step in (5, 6):
        flip(data_files(path, step)[0], -1)
    prune(Root(LocalStorage(path)), KeepLast(1))
    assert Root(LocalStorage(path)).steps() == [4, 6]
    state = {"v": {"w": torch.zeros(2000)}}
    with pytest.warns(UserWarning, match="step 6 cannot be restored"), Checkpointer(
        path, state
    ) as ckpt:  # fmt: skip
        report = ckpt.restore()
    assert report is not None
    assert report.step == 4


def test_the_newest_that_verifies_stays(tmp_path: Path) -> None:
    check_damaged_newest(tmp_path / "root")


def test_sabotage_retention_drops_the_newest_that_verifies(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Retention, "newest_good", lambda self, steps, *_: max(steps))
    must_notice(check_damaged_newest, tmp_path / "root")
