"""A second copy of every checkpoint: what is in it, and what is restored from it."""

import shutil
import threading
import time
from pathlib import Path

import pytest
from checkpoints import WAIT_S, data_files, flip, held, load_once, save_once
from fault_job import Job, differences, make_checkpointer, reference, settle
from flaky_store import going_wrong
from mirrors import (
    check_restores,
    check_whole,
    mirror_url,
    mirrored_job,
    steps_of,
    train,
)
from save_cases import everything, start

from planaria.checkpoint import Checkpointer, Mirror, open_checkpoint, points
from planaria.checkpoint.storage.base import open_storage
from planaria.checkpoint.storage.root import Root
from planaria.core.deadline import Deadline
from planaria.errors import ConfigError, DeadlineError, RootError, StorageError


def test_every_kept_step_is_in_the_mirror(tmp_path: Path) -> None:
    with mirrored_job(tmp_path, job := Job(), keep=2) as ckpt:
        train(ckpt, job, 4)
    assert steps_of(mirror_url(tmp_path)) == [3, 4]
    for step in (3, 4):
        here = open_checkpoint(tmp_path / "root", step).manifest
        assert open_checkpoint(mirror_url(tmp_path), step).manifest == here
    check_restores(tmp_path, mirror_url(tmp_path), 4)


def test_the_step_is_durable_before_it_is_mirrored(tmp_path: Path) -> None:
    with mirrored_job(tmp_path, job := Job()) as ckpt, held(points.MIRROR_BEGIN) as hold:
        job.advance()
        handle = ckpt.save(1)
        handle.wait_committed()
        hold.wait_reached()
        assert not handle.mirrored
        # Training and saving go on meanwhile.
        job.advance()
        other = ckpt.save(2)
        other.wait_committed()
        with pytest.raises(DeadlineError, match="the copy of step 1"):
            handle.wait_mirrored(0.01)
        hold.go_on.set()
        handle.wait_mirrored()
        other.wait_mirrored()
        assert handle.mirrored
    assert steps_of(mirror_url(tmp_path)) == [1, 2]


def test_a_local_folder_can_be_a_mirror(tmp_path: Path) -> None:
    with mirrored_job(tmp_path, job := Job(), mirror=str(tmp_path / "other")) as ckpt:
        train(ckpt, job, 2)
    assert check_whole(str(tmp_path / "other")) == [1, 2]


def test_leaving_waits_for_the_copies(tmp_path: Path) -> None:
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        train(ckpt, job, 3, wait=False)
    assert check_whole(mirror_url(tmp_path)) == [1, 2, 3]


def test_leaving_says_what_is_not_copied_and_the_next_run_copies_it(tmp_path: Path) -> None:
    hold = threading.Event()

    def wait(operation: str, path: str) -> None:
        if operation == "block":
            hold.wait(WAIT_S)

    ckpt = mirrored_job(tmp_path, job := Job())
    with going_wrong(before=wait):
        train(ckpt, job, 2, wait=False)
        ckpt._timeout_s = 0.3
        with pytest.raises(StorageError, match=r"step.* could not be copied to flaky"):
            ckpt.close()
        hold.set()
        ckpt._mirror._thread._thread.join(WAIT_S)  # type: ignore[union-attr]
    assert steps_of(str(tmp_path / "root")) == [1, 2]
    with mirrored_job(tmp_path, Job()) as ckpt:
        assert ckpt.restore() is not None
    assert check_whole(mirror_url(tmp_path)) == [1, 2]


def test_damage_here_is_made_good_from_the_mirror(tmp_path: Path) -> None:
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        train(ckpt, job, 3)
    flip(data_files(tmp_path / "root", 3)[0], -1)
    job = Job()
    with mirrored_job(tmp_path, job) as ckpt:
        with pytest.warns(UserWarning, match="step 3 cannot be restored, its mirror is tried"):
            report = ckpt.restore()
        assert report is not None
        assert (report.step, report.tier) == (3, "mirror")
        assert [step for step, _ in report.fell_back_from] == [3]
        assert not differences(job.snapshot(), reference(3))
        # By its number, too; and an undamaged one from what is nearer.
        with pytest.warns(UserWarning, match="its mirror is tried"):
            report = ckpt.restore(3)
        assert report is not None
        assert report.tier == "mirror"
        report = ckpt.restore(2)
        assert report is not None
        assert report.tier == "durable"


def test_damage_in_the_mirror_is_not_restored(tmp_path: Path) -> None:
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        train(ckpt, job, 2)
    flip(data_files(tmp_path / "mirror", 2)[0], -1)
    shutil.rmtree(tmp_path / "root")
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        with pytest.warns(UserWarning, match="an older one is tried"):
            report = ckpt.restore()
        assert report is not None
        assert (report.step, report.tier) == (1, "mirror")
        train(ckpt, job, 2)
    # The damaged step belonged to a past that was left, and has been replaced.
    assert check_whole(mirror_url(tmp_path)) == [1, 2]


def test_a_step_is_not_removed_while_it_is_copied(tmp_path: Path) -> None:
    check_the_copied_step_stays(tmp_path)


def check_the_copied_step_stays(tmp_path: Path) -> None:
    with mirrored_job(tmp_path, job := Job(), keep=1) as ckpt, held(points.MIRROR_CHUNK) as hold:
        job.advance()
        first = ckpt.save(1)
        hold.wait_reached()
        for step in (2, 3):
            job.advance()
            ckpt.save(step).wait_committed()
        # Step 2 may go, step 1 must not; a save ends when what is old was cleared up after it.
        until = Deadline(WAIT_S)
        while ckpt._pipeline.steps._saved:
            until.check("the saves to end")
            time.sleep(0.01)
        assert steps_of(str(tmp_path / "root")) == [1, 3]
        hold.go_on.set()
        first.wait_mirrored()
    assert steps_of(mirror_url(tmp_path)) == [3]


def test_sabotage_removed_while_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import contextlib

    from planaria.checkpoint.steps_in_use import StepsInUse

    monkeypatch.setattr(StepsInUse, "kept", lambda *_: contextlib.nullcontext())
    with pytest.raises((AssertionError, StorageError)):
        check_the_copied_step_stays(tmp_path)


def test_a_step_saved_again_is_copied_again(tmp_path: Path) -> None:
    state = start()
    url = mirror_url(tmp_path)
    with Checkpointer(tmp_path / "root", state, mirror=url) as ckpt:
        ckpt.save(1).wait_mirrored()
        state["model"][0].weight.data.fill_(3)
        handle = ckpt.save(1)
        handle.wait_mirrored()
    assert open_checkpoint(url).manifest == open_checkpoint(tmp_path / "root").manifest
    assert check_whole(url) == [1]
    assert len(data_files(tmp_path / "mirror", 1)) == 1
    target = start(2)
    load_once(url, target)
    assert everything(target)["model"] == everything(state)["model"]


def test_a_past_that_was_left_is_set_aside_in_the_mirror(tmp_path: Path) -> None:
    url = mirror_url(tmp_path)
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        train(ckpt, job, 4)
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        assert ckpt.restore(2) is not None
        train(ckpt, job, 3)
    states = {f.step: f.state for f in Root(open_storage(url)).folders()}
    assert states == {1: "committed", 2: "committed", 3: "committed", 4: "abandoned"}
    check_restores(tmp_path, url, 3)


def test_what_was_left_does_not_count_among_what_is_kept(tmp_path: Path) -> None:
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        train(ckpt, job, 4)
    with mirrored_job(tmp_path, job := Job(), keep=1) as ckpt:
        assert ckpt.restore(2) is not None
        train(ckpt, job, 3)
    assert check_whole(mirror_url(tmp_path)) == [3]


def test_a_mirror_out_of_reach_cannot_bring_back_what_was_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("planaria.checkpoint.storage.mirror.RETRY_AFTER_S", ())
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        train(ckpt, job, 4)

    def out_of_reach(operation: str, path: str) -> None:
        raise ConnectionError("no route to host")

    ckpt = mirrored_job(tmp_path, job := Job())
    ckpt.restore(2)

    def end() -> None:
        try:
            train(ckpt, job, 3, wait=False)  # it may be told of here already
        finally:
            ckpt.close()

    with going_wrong(before=out_of_reach), pytest.raises(StorageError, match="no route to host"):
        end()
    shutil.rmtree(tmp_path / "root" / "step-00000004")
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        report = ckpt.restore()
        assert report is not None
        assert (report.step, report.tier) == (3, "durable")  # not 4, of the mirror
        train(ckpt, job, 4)
    assert check_whole(mirror_url(tmp_path)) == [1, 2, 3, 4]
    here = open_checkpoint(tmp_path / "root", 4).manifest
    assert open_checkpoint(mirror_url(tmp_path), 4).manifest == here


def test_a_run_goes_on_in_an_empty_folder(tmp_path: Path) -> None:
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        train(ckpt, job, 2)
    shutil.rmtree(tmp_path / "root")
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        report = ckpt.restore()
        assert report is not None
        assert report.tier == "mirror"
        train(ckpt, job, 3)
    assert check_whole(mirror_url(tmp_path)) == [1, 2, 3]
    check_restores(tmp_path, mirror_url(tmp_path), 3)


def test_another_run_is_not_mixed_in(tmp_path: Path) -> None:
    save_once(tmp_path / "a", start(), 7, mirror=mirror_url(tmp_path))
    with pytest.raises(RootError, match="neither wrote nor restored"):
        save_once(tmp_path / "b", start(), 1, mirror=mirror_url(tmp_path))
    assert steps_of(str(tmp_path / "b")) == [1]
    assert steps_of(mirror_url(tmp_path)) == [7]


def test_pacing_takes_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from planaria.core.pacing import TokenBucket

    taken: list[int] = []
    monkeypatch.setattr(TokenBucket, "take", lambda self, n, deadline: taken.append(n))
    mirror = Mirror(mirror_url(tmp_path), bytes_per_s=1e6)
    with mirrored_job(tmp_path, job := Job(), mirror=mirror) as ckpt:
        train(ckpt, job, 1)
    assert sum(taken) == open_checkpoint(tmp_path / "root").manifest.nbytes


@pytest.mark.parametrize("bad", [{"streams": 0}, {"bytes_per_s": 0}, {"bytes_per_s": -1.0}])
def test_limits_that_make_no_sense(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Mirror("s3://bucket/run", **bad)  # type: ignore[arg-type]


def test_a_run_may_be_given_another_mirror() -> None:
    from planaria.launch import config

    old, new = config.compose([]), config.compose(["checkpoint.mirror=s3://bucket/run"])
    assert (old.checkpoint.mirror, new.checkpoint.mirror) == (None, "s3://bucket/run")
    assert config.differences(old, new) == {}
    with pytest.raises(ConfigError, match="mirror_bytes_per_s"):
        config.compose(["checkpoint.mirror_bytes_per_s=0"])


def test_a_root_is_no_mirror_of_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is where the checkpoints lie"):
        Checkpointer(tmp_path, start(), mirror=str(tmp_path))


def test_without_a_mirror(tmp_path: Path) -> None:
    with make_checkpointer(tmp_path, Job()) as ckpt:
        handle = ckpt.save(1)
        with pytest.raises(ConfigError, match="there is no mirror"):
            handle.wait_mirrored()
        assert not handle.mirrored
        settle(ckpt)
