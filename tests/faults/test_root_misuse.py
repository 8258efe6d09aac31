"""Roots that are not ours: foreign files, read-only disks, other jobs, forked children."""

import contextlib
import errno
import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import threading
import time
import warnings
from pathlib import Path

import pytest
from fault_job import Job, check_survival, make_checkpointer, settle
from ranks import run_ranks, try_ranks
from small_disk import small_disk

import planaria.checkpoint.opening as opening_module
from planaria.checkpoint import Checkpointer, open_checkpoint, points
from planaria.checkpoint.format.manifest import FORMAT
from planaria.checkpoint.storage import lock as lock_module
from planaria.checkpoint.storage.local import LocalStorage
from planaria.checkpoint.storage.lock import RootLock
from planaria.checkpoint.storage.os_files import OsFiles
from planaria.checkpoint.storage.remote import RemoteStorage
from planaria.checkpoint.storage.root import Root
from planaria.core.deadline import Deadline
from planaria.core.points import armed
from planaria.errors import (
    FormatError,
    NotCommittedError,
    RootError,
    RootLockedError,
    SaveFailedError,
)


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks whose lease expires soon."""
    lock = functools.partial(RootLock, lease_s=0.6)
    monkeypatch.setattr(opening_module, "RootLock", lock)


def saved_once(root: Path) -> None:
    job = Job()
    with make_checkpointer(root, job) as ckpt:
        job.advance()
        ckpt.save(1).wait_committed()


def test_someone_elses_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RootError, match=r"not Planaria's \(thesis.tex\); give a new"):
        make_checkpointer(tmp_path, Job())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_marker_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "planaria.json").write_text('{"kind": "garden"}')
    with pytest.raises(RootError, match=r"planaria.json is not the mark of"):
        make_checkpointer(tmp_path, Job())


@pytest.mark.parametrize("number", [99, FORMAT + 1])
def test_a_root_of_a_newer_version(tmp_path: Path, number: int) -> None:
    marker = {"kind": "planaria checkpoints", "format": number}
    (tmp_path / "planaria.json").write_text(json.dumps(marker))
    with pytest.raises(FormatError, match=rf"planaria.json: format {number} is newer.*newer one"):
        make_checkpointer(tmp_path, Job())


def test_someone_elses_steps_without_a_marker(tmp_path: Path) -> None:
    """They are called as ours are, but hold something else."""
    step = tmp_path / "step-00000010"
    step.mkdir()
    (step / "user.txt").write_text("mine")
    with pytest.raises(RootError, match=r"not Planaria's \(step-00000010/user.txt\)"):
        make_checkpointer(tmp_path, Job())
    (step / "user.txt").unlink()
    (tmp_path / "model.tmp-deadbeef").write_text("mine")
    with pytest.raises(RootError, match=r"not Planaria's \(model.tmp-deadbeef\)"):
        make_checkpointer(tmp_path, Job())


def test_a_root_that_lost_its_marker(tmp_path: Path) -> None:
    saved_once(tmp_path / "root")
    (tmp_path / "root" / "planaria.json").unlink()
    (tmp_path / "root" / "planaria.json.tmp-01234567").touch()
    with make_checkpointer(tmp_path / "root", Job()) as ckpt:
        assert ckpt.all_steps() == [1]
    check_survival(tmp_path / "root", 1)


@pytest.mark.parametrize("remote", [False, True])
def test_retention_leaves_the_files_of_others(tmp_path: Path, remote: bool) -> None:
    root, job = tmp_path / "root", Job()
    storage = RemoteStorage(f"file://{root}") if remote else LocalStorage(root)
    with Checkpointer(storage, job.state, keep=1, audit=True) as ckpt:
        job.advance()
        ckpt.save(1).wait_committed()
        settle(ckpt)
        (root / "step-00000001" / "user.txt").write_text("mine")
        (root / "step-00000001" / "plots").mkdir()
        (root / "step-00000001" / "plots" / "loss.png").write_text("mine")
        (root / "model.tmp-deadbeef").write_text("mine")
        (root / "planaria.json.tmp-01234567").write_text("left by a crash")
        job.advance()
        ckpt.save(2).wait_committed()
        settle(ckpt)
        job.advance()
        ckpt.save(3).wait_committed()
    left = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
    assert [name for name in left if not name.startswith("step-00000003/")] == [
        *(["lock"] if not remote else []),
        "model.tmp-deadbeef",
        "planaria.json",
        "step-00000001/plots/loss.png",
        "step-00000001/user.txt",
    ]
    assert not (root / "step-00000002").exists()
    assert Root(LocalStorage(root)).steps() == [3]


@pytest.mark.parametrize("below", ["", "/deeper", "/deeper/still"])
def test_a_file_in_the_way(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RootError, match=r"file\S* is a file.*; give a folder"):
        make_checkpointer(f"{tmp_path}/file{below}", Job())
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(NotCommittedError, match="is no checkpoint folder"):
        open_checkpoint(f"{tmp_path}/file{below}")


class Refusing(OsFiles):
    """A disk that takes no changes, as one that is read-only does."""

    def __init__(self, number: int) -> None:
        self._number = number

    def _refuse(self, *_: object, **__: object) -> int:
        raise OSError(self._number, os.strerror(self._number))

    open = rename = make_folder = unlink = remove_folder = _refuse  # pyright: ignore[reportAssignmentType]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("old", [False, True])
def test_a_folder_that_cannot_be_written(tmp_path: Path, number: int, old: bool) -> None:
    """As root no permission stops us, so the refusal is made up."""
    root = tmp_path / "root"
    if old:
        saved_once(root)
    storage = LocalStorage(root, files=Refusing(number))
    with pytest.raises(RootError, match=rf"root.*{os.strerror(number)}"):
        make_checkpointer(storage, Job())
    if old:  # looking at it is still possible, and the lock was not kept
        check_survival(root, 1)


def test_a_disk_that_is_mounted_read_only(tmp_path: Path) -> None:
    """The real thing, where this process may mount."""
    with small_disk(tmp_path / "disk", "size=4m") as disk:
        saved_once(disk / "root")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(RootError, match="Read-only file system"):
            make_checkpointer(disk / "root", Job())
        with pytest.raises(RootError, match="Read-only file system"):
            make_checkpointer(disk / "new", Job())


def wait_briefly(patch: pytest.MonkeyPatch) -> None:
    """A job that is just going down gets 5 s to let go of its root."""
    patch.setattr(lock_module, "Deadline", lambda _: Deadline(0.1))


def test_two_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    wait_briefly(monkeypatch)
    with make_checkpointer(root, Job()):
        owner = f"process {os.getpid()} on host {socket.gethostname()}"
        with pytest.raises(RootLockedError, match=rf"in use by {owner}; stop that job"):
            make_checkpointer(root, Job())
    with make_checkpointer(root, Job()):  # at once when it is free
        pass


def try_it(rank: int, root: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        wait_briefly(patch)
        saved_once(Path(root))


def test_two_jobs_of_two_ranks(tmp_path: Path) -> None:
    """Both ranks of the second job are told."""
    root = tmp_path / "root"
    with make_checkpointer(root, Job()):
        for result in try_ranks(2, try_it, str(root)):
            assert isinstance(result.error, RootError)
            assert f"in use by process {os.getpid()}" in str(result.error)


def dies_with_children(rank: int, root: str, notes: str) -> None:
    """Has forked a data loader's worker, and one that was forked by other means, and is killed."""
    ckpt = make_checkpointer(root, job := Job())
    for _ in range(2):
        if os.fork() == 0:
            os.setsid()
            Path(notes, str(os.getpid())).touch()
            time.sleep(60)
            os._exit(0)
    job.advance()
    ckpt.save(1).wait_committed()
    while len(os.listdir(notes)) < 2:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def test_after_a_kill_the_next_job_gets_in_although_children_live(tmp_path: Path) -> None:
    root, notes = tmp_path / "root", tmp_path / "notes"
    notes.mkdir()
    try_ranks(1, dies_with_children, str(root), str(notes), init_group=False)
    children = [int(name) for name in os.listdir(notes)]
    try:
        assert len(children) == 2
        assert all(Path(f"/proc/{pid}").exists() for pid in children)
        check_survival(root, 1)
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("way", ["exit", "close", "with block", "garbage"])
def test_a_forked_child_that_ends_takes_nothing_with_it(tmp_path: Path, way: str) -> None:
    """Neither the lock nor the saves of its parent."""
    run_ranks(1, forks, str(tmp_path / "root"), way, init_group=False)
    check_survival(tmp_path / "root", 2)


def forks(rank: int, root: str, way: str) -> None:
    job = Job()
    ckpt = make_checkpointer(root, job)
    job.advance()
    ckpt.save(1)
    child = os.fork()
    if child == 0:
        if way == "close":
            ckpt.close()
        elif way == "with block":
            with contextlib.suppress(KeyError), ckpt:
                raise KeyError
        elif way == "garbage":
            del ckpt
        import atexit

        atexit._run_exitfuncs()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    job.advance()
    ckpt.save(2).wait_committed()
    ckpt.close()


def fake_lease(root: Path, **changes: object) -> None:
    owner = {"nonce": "a", "host": "elsewhere", "process": [4711, 1, "boot/1", "elsewhere"]}
    text = json.dumps({**owner, "renewals": 1, "lease_s": 0.6, **changes})
    (root / "new").write_text(text)
    (root / "new").rename(root / "lock.json")


@pytest.mark.usefixtures("short_lease")
def test_a_lease_of_another_host_that_is_renewed(tmp_path: Path) -> None:
    saved_once(tmp_path / "root")
    stop = threading.Event()

    def renew(renewals: int) -> None:
        # For long: the first renewal that is seen ends the wait.
        fake_lease(tmp_path / "root", renewals=renewals, lease_s=60.0)

    def go_on_renewing() -> None:
        for renewals in itertools.count(1):
            if stop.wait(0.05):
                return
            renew(renewals)

    renew(0)
    other = threading.Thread(target=go_on_renewing)
    other.start()
    try:
        with pytest.raises(RootLockedError, match="in use by process 4711 on host elsewhere"):
            make_checkpointer(tmp_path / "root", Job())
    finally:
        stop.set()
        other.join()


@pytest.mark.usefixtures("short_lease")
def test_a_lease_of_another_host_that_is_not_renewed(tmp_path: Path) -> None:
    saved_once(tmp_path / "root")
    fake_lease(tmp_path / "root")
    check_survival(tmp_path / "root", 1)


@pytest.mark.usefixtures("short_lease")
@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"nonce": "a"}', '{"nonce": "a", "lease_s": "x", "process": 1}', "\0"]
)
def test_a_damaged_lease(tmp_path: Path, text: str) -> None:
    saved_once(tmp_path / "root")
    (tmp_path / "root" / "lock.json").write_text(text)
    check_survival(tmp_path / "root", 1)


def test_a_lock_that_was_lost(tmp_path: Path) -> None:
    """Another job took the root while this one could not renew: nothing more is committed."""
    root, job = tmp_path / "root", Job()
    ckpt = make_checkpointer(root, job)
    job.advance()
    ckpt.save(1).wait_committed()
    settle(ckpt)
    fake_lease(root)
    job.advance()
    with pytest.raises(SaveFailedError, match="was taken over by process 4711 on host elsewhere"):
        ckpt.save(2).wait_committed()
    with pytest.raises(SaveFailedError, match="taken over"):
        ckpt.close()
    assert Root(LocalStorage(root)).steps() == [1]
    assert json.loads((root / "lock.json").read_text())["host"] == "elsewhere"  # not ours to remove


def test_a_lock_that_is_lost_between_commit_and_retention(tmp_path: Path) -> None:
    root, job = tmp_path / "root", Job()
    with make_checkpointer(root, job, keep=1) as ckpt:
        job.advance()
        ckpt.save(1).wait_committed()
        job.advance()
        taken = {points.COMMITTED: lambda *_: fake_lease(root)}
        with warnings.catch_warnings(record=True) as caught, armed(callbacks=taken):
            warnings.simplefilter("always")
            ckpt.save(2).wait_committed()
            ckpt.close()
    assert len(caught) == 1
    assert "could not be removed" in str(caught[0].message)
    assert "taken over by process 4711" in str(caught[0].message)
    assert Root(LocalStorage(root)).steps() == [1, 2]


def test_a_constructor_that_fails_keeps_no_lock(tmp_path: Path) -> None:
    root = tmp_path / "root"
    saved_once(root)

    class Broken(LocalStorage):
        def list(self, path: str = "") -> list[str]:
            if path.startswith("step-"):
                raise OSError(errno.EIO, "broken")
            return super().list(path)

    with pytest.raises(RootError, match="broken"):
        make_checkpointer(Broken(root), Job())
    check_survival(root, 1)
