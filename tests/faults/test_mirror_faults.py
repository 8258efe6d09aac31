"""Mirrors that fail, hang, lie or are somebody else's: told as the policy says, at no cost here."""

import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import WAIT_S, data_files, flip, held, must_notice
from fault_job import Job, check_survival
from flaky_store import going_wrong
from mirrors import check_restores, check_whole, mirror_url, mirrored_job, steps_of, train

from planaria.checkpoint import Mirror, SaveHandle, open_checkpoint, points
from planaria.checkpoint.storage import copying, mirror, remote
from planaria.checkpoint.storage.copying import FileCopy
from planaria.checkpoint.storage.names import step_folder
from planaria.checkpoint.storage.root import Root
from planaria.core.points import armed
from planaria.errors import CorruptError, RootError, StorageError


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planaria.checkpoint.storage.mirror.RETRY_AFTER_S", (0.0,) * 3)


def failing(operation: str, times: float, number: int = 104) -> Callable[[str, str], None]:
    """The first so many of one operation fail, on data and manifests of steps."""
    left = [times]

    def before(name: str, path: str) -> None:
        if name == operation and "step-" in path and left[0] > 0:
            left[0] -= 1
            raise OSError(number, "Connection reset by peer")

    return before


OPERATIONS = ("open", "block", "finish", "look", "put")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_failure_is_tried_again(tmp_path: Path, operation: str) -> None:
    with (
        going_wrong(before=failing(operation, 2)),
        mirrored_job(tmp_path, job := Job(), keep=2) as ckpt,
    ):
        train(ckpt, job, 3)
    assert check_whole(mirror_url(tmp_path)) == [2, 3]
    check_restores(tmp_path, mirror_url(tmp_path), 3)


def test_fatal_and_retry_raise_and_local_checkpoints_go_on(tmp_path: Path) -> None:
    for policy, times in (("fatal", 1), ("retry", 4)):
        folder = tmp_path / policy
        with mirrored_job(folder, job := Job(), on_failure=policy) as ckpt:
            with going_wrong(before=failing("finish", times)):
                job.advance()
                handle = ckpt.save(1)
                handle.wait_committed()
                wait_in_vain(handle)
            with pytest.raises(StorageError, match="checkpoints are not affected"):
                ckpt.step(1)
            train(ckpt, job, 2)
            handle.wait_mirrored()  # with the next save
        assert check_whole(mirror_url(folder)) == [1, 2]
        assert check_survival(folder / "root", 2) == 2


def test_what_waits_for_a_mirror_out_of_reach_is_there_with_the_next_save(tmp_path: Path) -> None:
    with mirrored_job(tmp_path, job := Job(), on_failure="degrade") as ckpt:
        job.advance()
        with going_wrong(before=failing_everywhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            handle = ckpt.save(1)
            with pytest.raises(StorageError, match="no route to host"):
                handle.wait_mirrored()
        assert not handle.mirrored
        train(ckpt, job, 2)
        handle.wait_mirrored()
        assert handle.mirrored


def wait_in_vain(handle: SaveHandle) -> None:
    with pytest.raises(StorageError, match="Connection reset"):
        handle.wait_mirrored()


def test_degrade_warns_and_training_goes_on(tmp_path: Path) -> None:
    with mirrored_job(tmp_path, job := Job(), on_failure="degrade") as ckpt:
        job.advance()
        with (
            going_wrong(before=failing("finish", 4)),
            pytest.warns(UserWarning, match="could not be brought up to date.*training goes on"),
        ):
            wait_in_vain(ckpt.save(1))
        train(ckpt, job, 2)
    assert check_whole(mirror_url(tmp_path)) == [1, 2]


def test_a_mirror_that_hangs_ends_with_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("planaria.checkpoint.storage.mirror.RETRY_AFTER_S", ())
    go_on = threading.Event()
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        train(ckpt, job, 1)
        root = ckpt._job.options.mirror.root
        assert root is not None
        assert isinstance(root.storage, remote.RemoteStorage)
        root.storage._timeout_s = 0.2
        job.advance()

        def hang(name: str, path: str) -> None:
            if name == "block":
                go_on.wait(WAIT_S)

        with going_wrong(before=hang):
            handle = ckpt.save(2)
            with pytest.raises(StorageError, match="no answer within"):
                handle.wait_mirrored()
            go_on.set()
        with pytest.raises(StorageError, match="no answer within"):
            ckpt.step(2)
        root.storage._timeout_s = WAIT_S
        train(ckpt, job, 3)
    assert check_whole(mirror_url(tmp_path)) == [1, 2, 3]


# Lies


def half(path: str, data: bytes) -> bytes:
    return data[:-1] if path.endswith(".safetensors") else data


def nothing(path: str, data: bytes) -> bytes | None:
    return None if path.endswith(".safetensors") else data


def other(path: str, data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1]) if path.endswith(".safetensors") else data


def no_manifest(path: str, data: bytes) -> bytes | None:
    return None if path.endswith("manifest.json") else data


def check_a_lie_is_noticed(tmp_path: Path, lie: Any, read_back: bool = False) -> None:
    """The mirror shows no step that is not whole, and says so."""
    mirror = Mirror(mirror_url(tmp_path), read_back=read_back)
    with mirrored_job(tmp_path, job := Job(), mirror=mirror, on_failure="fatal") as ckpt:
        train(ckpt, job, 1)
        job.advance()
        with going_wrong(kept=lie):
            handle = ckpt.save(2)
            handle.wait_committed()
            with pytest.raises((StorageError, AssertionError), match="not copied"):
                handle.wait_mirrored()
        assert check_whole(mirror_url(tmp_path)) == [1]
        with pytest.raises(StorageError):
            ckpt.step(2)
        train(ckpt, job, 3)
    assert check_whole(mirror_url(tmp_path)) == [1, 2, 3]


@pytest.mark.parametrize("lie", [half, nothing, no_manifest])
def test_lies_about_success(tmp_path: Path, lie: Any) -> None:
    check_a_lie_is_noticed(tmp_path, lie)


def test_other_bytes_of_the_right_length(tmp_path: Path) -> None:
    check_a_lie_is_noticed(tmp_path, other, read_back=True)


def test_sabotage_no_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileCopy, "_read_back", lambda *_: None)
    with pytest.raises((AssertionError, pytest.fail.Exception, StorageError)):
        check_a_lie_is_noticed(tmp_path, other, read_back=True)


def test_sabotage_manifest_not_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Root, "_read_back", lambda *_: None)
    with pytest.raises((AssertionError, pytest.fail.Exception, StorageError)):
        check_a_lie_is_noticed(tmp_path, no_manifest)


def test_short_reads_of_the_mirror_are_completed(tmp_path: Path) -> None:
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        train(ckpt, job, 1)
    short = iter(range(3))

    def returned(path: str, data: bytes) -> bytes:
        cut = path.endswith(".safetensors") and next(short, None) is not None
        return data[: len(data) // 2 + 1] if cut else data

    with going_wrong(returned=returned):
        check_restores(tmp_path, mirror_url(tmp_path), 1)
    assert next(short, None) is None


# Order


def check_the_manifest_is_last(tmp_path: Path) -> None:
    """Whenever a step shows in the mirror, all of it is there."""
    url = mirror_url(tmp_path)
    wrong: list[str] = []

    def look(name: str, step: int | None) -> None:
        for shown in steps_of(url):
            wrong.extend(map(str, open_checkpoint(url, shown).verify()))

    with (
        armed(callbacks={"checkpoint.mirror.*": look}),
        mirrored_job(tmp_path, job := Job(), keep=1) as ckpt,
    ):
        train(ckpt, job, 2)
    assert not wrong


def test_the_manifest_is_last(tmp_path: Path) -> None:
    check_the_manifest_is_last(tmp_path)


def test_sabotage_manifest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def manifest_first(work: Any, items: Any, most: int) -> None:
        copy = work.__self__
        data = copy._manifest.to_bytes()
        copy._target.put(f"{step_folder(copy._manifest.step)}/manifest.json", data)
        for item in items:
            work(item)

    monkeypatch.setattr(copying, "_at_once", manifest_first)
    must_notice(check_the_manifest_is_last, tmp_path)


# What is not ours, or not whole


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "thesis.tex").write_text("mine")
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        job.advance()
        handle = ckpt.save(1)
        with pytest.raises(StorageError, match=r"not Planaria's \(thesis\.tex\)"):
            handle.wait_mirrored()
        with pytest.raises(RootError, match=r"thesis\.tex"):
            ckpt.step(1)
        assert ckpt.all_steps() == [1]
    assert [p.name for p in (tmp_path / "mirror").iterdir()] == ["thesis.tex"]


def out_of_the_mirror(tmp_path: Path, steps: int) -> None:
    """A run that saves some steps while nothing gets into its mirror."""
    out = going_wrong(before=failing("put", float("inf")))
    with warnings.catch_warnings(), out:
        warnings.simplefilter("ignore")
        with mirrored_job(tmp_path, job := Job(), on_failure="degrade") as ckpt:
            train(ckpt, job, steps, wait=False)
        # Left behind where it was too slow, it would copy the step before it is damaged.
        ckpt._job.options.mirror._thread._thread.join(WAIT_S)  # type: ignore[union-attr]


def test_a_damaged_step_is_not_copied_and_told_once(tmp_path: Path) -> None:
    with mirrored_job(tmp_path, job := Job()) as ckpt, held(points.MIRROR_BEGIN) as hold:
        job.advance()
        handle = ckpt.save(1)
        hold.wait_reached()
        flip(data_files(tmp_path / "root", 1)[0], -1)
        hold.go_on.set()
        with pytest.raises(StorageError, match="does not match its checksum"):
            handle.wait_mirrored()
        with pytest.raises(StorageError, match="does not match its checksum") as told:
            ckpt.step(1)
        assert isinstance(told.value.__cause__, CorruptError)
        train(ckpt, job, 3)
    assert check_whole(mirror_url(tmp_path)) == [2, 3]


def go_on_until(tmp_path: Path, last: int) -> None:
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        assert ckpt.restore() is not None
        train(ckpt, job, last)
        ckpt.step(last)


def test_a_damaged_step_of_an_earlier_run_ends_no_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not as warnings: what a thread warns of is lost while another one catches its own.
    told: list[str] = []
    monkeypatch.setattr(mirror, "_warn", told.append)
    out_of_the_mirror(tmp_path, 2)
    flip(data_files(tmp_path / "root", 1)[0], -1)
    go_on_until(tmp_path, 4)
    assert re.search("step 1 cannot be copied.*does not match", "".join(told))
    assert len([text for text in told if "cannot be copied" in text]) == 1
    assert check_whole(mirror_url(tmp_path)) == [2, 3, 4]


def test_no_fresh_start_while_the_mirror_is_out_of_reach(tmp_path: Path) -> None:
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        train(ckpt, job, 1)
    with (
        going_wrong(before=failing_everywhere),
        mirrored_job(tmp_path / "new", Job(), mirror=mirror_url(tmp_path)) as ckpt,
        pytest.raises(StorageError, match="to begin anew might repeat what is there"),
    ):
        ckpt.restore()


def failing_everywhere(operation: str, path: str) -> None:
    raise ConnectionError("no route to host")


def test_what_is_here_is_restored_while_the_mirror_is_out_of_reach(tmp_path: Path) -> None:
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        train(ckpt, job, 2)
    with warnings.catch_warnings(), going_wrong(before=failing_everywhere):
        warnings.simplefilter("ignore")
        with mirrored_job(tmp_path, Job(), on_failure="degrade") as ckpt:
            report = ckpt.restore()
            assert report is not None
            assert (report.step, report.tier) == (2, "durable")
            flip(data_files(tmp_path / "root", 2)[0], -1)
            with pytest.raises(StorageError, match="it may well be whole there"):
                ckpt.restore()


def test_points_of_the_mirror_are_a_list_of_their_own() -> None:
    assert not set(points.MIRROR) & set(points.SAVE)
