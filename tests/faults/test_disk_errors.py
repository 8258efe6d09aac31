"""A disk that is full or broken: at each operation of a save, on either rank, under each policy."""

import contextlib
import errno
import os
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
from failing_files import FailingFiles
from fault_job import (
    Job,
    check_survival,
    differences,
    litter,
    make_checkpointer,
    own_random,
    reference,
    settle,
)
from ranks import run_ranks
from small_disk import small_disk

import planaria.checkpoint.persist as persist_module
from planaria.checkpoint import Checkpointer, SaveHandle, open_checkpoint, points
from planaria.checkpoint.storage.local import LocalStorage
from planaria.checkpoint.storage.root import Root
from planaria.core.points import arm, armed
from planaria.errors import RootError, SaveFailedError

WIDTH = 8
POLICIES = ("fatal", "retry", "degrade")
ERRORS = (errno.ENOSPC, errno.EIO)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persist_module, "RETRY_AFTER_S", (0.0, 0.0, 0.0))


class Patient:
    """A job on a failing disk, with one checkpoint from before it failed."""

    def __init__(self, root: Path, policy: str, resave: bool = False) -> None:
        self.root, self.files, self.job = root, FailingFiles(), Job(WIDTH)
        self.threads = set(threading.enumerate())
        self.step = 1 if resave else 2
        storage = LocalStorage(root, files=self.files)
        self.ckpt = make_checkpointer(storage, self.job, keep=1, on_failure=policy)
        self.job.advance()
        self.ckpt.save(1).wait_committed()
        settle(self.ckpt)

    def save(self, **fault: Any) -> tuple[SaveHandle, list[str]]:
        """Saves while the disk fails; returns the handle and what was warned of."""
        self.job.advance()
        before = self.job.snapshot()
        self.files.arm(**fault)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            handle = self.ckpt.save(self.step)
            handle.wait_captured()
            settle(self.ckpt)
        assert not differences(self.job.snapshot(), before), "training state was changed"
        check_no_leak(self.ckpt)
        return handle, [str(w.message) for w in caught]

    def recover(self) -> None:
        """The disk is well again: the next save commits, and nothing of the failure is left."""
        self.files.arm()
        self.job.advance()
        self.ckpt.save(3).wait_committed()
        self.ckpt.close()
        assert set(threading.enumerate()) <= self.threads
        assert [(f.step, f.state) for f in Root(LocalStorage(self.root)).folders()] == [
            (3, "committed")
        ]
        assert not litter(self.root)
        check_newest(self.root, {3})


def check_no_leak(ckpt: Checkpointer) -> None:
    assert len(ckpt._job.attached.pool._free) == ckpt._job.attached.pool._made, (
        "a buffer was not given back"
    )


def check_newest(root: Path, allowed: set[int]) -> None:
    """A restore brings back one of these steps, whole."""
    with own_random():
        job = Job(WIDTH)
        ckpt = make_checkpointer(root, job)
        report = ckpt.restore()
        ckpt.close()
        assert report is not None
        assert report.step in allowed
        assert not report.fell_back_from
        assert open_checkpoint(root, report.step).verify() == []
        assert not differences(job.snapshot(), reference(report.step, WIDTH))


def operations(root: Path, resave: bool = False) -> list[str]:
    """The operations of one save, clearing up included."""
    patient = Patient(root, "fatal", resave)
    patient.save()
    done = list(patient.files.done)
    patient.ckpt.close()
    return done


def last_of_commit(done: list[str]) -> int:
    """The operation with which a step is committed, counted from 1."""
    return done.index("rename") + 2


@pytest.mark.parametrize("number", ERRORS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_disk_that_stays_broken(tmp_path: Path, policy: str, number: int) -> None:
    done = operations(tmp_path / "sound")
    for at in range(1, len(done) + 1):
        root = tmp_path / str(at)
        patient = Patient(root, policy)
        handle, warned = patient.save(at=at, number=number)
        if at > last_of_commit(done):
            assert handle.committed, f"{done[at - 1]} number {at}"
            assert warned
            assert all("old checkpoints could not be removed" in text for text in warned)
        else:
            check_failed(patient, handle, warned, policy, os.strerror(number))
            # Where all but the last sync was done, the step may be there.
            in_place = {2} if at == last_of_commit(done) else set()
            assert open_checkpoint(root, 1).verify() == []
            assert set(Root(LocalStorage(root)).steps()) == {1} | in_place
        patient.recover()


def check_failed(
    patient: Patient, handle: SaveHandle, warned: list[str], policy: str, why: str
) -> None:
    with pytest.raises(SaveFailedError) as info:
        handle.wait_committed()
    text = str(info.value)
    assert text.startswith("step 2 was not committed: ")
    assert why in text
    assert "rank 0" in text
    assert f"{patient.root}/step-00000002" in text
    if policy == "degrade":
        assert warned == [f"{text}; training goes on without it"]
    else:
        assert not warned
        with pytest.raises(SaveFailedError, match=why):
            patient.ckpt.step(2)


@pytest.mark.parametrize("resave", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_an_error_that_passes(tmp_path: Path, policy: str, resave: bool) -> None:
    """One failure is tried again, but for a sync of data: the next may lie."""
    done = operations(tmp_path / "sound", resave)
    synced = done.index("fsync") + 1
    for at in range(1, len(done) + 1):
        patient = Patient(tmp_path / str(at), policy, resave)
        handle, warned = patient.save(at=at, number=errno.EIO, times=1)
        in_commit = at <= last_of_commit(done)
        if in_commit and (policy == "fatal" or at in (synced, synced + 1)):
            with pytest.raises(SaveFailedError, match="Input/output error"):
                handle.wait_committed()
            if policy != "degrade":
                with pytest.raises(SaveFailedError, match="Input/output error"):
                    patient.ckpt.step(2)
            check_newest_or_busy(patient, {1} | ({2} if at == last_of_commit(done) else set()))
        else:
            assert handle.committed, f"{done[at - 1]} number {at}: {handle.error}"
            assert all("could not be removed" in text for text in warned)
        patient.recover()


def check_newest_or_busy(patient: Patient, allowed: set[int]) -> None:
    steps = Root(LocalStorage(patient.root)).steps()
    assert set(steps) <= allowed
    assert all(open_checkpoint(patient.root, step).verify() == [] for step in steps)


@pytest.mark.parametrize("policy", POLICIES)
def test_several_saves_on_a_broken_disk(tmp_path: Path, policy: str) -> None:
    """Each is told of; buffers come back from saves that are cut off in mid-write."""
    patient = Patient(tmp_path / "root", policy)
    told = 0

    def count(error: SaveFailedError) -> int:
        return 1 + len(getattr(error, "__notes__", []))  # later ones are noted on the first

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patient.files.arm(at=4, number=errno.ENOSPC)
        for step in range(2, 8):
            patient.job.advance()
            try:
                patient.ckpt.step(step)
                patient.ckpt.save(step)
            except SaveFailedError as error:
                told += count(error)
        settle(patient.ckpt)
        check_no_leak(patient.ckpt)
        try:
            patient.ckpt.close()
        except SaveFailedError as error:
            told += count(error)
    assert told + len(caught) >= 3
    assert bool(told) == (policy != "degrade")
    check_newest(patient.root, {1})


def fails_on_one_rank(
    rank: int, path: str, policy: str, victim: int, point: str, times: str
) -> dict[str, Any]:
    """The second save meets a full disk on one rank; the third is well."""
    persist_module.RETRY_AFTER_S = (0.0, 0.0, 0.0)
    job, seen = Job(), {}
    ckpt = make_checkpointer(path, job, on_failure=policy)
    job.advance()
    ckpt.save(1).wait_committed()
    arm(f"enospc@{point}:rank={victim},step=2,times={times}")
    job.advance()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        handle = ckpt.save(2)
        handle.wait_captured()
        settle(ckpt)
    seen["warned"] = [str(w.message) for w in caught]
    seen["error"] = handle.error and str(handle.error)
    check_no_leak(ckpt)
    try:
        ckpt.step(2)
        seen["next call"] = None
    except SaveFailedError as error:
        seen["next call"] = str(error)
    job.advance()
    ckpt.save(3).wait_committed()
    ckpt.close()
    seen["threads"] = [t.name for t in threading.enumerate() if t.name.startswith("planaria-")]
    return seen


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("point", [points.WRITE_CHUNK, points.WRITE_END])
def test_a_full_disk_on_one_rank(tmp_path: Path, policy: str, victim: int, point: str) -> None:
    args = (str(tmp_path / "root"), policy, victim, point, "inf")
    for rank, seen in enumerate(run_ranks(2, fails_on_one_rank, *args)):
        where = f"rank {rank}: {seen}"
        assert seen["error"].startswith(f"step 2 was not committed: rank {victim}"), where
        assert "No space left on device" in seen["error"], where
        if policy == "degrade":
            assert len(seen["warned"]) == 1, where
            assert seen["next call"] is None, where
        else:
            assert seen["next call"] == seen["error"], where
        assert not seen["threads"], where
    check_survival(tmp_path / "root", 3)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_full_disk_that_has_room_again(tmp_path: Path, policy: str) -> None:
    args = (str(tmp_path / "root"), policy, 1, points.WRITE_CHUNK, "1")
    for seen in run_ranks(2, fails_on_one_rank, *args):
        assert bool(seen["error"]) == (policy == "fatal")
    assert 2 in Root(LocalStorage(tmp_path / "root")).steps() or policy == "fatal"
    check_survival(tmp_path / "root", 3)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_disk_that_is_really_full(tmp_path: Path, policy: str) -> None:
    with small_disk(tmp_path / "disk", "size=600k") as disk:
        root, job = disk / "root", Job()
        ckpt = make_checkpointer(root, job, keep=1, on_failure=policy)
        job.advance()
        ckpt.save(1).wait_committed()
        settle(ckpt)
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        os.truncate(filler, filler.stat().st_size - 64 * 1024)
        job.advance()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(SaveFailedError, match=r"step-00000002.*No space left"):
                ckpt.save(2).wait_committed()
            settle(ckpt)
        check_no_leak(ckpt)
        if policy != "degrade":
            with pytest.raises(SaveFailedError, match="No space left"):
                ckpt.step(2)
        filler.unlink()
        ckpt.save(2).wait_committed()
        ckpt.close()
        check_survival(root, 2)


def test_a_root_without_room(tmp_path: Path) -> None:
    """Not even the marker can be written: told by the constructor."""
    files = FailingFiles()
    for at in range(1, 8):
        files.arm(at=at, number=errno.ENOSPC)
        root = tmp_path / str(at)
        with pytest.raises(RootError, match=r"No space left on device.*; give a folder"):
            make_checkpointer(LocalStorage(root, files=files), Job())
        files.arm()
        make_checkpointer(LocalStorage(root, files=files), Job()).close()


@pytest.mark.parametrize("policy", POLICIES)
def test_warnings_that_are_errors_end_no_thread(tmp_path: Path, policy: str) -> None:
    patient = Patient(tmp_path / "root", policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patient.files.arm(at=1, number=errno.EIO)
        patient.job.advance()
        handle = patient.ckpt.save(2)
        with pytest.raises(SaveFailedError):
            handle.wait_committed()
        settle(patient.ckpt)
        with pytest.raises(SaveFailedError):
            patient.ckpt.step(2)
    patient.recover()


def test_faults_at_points_take_the_same_way_as_a_disks(tmp_path: Path) -> None:
    """So a drill shows what a real disk would do."""
    patient = Patient(tmp_path / "root", "retry")
    with armed(f"eio@{points.WRITE_CHUNK}:times=2;eio@{points.WRITE_HEADER}"):
        handle, _ = patient.save()
    assert handle.committed
    patient.recover()
