"""A power cut at any moment: what was committed is still there, bit for bit.

Jobs run on a recording disk. For each prefix of the recording, and for many fates of what was not
synced by then, the disk is built anew and restored from. Each save has a tag, counted up over all
jobs of a test: what comes back must be exactly what was saved under its tag, and no older than the
last commit.
"""

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_model import Disk, Fate, Op, RecordingFiles, read_log, write_tree
from fault_job import Job, differences, make_checkpointer, restored
from ranks import run_ranks

from planaria.checkpoint import Checkpointer, points
from planaria.checkpoint.storage.local import LocalStorage
from planaria.checkpoint.storage.root import Root
from planaria.checkpoint.storage.writing import LocalWriter, write_all
from planaria.core.points import armed
from planaria.errors import CorruptError, PlanariaError

KEEP = 2


class TaggedJob(Job):
    """A small job that knows the tag of its next save; a part of it changes at every third step."""

    def __init__(self) -> None:
        super().__init__(width=3)
        self.tag = torch.zeros(1, dtype=torch.int64)
        self.cold = torch.arange(300.0)
        self.state = {**self.state, "tag": self.tag, "cold": {"values": self.cold}}

    def advance(self) -> None:
        super().advance()
        if self.progress["done"] % 3 == 0:
            self.cold += 1

    def snapshot(self) -> dict[str, Any]:
        return {**super().snapshot(), "cold": self.cold.clone()}


@dataclass
class Machine:
    """A recording disk and the jobs that ran on it, one after the other.

    Attributes:
        base: Where it lies.
        calls: What jobs call; sabotage goes in here...
        storage: ...or in here.
        options: Of every checkpointer.
        saved: Tag -> state.
    """

    base: Path
    calls: type[RecordingFiles] = RecordingFiles
    storage: type[LocalStorage] = LocalStorage
    options: dict[str, Any] = field(default_factory=dict)
    saved: dict[int, Any] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """The recording."""
        return self.base / "log"

    @property
    def root(self) -> Path:
        """The checkpoint root, in a folder that does not exist at first."""
        return self.base / "disk" / "run" / "root"

    def files(self, **options: Any) -> RecordingFiles:
        """What a job on this machine calls."""
        (self.base / "disk").mkdir(parents=True, exist_ok=True)
        return self.calls(self.log, self.base / "disk", **options)

    def begin(self, files: RecordingFiles | None = None, **options: Any) -> "Run":
        """Starts a job."""
        job, files = TaggedJob(), files or self.files()
        storage = self.storage(self.root, files=files)
        return Run(self, files, job, make_checkpointer(storage, job, **self.options, **options))


@dataclass
class Run:
    """One job on a machine; leaving its block closes it, failed or not."""

    machine: Machine
    files: RecordingFiles
    job: TaggedJob
    ckpt: Checkpointer

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(PlanariaError):  # a frozen disk: what counts is what is on it
            self.ckpt.close()

    def restore(self, step: int | None = None) -> int:
        """Restores; what is newer than a step that is asked for comes back until the next save."""
        report = self.ckpt.restore(step)
        return report.step if report else 0

    def save(self, step: int) -> None:
        """Trains one step and saves it, with the next tag."""
        self.job.advance()
        tag = self.job.tag.fill_(len(self.machine.saved) + 1).item()
        self.machine.saved[int(tag)] = self.job.snapshot()
        committed = {points.COMMITTED: lambda *_: self.files.mark("commit", int(tag))}
        with armed(callbacks=committed):
            self.ckpt.save(step).wait_committed()


def some_jobs(machine: Machine) -> None:
    """Saves with retention, the same step again, a rewind that leaves later steps behind."""
    with machine.begin(keep=KEEP) as run:
        for step in (1, 2, 3, 4):
            run.save(step)
        run.save(4)
    with machine.begin(keep=KEEP) as run:
        assert run.restore(3) == 3
        run.save(4)
        run.save(5)
        assert run.restore(4) == 4
        run.save(6)
    with machine.begin(keep=1) as run:
        assert run.restore() == 6
        run.save(7)


def check(
    machine: Machine,
    fates: Callable[[int], list[Fate]],
    *,
    start: int = 0,
    only_after_commits: bool = False,
) -> int:
    """Cuts the power after each operation of the log.

    Args:
        machine: Whose log.
        fates: Position in the log -> the fates to try there.
        start: Position of the first cut.
        only_after_commits: Cut only where a commit has just returned.

    Returns:
        How many different disks were looked at.
    """
    disk, newest, looked = Disk(), 0, 0
    for position, op in enumerate(read_log(machine.log), start=1):
        disk.apply(op)
        if op["op"] == "mark":
            newest = op["value"]
        commit = op["op"] == "mark" and op["what"] == "commit"
        if position < start or (only_after_commits and not commit):
            continue
        seen = set()
        for fate in fates(position):
            tree = disk.crash(fate)
            key = tuple(sorted(tree.items()))
            if key not in seen:
                seen.add(key)
                _check_disk(machine, tree, newest, f"after operation {position}: {_brief(op)}")
        looked += len(seen)
    assert newest
    return looked


def _brief(op: Op) -> str:
    return " ".join(str(v) for k, v in op.items() if k != "data")


def _check_disk(machine: Machine, tree: dict[str, Any], newest: int, where: str) -> None:
    place = machine.base / "after"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    write_tree(tree, place)
    root = place / machine.root.relative_to(machine.base / "disk")
    tag = 0
    job = TaggedJob()
    try:
        report = restored(root, job)
        if report is not None:
            bad = report.fell_back_from
            assert not bad, f"{where}: a step that was not committed is damaged: {bad}"
            tag = int(job.tag)
            wrong = differences(job.snapshot(), machine.saved[tag])
            assert not wrong, f"{where}: save {tag} came back wrong: {wrong}"
    except CorruptError as error:
        raise AssertionError(f"{where}: a committed step is damaged: {error}") from error
    assert tag >= newest, f"{where}: save {tag} came back, but save {newest} was committed"
    Root(LocalStorage(root)).claim()  # the next job can always begin


def few(position: int) -> list[Fate]:
    """The extremes, and a little chance."""
    return [*Fate.extremes(), *(Fate.random(1000 * position + i) for i in range(4))]


def many(position: int) -> list[Fate]:
    """The extremes, and much chance."""
    return [*Fate.extremes(), *(Fate.random(1000 * position + i) for i in range(200))]


def test_power_cut_at_every_moment(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    some_jobs(machine)
    assert len(machine.saved) == 9
    assert any("abandoned" in op.get("to", "") for op in read_log(machine.log))
    assert check(machine, few) > 300


def test_power_cut_where_steps_refer_to_others(tmp_path: Path) -> None:
    machine = Machine(tmp_path, options={"dedup": True})
    some_jobs(machine)
    root = Root(LocalStorage(machine.root))
    manifests = [root.manifest(f.step) for f in root.folders() if f.state != "referenced"]
    assert any(f.step for m in manifests for f in m.files)
    assert check(machine, lambda _: Fate.extremes()) > 100


@pytest.mark.soak
@pytest.mark.parametrize("dedup", [False, True])
def test_power_cut_at_every_moment_with_many_fates(tmp_path: Path, dedup: bool) -> None:
    machine = Machine(tmp_path, options={"dedup": dedup})
    some_jobs(machine)
    check(machine, many)


def two_lives(base: Path, dies_at: int) -> Machine:
    """A job dies before an operation, its page cache lives on; another job goes on."""
    machine = Machine(base)
    with (
        contextlib.suppress(PlanariaError),
        machine.begin(machine.files(freeze_at=dies_at), keep=1, on_failure="fatal") as run,
    ):
        run.save(1)
        run.save(2)
    with machine.begin(keep=1) as run:
        found = run.restore()
        run.save(found + 1)
        run.save(found + 2)
    return machine


@pytest.mark.filterwarnings("ignore:old checkpoints could not be removed")
def test_what_a_dead_job_left_unsynced_is_not_relied_on(tmp_path: Path) -> None:
    """A name that is there may be there in the page cache alone."""
    length = len(read_log(two_lives(tmp_path / "whole", 10**6).log))
    for dies_at in range(length // 2):
        machine = two_lives(tmp_path / str(dies_at), dies_at)
        check(machine, few, start=dies_at, only_after_commits=True)


def saves_on_recording_disk(rank: int, base: str) -> dict[int, Any]:
    machine = Machine(Path(base))
    with machine.begin(keep=KEEP) as run:
        for step in (1, 2, 3, 4):
            run.save(step)
        run.ckpt.close()
    return machine.saved


def test_power_cut_while_two_ranks_save(tmp_path: Path) -> None:
    """Rank 0 must not commit before the other rank's file is durable."""
    saved = run_ranks(2, saves_on_recording_disk, str(tmp_path))
    machine = Machine(tmp_path, saved=saved[0])
    files = {op["path"] for op in read_log(machine.log) if op["op"] == "fsync"}
    assert any("rank-00001" in path for path in files)
    assert check(machine, few) > 150


class NoFsync(RecordingFiles):
    """Sabotage: bytes are never made durable."""

    def fsync(self, fd: int) -> None:
        pass


class NoFolderSync(RecordingFiles):
    """Sabotage: names are never made durable."""

    def sync_folder(self, path: str) -> None:
        pass


class ManifestFirst(LocalStorage):
    """Sabotage: data reaches the disk only after the manifest that refers to it."""

    def create(self, path: str) -> LocalWriter:
        self._late = LateWriter(self._files, self._at(path))
        return self._late

    def put(self, path: str, data: bytes, **options: Any) -> None:
        super().put(path, data, **options)
        if path.endswith("manifest.json"):
            self._late.write_now()


class LateWriter(LocalWriter):
    """Keeps what it is given until it is told."""

    def __init__(self, files: Any, path: str) -> None:
        super().__init__(files, path)
        self._kept, self._header = b"", b""

    def write(self, *parts: memoryview | bytes) -> None:
        self._kept += b"".join(parts)

    def fill(self, data: bytes) -> None:
        self._header = data

    def finish(self) -> None:
        pass

    def write_now(self) -> None:
        super().write(self._kept)
        super().fill(self._header)
        super().finish()


class InPlace(LocalStorage):
    """Sabotage: small files are overwritten where they are."""

    def put(self, path: str, data: bytes, **options: Any) -> None:
        fd = self._files.open(self._at(path))
        write_all(self._files, fd, [memoryview(data)], 0)
        self._files.fsync(fd)
        self._files.close(fd)
        self._files.sync_folder(str(Path(self._at(path)).parent))


@pytest.mark.filterwarnings("ignore:step . cannot be restored")
@pytest.mark.parametrize("sabotage", [NoFsync, NoFolderSync, ManifestFirst, InPlace])
def test_sabotage_is_noticed(
    tmp_path: Path, sabotage: type[RecordingFiles] | type[LocalStorage]
) -> None:
    machine = Machine(tmp_path)
    if issubclass(sabotage, RecordingFiles):
        machine.calls = sabotage
    else:
        machine.storage = sabotage
    some_jobs(machine)
    first = next(i for i, op in enumerate(read_log(machine.log)) if op["op"] == "mark")
    with pytest.raises(AssertionError, match=r"was committed|is damaged|came back wrong"):
        check(machine, few, start=first)
