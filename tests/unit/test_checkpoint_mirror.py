"""A second copy of every checkpoint: what is in it, and what is restored from it."""

import shutil
import threading
import time
import warnings
from pathlib import Path

import pytest
from checkpoints import WAIT_S, data_files, flip, held, load_once, must_notice, save_once
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

from planaria.checkpoint import (
    Checkpointer,
    KeepBest,
    KeepLast,
    Mirror,
    open_checkpoint,
    points,
)
from planaria.checkpoint.storage.base import open_storage
from planaria.checkpoint.storage.lineage import LineageFile
from planaria.checkpoint.storage.root import Root
from planaria.core.deadline import Deadline
from planaria.core.points import armed
from planaria.errors import (
    ConfigError,
    CorruptError,
    DeadlineError,
    NotCommittedError,
    RootError,
    StorageError,
)


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
        ckpt._job.options.mirror._thread._thread.join(WAIT_S)  # type: ignore[union-attr]
    assert steps_of(str(tmp_path / "root")) == [1, 2]
    with mirrored_job(tmp_path, Job()) as ckpt:
        assert ckpt.restore() is not None
    assert check_whole(mirror_url(tmp_path)) == [1, 2]


def test_damage_here_is_made_good_from_the_mirror(tmp_path: Path) -> None:
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        train(ckpt, job, 3)
    for step in (2, 3):
        flip(data_files(tmp_path / "root", step)[0], -1)
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
            report = ckpt.restore(2)
        assert report is not None
        assert report.tier == "mirror"
        report = ckpt.restore(1)
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
        # Step 2 may go, step 1 must not.
        until, steps = Deadline(WAIT_S), ckpt._job.attached.pipeline.steps
        while not steps.cleared_up:
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


def test_of_what_was_left_no_more_is_kept_than_in_the_root(tmp_path: Path) -> None:
    url, state = mirror_url(tmp_path), start()
    with Checkpointer(tmp_path / "root", state, mirror=url, keep=2) as ckpt:
        ckpt.save(2).wait_mirrored()
        for step in (3, 5, 7, 9):
            ckpt.save(
                step
            ).wait_mirrored()  # and is left, for the next one follows on what was before
            ckpt.restore(step - 1)
            ckpt.save(step + 1).wait_mirrored()
    for root in (Root(open_storage(tmp_path / "root")), Root(open_storage(url))):
        assert (root.steps(), root.abandoned()) == ([8, 10], [7, 9])


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


def test_another_runs_mirror_is_not_restored_from(tmp_path: Path) -> None:
    save_once(tmp_path / "a", start(), 7, mirror=mirror_url(tmp_path))
    save_once(tmp_path / "b", start(), 2)
    url = mirror_url(tmp_path)
    with Checkpointer(tmp_path / "b", start(), mirror=url, on_failure="degrade") as ckpt:
        with pytest.warns(UserWarning, match="nothing is restored from the mirror"):
            report = ckpt.restore()
        assert report is not None
        assert (report.step, report.tier) == (2, "durable")
    # Not by its number either; and where the only step here is damaged, that is what is told.
    flip(data_files(tmp_path / "b", 2)[0], -1)
    with (
        warnings.catch_warnings(),
        Checkpointer(tmp_path / "b", start(), mirror=url, on_failure="degrade") as ckpt,
    ):
        warnings.simplefilter("ignore")
        with pytest.raises(CorruptError, match="no committed step"):
            ckpt.restore()
        with pytest.raises(NotCommittedError):
            ckpt.restore(7)
    assert steps_of(url) == [7]


def test_another_attempt_at_the_step_is_not_restored_by_its_number(tmp_path: Path) -> None:
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        train(ckpt, job, 2)
    with make_checkpointer(tmp_path / "root", job := Job()) as ckpt:  # without the mirror
        ckpt.restore(1)
        train(ckpt, job, 2, wait=False)
    flip(data_files(tmp_path / "root", 2)[0], -1)
    with mirrored_job(tmp_path, Job(), on_failure="degrade") as ckpt, pytest.raises(CorruptError):
        ckpt.restore(2)


def test_a_file_that_the_mirror_has_lost_is_sent_again(tmp_path: Path) -> None:
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        train(ckpt, job, 2)
    data_files(tmp_path / "mirror", 1)[0].unlink()
    with mirrored_job(tmp_path, Job()) as ckpt:
        ckpt.restore()
    assert check_whole(mirror_url(tmp_path)) == [1, 2]


def check_a_failed_save_leaves_nothing_behind(tmp_path: Path) -> None:
    """A rewind whose commit fails is none: the mirror's later steps are still the run's own."""
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        train(ckpt, job, 4)
    aside: list[int] = []
    set_aside = LineageFile.set_aside

    def noted(self: LineageFile, step: int) -> None:
        aside.append(step)
        set_aside(self, step)

    with pytest.MonkeyPatch.context() as patch, armed(callbacks={points.MANIFEST_BEGIN: fail}):
        patch.setattr(LineageFile, "set_aside", noted)
        with mirrored_job(tmp_path, job := Job(), on_failure="degrade") as ckpt:
            ckpt.restore(2)
            job.advance()
            with pytest.warns(UserWarning, match="training goes on"):
                ckpt.save(3)._done.wait(WAIT_S)
            thread = ckpt._job.options.mirror._thread
            assert thread is not None
            thread.wake()
    assert not aside
    assert steps_of(mirror_url(tmp_path)) == [1, 2, 3, 4]
    # The same, and it is committed.
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        ckpt.restore(2)
        train(ckpt, job, 3)
    assert steps_of(mirror_url(tmp_path)) == [1, 2, 3]


def fail(name: str, step: int | None) -> None:
    raise OSError(28, "No space left on device")


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path) -> None:
    check_a_failed_save_leaves_nothing_behind(tmp_path)


def test_sabotage_a_rewind_counts_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LineageFile, "_committed", lambda *_: True)
    must_notice(check_a_failed_save_leaves_nothing_behind, tmp_path)


def test_a_rewind_counts_though_the_run_died_after_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        train(ckpt, job, 4)

    def down(operation: str, path: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("planaria.checkpoint.storage.mirror.RETRY_AFTER_S", ())
    monkeypatch.setattr(LineageFile, "settle", lambda _: None)
    with warnings.catch_warnings(), going_wrong(before=down):
        warnings.simplefilter("ignore")
        with mirrored_job(tmp_path, job := Job(), on_failure="degrade") as ckpt:
            ckpt.restore(2)
            train(ckpt, job, 3, wait=False)
    monkeypatch.undo()
    with mirrored_job(tmp_path, Job()) as ckpt:
        assert ckpt._job.options.mirror.steps() == [1, 2]
        report = ckpt.restore()
        assert report is not None
        assert (report.step, report.tier) == (3, "durable")
    assert steps_of(mirror_url(tmp_path)) == [1, 2, 3]


def test_what_has_gone_is_not_remembered(tmp_path: Path) -> None:
    with mirrored_job(tmp_path, job := Job(), keep=KeepBest("loss") | KeepLast(2)) as ckpt:
        handles = []
        for step in range(1, 9):
            job.advance()
            handles.append(ckpt.save(step, {"loss": -step}))
            handles[-1].wait_mirrored()
        thread = ckpt._job.options.mirror._thread
        assert thread is not None
        with thread._changed:
            thread._changed.wait_for(lambda: thread._ended == thread._rounds, WAIT_S)
        replica = thread._replica
        for held in (thread._waiting, replica._committed, replica._metrics_of, replica._own,
                     replica._verified, replica._there, replica._listed):  # fmt: skip
            assert len(held) <= 3, held
        for handle in handles:
            assert handle.mirrored
            handle.wait_mirrored()


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
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="is where the checkpoints lie"):
        Checkpointer(tmp_path, start(), mirror=str(tmp_path / "link"))
    with pytest.raises(ConfigError, match="mirror=5"):
        Checkpointer(tmp_path, start(), mirror=5)  # type: ignore[arg-type]


def test_without_a_mirror(tmp_path: Path) -> None:
    with make_checkpointer(tmp_path, Job()) as ckpt:
        handle = ckpt.save(1)
        with pytest.raises(ConfigError, match="there is no mirror"):
            handle.wait_mirrored()
        assert not handle.mirrored
        settle(ckpt)
