"""The model of a disk after a power cut: what is certain in it, and what is not."""

import base64
import contextlib
import tempfile
from pathlib import Path

from disk_model import Disk, Fate, Op, RecordingFiles, read_log, write_tree
from hypothesis import example, given
from hypothesis import strategies as st

NOTHING, EVERYTHING, NAMES, ZEROS = Fate.extremes()


def op(kind: str, path: str, **more: object) -> Op:
    return {"op": kind, "path": path, **more}


def write(path: str, text: str, at: int = 0) -> Op:
    return op("write", path, at=at, data=base64.b64encode(text.encode()).decode())


def after(fate: Fate, *ops: Op) -> dict[str, bytes | None]:
    disk = Disk()
    for each in ops:
        disk.apply(each)
    return disk.crash(fate)


def test_what_was_not_synced_may_be_lost() -> None:
    ops = [op("mkdir", "a"), op("open", "a/f"), write("a/f", "data")]
    assert after(NOTHING, *ops) == {}
    assert after(EVERYTHING, *ops) == {"a": None, "a/f": b"data"}
    assert after(NAMES, *ops) == {"a": None, "a/f": b""}
    assert after(ZEROS, *ops) == {"a": None, "a/f": b"\0\0\0\0"}


def test_bytes_and_names_are_synced_apart() -> None:
    made = [op("mkdir", "a"), op("open", "a/f"), write("a/f", "data"), op("fsync", "a/f")]
    assert after(NOTHING, *made, op("sync", "a")) == {}
    assert after(NOTHING, *made, op("sync", ".")) == {"a": None}
    assert after(NAMES, *made) == {"a": None, "a/f": b"data"}
    assert after(NOTHING, *made, op("sync", "a"), op("sync", ".")) == {"a": None, "a/f": b"data"}


def test_a_write_after_the_sync_is_uncertain_again() -> None:
    ops = [op("open", "f"), write("f", "data"), op("fsync", "f"), op("sync", ".")]
    assert after(NOTHING, *ops, write("f", "DA")) == {"f": b"data"}
    assert after(ZEROS, *ops, write("f", "DA")) == {"f": b"\0\0ta"}
    assert after(EVERYTHING, *ops, op("open", "f")) == {"f": b""}
    assert after(NOTHING, *ops, op("open", "f")) == {"f": b"data"}


def test_a_rename_happens_wholly_or_not_at_all() -> None:
    ops = [op("open", "t"), write("t", "new"), op("fsync", "t"), op("sync", ".")]
    ops.append(op("rename", "t", to="f"))
    found = {tuple(after(Fate.random(seed), *ops).items()) for seed in range(50)}
    assert found == {(("t", b"new"),), (("f", b"new"),)}


def test_removals_may_come_in_any_order() -> None:
    ops = [op("open", name) for name in "abc"] + [op("sync", ".")]
    ops += [op("unlink", name) for name in "abc"]
    found = {"".join(sorted(after(Fate.random(seed), *ops))) for seed in range(200)}
    assert found == {"", "a", "b", "c", "ab", "ac", "bc", "abc"}


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "rename", "mkdir", "unlink", "rmdir"]),
        st.sampled_from(["a", "b", "d/a", "d/b", "d/e/a"]),
        st.sampled_from(["a", "b", "c"]),
        st.binary(max_size=20),
    ),
    max_size=25,
)


@given(STEPS)
@example([("write", "a", "a", b""), ("mkdir", "a", "a", b"")])
def test_with_nothing_lost_it_is_the_real_disk(steps: list[tuple[str, str, str, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        base.mkdir()
        files = RecordingFiles(Path(folder, "log"), base)
        for kind, path, other, data in steps:
            with contextlib.suppress(OSError):
                carry_out(files, kind, base / path, other, data)
        disk = Disk()
        for each in read_log(Path(folder, "log")):
            disk.apply(each)
        found = disk.crash(EVERYTHING)
        real = {
            str(p.relative_to(base)): None if p.is_dir() else p.read_bytes()
            for p in base.rglob("*")
        }
        assert found == real
        copy = Path(folder, "copy")
        copy.mkdir()
        write_tree(found, copy)
        assert {str(p.relative_to(copy)) for p in copy.rglob("*")} == set(real)


def carry_out(files: RecordingFiles, kind: str, path: Path, other: str, data: bytes) -> None:
    if kind == "write":
        fd = files.open(str(path))
        try:
            files.write(fd, [memoryview(data)], 0)
            files.write(fd, [memoryview(data[::-1])], len(data))
        finally:
            files.close(fd)
    elif kind == "rename":
        files.rename(str(path), str(path.parent / other))
    elif kind == "mkdir":
        files.make_folder(str(path))
    elif kind == "unlink":
        files.unlink(str(path))
    else:
        files.remove_folder(str(path))
