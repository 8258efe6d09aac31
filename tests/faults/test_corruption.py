"""Damage of every kind at every place: verify names it, restore refuses it and changes nothing."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from fault_job import Job, differences, make_checkpointer, own_random, reference, restored
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from planaria.checkpoint import open_checkpoint
from planaria.checkpoint.capture.audit import Audit
from planaria.checkpoint.capture.checked import CheckedCopy
from planaria.checkpoint.format import checksum
from planaria.checkpoint.format.manifest import FileInfo
from planaria.checkpoint.storage.root import step_folder
from planaria.errors import CorruptError, NotCommittedError, RootError, StorageError

pytestmark = pytest.mark.filterwarnings("ignore:step . cannot be restored")

WIDTH = 8
OLD, NEW = 1, 2
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Damage:
    """One way to damage a file of the newest step.

    Attributes:
        file: Which one, by position in the sorted names; the manifest is the first.
        kind: What is done to it.
        place: Where, as a share of its length.
        amount: How much: a bit, or a number of bytes.
    """

    file: int
    kind: str
    place: float = 0.5
    amount: int = 1

    def apply(self, file: Path) -> None:
        """Carries it out; always changes something."""
        data = bytearray(file.read_bytes())
        at = min(int(self.place * len(data)), len(data) - 1)
        if self.kind == "flip":
            data[at] ^= 1 << (self.amount % 8)
        elif self.kind == "garbage":
            for i in range(at, min(at + self.amount, len(data))):
                data[i] ^= 0xFF
        elif self.kind == "cut":
            del data[at:]
        elif self.kind == "grow":
            data += bytes(self.amount)
        elif self.kind == "hole":
            del data[at : at + self.amount]
        elif self.kind == "empty":
            data.clear()
        if self.kind == "missing":
            file.unlink()
        else:
            file.write_bytes(data)


KINDS = ("flip", "garbage", "cut", "grow", "hole", "empty", "missing")
damages = st.builds(
    Damage,
    st.integers(0, 2),
    st.sampled_from(KINDS),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 300),
)


def saves_two_steps(rank: int, path: str) -> None:
    job = Job(WIDTH)
    with make_checkpointer(path, job) as ckpt:
        for step in (OLD, NEW):
            job.advance()
            ckpt.save(step).wait_committed()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with two steps, each in two data files."""
    root = tmp_path_factory.mktemp("sound") / "root"
    run_ranks(2, saves_two_steps, str(root))
    assert len(list((root / step_folder(NEW)).iterdir())) == 3
    return root


def files(root: Path) -> list[Path]:
    return sorted((root / step_folder(NEW)).iterdir())


def check_damage(sound: Path, damage: Damage) -> None:
    with tempfile.TemporaryDirectory() as folder, own_random():
        root = Path(folder, "root")
        shutil.copytree(sound, root)
        file = files(root)[damage.file]
        before = file.read_bytes()
        manifest = open_checkpoint(root, NEW).manifest
        damage.apply(file)
        after = file.read_bytes() if file.exists() else None
        if file.name == MANIFEST:
            harmless = check_manifest(root, after)
        else:
            info = next(f for f in manifest.files if f.name == file.name)
            first_wrong = _first_difference(before, after)
            harmless = check_data_file(root, file.name, info, first_wrong)
        check_restore(root, file.name, harmless, gone=file.name == MANIFEST and after is None)


def check_manifest(root: Path, after: bytes | None) -> bool:
    if after is None:
        with pytest.raises(NotCommittedError, match=r"no committed step 2; committed: 1"):
            open_checkpoint(root, NEW)
    else:
        with pytest.raises(CorruptError, match=r"step-00000002/manifest\.json"):
            open_checkpoint(root, NEW)
    return False


def check_data_file(root: Path, name: str, info: FileInfo, first_wrong: int | None) -> bool:
    """Verify names the file, and the chunk if it is one; says whether no tensor is touched."""
    problems = open_checkpoint(root, NEW).verify()
    assert problems
    assert {p.file for p in problems} == {name}
    assert all(name in str(p) for p in problems)
    if first_wrong is None:  # it is gone
        assert problems[0].tensors
        return False
    chunks = [p for p in problems if p.chunk is not None]
    if first_wrong >= info.nbytes:  # it only grew
        assert [p.what.startswith("has ") for p in problems] == [True]
        return True
    if first_wrong < info.data_start:
        assert any("header is damaged" in p.what for p in problems)
        return not chunks
    assert chunks
    assert chunks[0].chunk == (first_wrong - info.data_start) // info.chunk_nbytes
    assert all(p.tensors for p in chunks)
    return False


def _first_difference(before: bytes, after: bytes | None) -> int | None:
    if after is None:
        return None
    common = min(len(before), len(after))
    return next((i for i in range(common) if before[i] != after[i]), common)


def check_restore(root: Path, name: str, harmless: bool, gone: bool) -> None:
    """The step itself: whole, or refused with nothing changed; the newest: whole, or the older."""
    job = Job(WIDTH)
    for _ in range(4):
        job.advance()
    before = job.snapshot()
    if not harmless:
        with pytest.raises(NotCommittedError if gone else CorruptError) as info:
            restored(root, job, NEW)
        assert "\n" not in str(info.value)
        assert gone or name in str(info.value)
        assert not differences(job.snapshot(), before), "the live state was changed"
    report = restored(root, job)
    assert report is not None
    assert report.step == (NEW if harmless else OLD)
    assert not differences(job.snapshot(), reference(report.step, WIDTH))
    fallen = [] if harmless or gone else [NEW]
    assert [step for step, _ in report.fell_back_from] == fallen
    assert all(name in reason for _, reason in report.fell_back_from)


@given(damage=damages)
@example(Damage(0, "missing"))
@example(Damage(0, "flip", 0.0))
@example(Damage(1, "flip", 0.0))
@example(Damage(1, "flip", 0.9999))
@example(Damage(2, "missing"))
@example(Damage(2, "grow"))
@settings(max_examples=150)
def test_damage_anywhere(sound: Path, damage: Damage) -> None:
    check_damage(sound, damage)


@pytest.mark.soak
@pytest.mark.parametrize("file", range(3))
def test_flips_from_end_to_end(sound: Path, file: int) -> None:
    length = files(sound)[file].stat().st_size
    for at in range(0, length, 1 if file else 5):  # of the manifest, of which all is hashed, fewer
        check_damage(sound, Damage(file, "flip", at / length, at % 8))


@given(st.lists(damages, min_size=2, max_size=4, unique_by=lambda d: d.file))
@settings(max_examples=30)
def test_several_damages(sound: Path, several: list[Damage]) -> None:
    """The first that is met is named; the restore is exact or falls back."""
    with tempfile.TemporaryDirectory() as folder, own_random():
        root = Path(folder, "root")
        shutil.copytree(sound, root)
        for file, damage in zip(files(root), sorted(several, key=lambda d: d.file), strict=False):
            damage.apply(file)
        job = Job(WIDTH)
        report = restored(root, job)
        assert report is not None
        assert not differences(job.snapshot(), reference(report.step, WIDTH))


@pytest.mark.parametrize("number", range(3))
def test_what_cannot_be_read_is_no_reason_to_fall_back(
    sound: Path, tmp_path: Path, number: int
) -> None:
    """It may be whole, as where a network mount fails for a while."""
    root = tmp_path / "root"
    shutil.copytree(sound, root)
    file = files(root)[number]
    file.unlink()
    file.mkdir()
    with own_random():
        job = Job(WIDTH)
        before = job.snapshot()
        for step in (NEW, None):
            with pytest.raises(StorageError, match=f"{file.name}.*Is a directory") as info:
                restored(root, job, step)
            assert not isinstance(info.value, CorruptError)
        assert not differences(job.snapshot(), before)


@pytest.mark.parametrize("swap", [MANIFEST, "data"])
def test_files_of_another_step_or_rank(sound: Path, tmp_path: Path, swap: str) -> None:
    """Whole files, but not where they belong."""
    root = tmp_path / "root"
    shutil.copytree(sound, root)
    if swap == MANIFEST:
        old = root / step_folder(OLD) / MANIFEST
        shutil.copy(old, root / step_folder(NEW) / MANIFEST)
        says = r"step-00000002/manifest.json is the manifest of step 1"
    else:
        _, one, other = files(root)
        one.rename(root / "aside")
        other.rename(one)
        (root / "aside").rename(other)
        says = r"rank-0000\d-\w+.safetensors"
    with own_random():
        job = Job(WIDTH)
        with pytest.raises(CorruptError, match=says):
            restored(root, job, NEW)
        report = restored(root, job)
        assert report is not None
        assert report.step == OLD
        assert not differences(job.snapshot(), reference(OLD, WIDTH))


def test_all_steps_damaged(sound: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(sound, root)
    for folder in root.glob("step-*"):
        for file in folder.glob("*.safetensors"):
            Damage(0, "flip", 0.9).apply(file)
    with own_random():
        job = Job(WIDTH)
        with make_checkpointer(root, job) as ckpt:
            before = job.snapshot()
            with pytest.raises(CorruptError, match=r"no committed step of .* step 2: .*; step 1: "):
                ckpt.restore()
            assert not differences(job.snapshot(), before)


def test_run_goes_on_after_falling_back(sound: Path, tmp_path: Path) -> None:
    """Steps after the one that could be read are of a past that is left."""
    root = tmp_path / "root"
    shutil.copytree(sound, root)
    Damage(1, "flip", 0.95).apply(files(root)[1])
    with own_random():
        job = Job(WIDTH)
        with make_checkpointer(root, job) as ckpt:
            with pytest.warns(UserWarning, match="step 2 cannot be restored, an older one"):
                report = ckpt.restore()
            assert report is not None
            assert [step for step, _ in report.fell_back_from] == [NEW]
            job.advance()
            ckpt.save(NEW).wait_committed()
        assert open_checkpoint(root, NEW).verify() == []
        again = Job(WIDTH)
        report = restored(root, again)
        assert report is not None
        assert report.step == NEW
        assert not report.fell_back_from
        assert not differences(again.snapshot(), reference(NEW, WIDTH))


@pytest.mark.parametrize("text", ["", "{", '{"kind": 1}', "\0" * 40, "[]"])
def test_damaged_marker(sound: Path, tmp_path: Path, text: str) -> None:
    root = tmp_path / "root"
    shutil.copytree(sound, root)
    (root / "planaria.json").write_text(text)
    with pytest.raises(RootError, match=r"planaria\.json is not the mark of a checkpoint folder"):
        make_checkpointer(root, Job(WIDTH))
    assert open_checkpoint(root, NEW).verify() == []


def test_sabotage_checksum_off_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checksum._ALGORITHMS, "crc32c", lambda data: 0)
    monkeypatch.setattr(CheckedCopy, "available", staticmethod(lambda: False))  # it has its own
    monkeypatch.setattr(Audit, "check", lambda self: None)  # it compares checksums, too
    root = tmp_path / "root"
    with own_random():
        saves_two_steps(0, str(root))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_damage(root, Damage(1, "flip", 0.9))
