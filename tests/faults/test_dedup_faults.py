"""Saves that refer to earlier steps, killed: what is committed is whole, nothing is left over."""

import signal
from pathlib import Path

import pytest
from mixture import Mixture, begin, check_stored, orphans, save, states
from ranks import try_ranks

from planaria.checkpoint import KeepLast, points
from planaria.checkpoint.prune import prune
from planaria.checkpoint.storage.local import LocalStorage
from planaria.checkpoint.storage.root import Root
from planaria.core.points import arm
from planaria.errors import SaveFailedError

LAST = 5


def at(step: int) -> Mixture:
    """The model after some steps: an expert changes at each, the base at every third."""
    model = Mixture()
    for n in range(1, step + 1):
        model.touch(n % 8, base=float(n % 3 == 0))
    return model


def trains(rank: int, path: str, last: int, faults: str) -> None:
    """Goes on to a step and saves each; keeps one."""
    model = Mixture()
    with begin(path, model, keep=1) as ckpt:
        report = ckpt.restore()
        arm(faults)
        for step in range(report.step + 1 if report else 1, last + 1):
            model.touch(step % 8, base=float(step % 3 == 0))
            save(ckpt, model, step)


def check_whole(path: Path) -> int:
    """Every committed step is exactly what it should be; returns the newest."""
    steps = Root(LocalStorage(path)).steps()
    check_stored(path, {step: at(step).copy() for step in steps})
    return steps[-1]


def check_killed(path: Path, fault: str) -> None:
    (result,) = try_ranks(1, trains, str(path), LAST, fault, init_group=False)
    assert result.exitcode == -signal.SIGKILL, "the point was not passed"
    assert check_whole(path) >= 3
    trains(0, str(path), LAST + 2, "")
    assert check_whole(path) == LAST + 2
    assert not orphans(path)
    assert set(states(path).values()) <= {"committed", "referenced"}


@pytest.mark.parametrize(
    "point",
    [
        points.WRITE_CHUNK,
        points.MANIFEST_WRITTEN,
        points.MANIFEST_RENAMED,
        points.RETENTION_BEGIN,
        points.RETENTION_UNLISTED,
        points.RETENTION_END,
    ],
)
def test_killed_while_saving(tmp_path: Path, point: str) -> None:
    # Step 4 still refers to step 3, of which only files are left then, and no more to step 1.
    step = 3 if point == points.RETENTION_UNLISTED else 4
    check_killed(tmp_path / "root", f"kill@{point}:step={step}")


@pytest.mark.filterwarnings("ignore:step . was not committed")
def test_sabotage_removal_looks_at_no_references(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Root, "held", lambda self, without=None: set())
    with pytest.raises((AssertionError, SaveFailedError)):
        check_killed(tmp_path / "root", f"kill@{points.RETENTION_END}:step=4")


def prunes(rank: int, path: str, faults: str) -> None:
    """Prunes to one step."""
    arm(faults)
    prune(Root(LocalStorage(path)), KeepLast(1))


@pytest.mark.parametrize("point", [points.RETENTION_UNLISTED, points.PRUNE_REMOVED])
def test_prune_killed(tmp_path: Path, point: str) -> None:
    path, model = tmp_path / "root", Mixture()
    with begin(path, model) as ckpt:
        for step in (1, 2, 3, 4):
            model.touch(step % 8, base=float(step % 3 == 0))
            save(ckpt, model, step)
    (result,) = try_ranks(1, prunes, str(path), f"kill@{point}:step=1", init_group=False)
    assert result.exitcode == -signal.SIGKILL
    assert check_whole(path) == 4
    prunes(0, str(path), "")
    assert check_whole(path) == 4
    assert not orphans(path)
    assert states(path)[4] == "committed"
