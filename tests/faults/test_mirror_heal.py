"""What had to be read from the mirror is made whole in the root, in the background."""

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import data_files, flip, held, must_notice, save_once
from fault_job import Job, differences, make_checkpointer, reference
from flaky_store import going_wrong
from mirrors import check_whole, mirror_url, mirrored_job, steps_of, train
from ranks import RankDied, try_ranks
from torch import nn

from planaria import telemetry
from planaria.checkpoint import Checkpointer, open_checkpoint, points
from planaria.checkpoint.steps_in_use import StepsInUse
from planaria.checkpoint.storage import copying, mirror
from planaria.checkpoint.storage.base import open_storage
from planaria.checkpoint.storage.healing import Healing, heal_step
from planaria.checkpoint.storage.local import LocalStorage
from planaria.checkpoint.storage.root import Root
from planaria.core.deadline import Deadline
from planaria.core.points import armed
from planaria.errors import DeadlineError

Damage = Callable[[Path], object]


def manifest(root: Path, step: int = 3) -> Path:
    return root / f"step-{step:08d}" / "manifest.json"


DAMAGE: dict[str, Damage] = {
    "a flipped bit": lambda root: flip(data_files(root, 3)[0], -1),
    "a file that is cut off": lambda root: truncate(data_files(root, 3)[0]),
    "a file that is gone": lambda root: data_files(root, 3)[0].unlink(),
    "a damaged manifest": lambda root: flip(manifest(root), 200),
    "no manifest": lambda root: manifest(root).unlink(),
    "no folder": lambda root: shutil.rmtree(root / "step-00000003"),
    "no root": shutil.rmtree,
}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planaria.checkpoint.storage.mirror.RETRY_AFTER_S", (0.0,) * 3)


def saved(tmp_path: Path, steps: int = 3) -> None:
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        train(ckpt, job, steps)


def check_heals(tmp_path: Path, damage: Damage) -> None:
    """After a restore from the mirror the root has the step whole, and restores it by itself."""
    saved(tmp_path)
    damage(tmp_path / "root")
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        report = ckpt.restore()
        assert report is not None
        assert (report.step, report.tier) == (3, "mirror")
        assert not differences(job.snapshot(), reference(3))
    assert 3 in check_whole(str(tmp_path / "root"))
    assert not list((tmp_path / "root").glob("**/*.tmp-*"))
    with make_checkpointer(tmp_path / "root", job := Job()) as ckpt:
        report = ckpt.restore()
        assert report is not None
        assert (report.step, report.tier) == (3, "durable")
        assert not differences(job.snapshot(), reference(3))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.filterwarnings("ignore:step 3 cannot be restored")
def test_what_is_damaged_is_replaced(tmp_path: Path, damage: str) -> None:
    check_heals(tmp_path, DAMAGE[damage])


def test_sabotage_nothing_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Healing, "run", lambda _: None)
    must_notice(check_heals, tmp_path, DAMAGE["no folder"])


@pytest.mark.filterwarnings("ignore:step 3 cannot be restored")
def test_only_what_is_damaged_is_replaced(tmp_path: Path) -> None:
    saved(tmp_path)
    flip(data_files(tmp_path / "root", 3)[0], -1)
    before = manifest(tmp_path / "root").stat().st_mtime_ns
    telemetry.configure(tmp_path / "telemetry", rank=0)
    try:
        with mirrored_job(tmp_path, job := Job()) as ckpt:
            ckpt.restore()
            train(ckpt, job, 4)
    finally:
        telemetry.configure(None)
    assert manifest(tmp_path / "root").stat().st_mtime_ns == before
    [healed] = [r for r in telemetry.read(tmp_path / "telemetry") if r["name"] == "checkpoint.heal"]
    assert healed["files"] == [f"step-00000003/{data_files(tmp_path / 'root', 3)[0].name}"]
    assert check_whole(str(tmp_path / "root")) == [1, 2, 3, 4]


def go_on_until(tmp_path: Path, last: int) -> None:
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        ckpt.restore()
        train(ckpt, job, last)


def check_killed(tmp_path: Path, place: str, damage: Damage) -> None:
    """Wherever it ends, nothing is worse than before, and the next run heals it."""
    saved(tmp_path)
    damage(tmp_path / "root")
    (result,) = try_ranks(1, heals_and_dies, str(tmp_path), place, init_group=False)
    assert isinstance(result.error, RankDied), result
    assert result.exitcode == -signal.SIGKILL, result
    for step in (1, 2):
        assert not open_checkpoint(tmp_path / "root", step).verify()
    go_on_until(tmp_path, 5)  # the save after the copy is whole sweeps what the kill has left
    assert check_whole(str(tmp_path / "root")) == [1, 2, 3, 4, 5]
    assert not list((tmp_path / "root").glob("**/*.tmp-*"))


def heals_and_dies(rank: int, folder: str, place: str) -> None:
    with armed(f"kill@{place}"), mirrored_job(Path(folder), Job()) as ckpt:
        ckpt.restore()


@pytest.mark.parametrize(
    ("place", "damage"),
    [
        (points.HEAL_FILE, "no folder"),
        (f"{points.MIRROR_CHUNK}:hit=5", "no folder"),
        (f"{points.MIRROR_CHUNK}:hit=5", "a flipped bit"),
        (points.HEAL_MANIFEST, "no folder"),
        (points.HEAL_WRITTEN, "a damaged manifest"),
    ],
)
@pytest.mark.filterwarnings("ignore:step 3 cannot be restored")
def test_killed_while_it_is_replaced(tmp_path: Path, place: str, damage: str) -> None:
    check_killed(tmp_path, place, DAMAGE[damage])


@pytest.mark.filterwarnings("ignore:step 3 cannot be restored")
def test_what_arrives_damaged_is_not_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that garbles what it is given leaves the old file, and that is told."""
    saved(tmp_path)
    [file] = data_files(tmp_path / "root", 3)
    flip(file, -1)
    damaged = file.read_bytes()
    read_into = LocalStorage.read_into

    def garbled(self: LocalStorage, path: str, start: int, buffer: memoryview) -> int:
        count = read_into(self, path, start, buffer)
        if ".tmp-" in path:
            buffer[0] ^= 1
        return count

    monkeypatch.setattr(LocalStorage, "read_into", garbled)
    monkeypatch.setattr(Healing, "TRIES", 1)  # how many rounds there will be hangs on the clock
    # Not as warnings: what a thread warns of is lost while another one catches its own.
    told: list[str] = []
    monkeypatch.setattr(mirror, "_warn", told.append)
    go_on_until(tmp_path, 6)
    assert re.search("step 3 of .* could not be replaced from its mirror", "".join(told))
    assert file.read_bytes() == damaged
    assert 6 in steps_of(str(tmp_path / "root"))


@pytest.mark.filterwarnings("ignore:step 3 cannot be restored")
def test_a_mirror_that_fails_is_asked_again(tmp_path: Path) -> None:
    saved(tmp_path)
    flip(data_files(tmp_path / "root", 3)[0], -1)
    with mirrored_job(tmp_path, job := Job()) as ckpt, held(points.HEAL_FILE) as hold:
        ckpt.restore()
        hold.wait_reached()
        left = [1]

        def once(operation: str, path: str) -> None:
            if operation == "read" and path.endswith(".safetensors") and left:
                left.pop()
                raise PermissionError(13, "not now")

        with going_wrong(before=once):
            hold.go_on.set()
            train(ckpt, job, 4)
    assert not left
    assert check_whole(str(tmp_path / "root")) == [1, 2, 3, 4]


def check_saved_anew(tmp_path: Path, place: str, *, commits_first: bool) -> None:
    """The save of a step counts, whenever it comes while an older one is put back."""
    saved(tmp_path)
    shutil.rmtree(tmp_path / "root" / "step-00000003")
    with mirrored_job(tmp_path, Job()) as ckpt, held(place) as hold:
        ckpt.restore()
        hold.wait_reached()
        again = ckpt.save(3)
        if commits_first:
            again.wait_committed()
        hold.go_on.set()
        again.wait_mirrored()
    newest = open_checkpoint(tmp_path / "root", 3)
    assert not newest.verify()
    assert open_checkpoint(mirror_url(tmp_path), 3).manifest == newest.manifest
    assert {p.name for p in data_files(tmp_path / "root", 3)} >= {
        file.name for file in newest.manifest.files
    }
    assert newest.manifest.attempt == again._copy.attempt  # type: ignore[union-attr]


def test_a_step_that_is_saved_anew_counts(tmp_path: Path) -> None:
    check_saved_anew(tmp_path / "a", points.HEAL_FILE, commits_first=True)
    check_saved_anew(tmp_path / "b", points.HEAL_MANIFEST, commits_first=False)


def test_a_step_is_not_saved_while_it_is_put_back() -> None:
    steps = StepsInUse()
    with steps.kept(3, Deadline(1.0)), steps.to_put_back(3) as free, steps.to_remove(3) as goes:
        assert (free, goes) == (True, False)
        with pytest.raises(DeadlineError):
            steps.wait_for_removal(3, Deadline(0.01))
    steps.wait_for_removal(3, Deadline(0.01))
    steps.begin(3)
    with steps.to_put_back(3) as free:
        assert not free


def test_chunks_that_other_steps_share_are_made_whole_for_all(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {"base": nn.Linear(600, 600), "head": nn.Linear(20, 20)}
    mirror = str(tmp_path / "mirror")
    with Checkpointer(tmp_path / "root", state, mirror=mirror, dedup=True) as ckpt:
        for step in (1, 2, 3):
            state["head"].weight.data.fill_(step)
            ckpt.save(step).wait_mirrored()
    flip(data_files(tmp_path / "root", 1)[0], 20_000)
    for step in (1, 2, 3):
        assert open_checkpoint(tmp_path / "root", step).verify()
    with Checkpointer(tmp_path / "root", state, mirror=mirror, dedup=True) as ckpt:
        with pytest.warns(UserWarning, match="step 3 cannot be restored"):
            report = ckpt.restore()
        assert report is not None
        assert (report.step, report.tier) == (3, "mirror")
    assert check_whole(str(tmp_path / "root")) == [1, 2, 3]


def test_another_attempt_is_left_alone(tmp_path: Path) -> None:
    """Nothing is put back that the root does not have for a reason."""
    save_once(tmp_path / "a", {"t": torch.ones(3)}, 1)
    save_once(tmp_path / "b", {"t": torch.zeros(3)}, 1)
    one, other = (Root(open_storage(tmp_path / name)) for name in "ab")
    with pytest.raises(copying.SupersededError):
        heal_step(one, other, 1, StepsInUse(), copying.CopyLimits())
    assert float(open_checkpoint(tmp_path / "b").read("t").sum()) == 0


def test_the_mirror_is_the_same_afterwards(tmp_path: Path) -> None:
    saved(tmp_path)
    before = {p: p.read_bytes() for p in (tmp_path / "mirror").glob("step-*/*")}
    shutil.rmtree(tmp_path / "root")
    with mirrored_job(tmp_path, Job()) as ckpt:
        ckpt.restore()
    assert {p: p.read_bytes() for p in (tmp_path / "mirror").glob("step-*/*")} == before
    assert steps_of(mirror_url(tmp_path)) == [1, 2, 3]
