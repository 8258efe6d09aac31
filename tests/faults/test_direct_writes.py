"""Data files are the same bytes whatever a disk makes of direct writes."""

import errno
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from checkpoints import must_notice
from hypothesis import given
from hypothesis import strategies as st

from planaria.checkpoint import Checkpointer, open_checkpoint
from planaria.checkpoint.storage import writing
from planaria.checkpoint.storage.local import LocalStorage
from planaria.checkpoint.storage.os_files import OsFiles
from planaria.checkpoint.storage.writing import BLOCK, LocalWriter, write_all


class FickleFiles(OsFiles):
    """Takes a part of what it is given, and refuses direct writes when it is told to.

    Args:
        takes: How many bytes each call takes at most, one after the other; then everything.
        refuses_open: Whether direct writes are refused when a file is opened.
        refuses_after: How many direct writes are taken before they are refused.
    """

    def __init__(
        self, takes: Sequence[int] = (), refuses_open: bool = False, refuses_after: int = 1 << 30
    ) -> None:
        self.takes, self._refuses_open = list(takes), refuses_open
        self._left, self.direct, self.log = refuses_after, False, list[str]()

    def open(self, path: str, *, direct: bool = False) -> int:
        if direct and self._refuses_open:
            raise OSError(errno.EINVAL, "no direct writes here")
        self.direct = direct
        return super().open(path, direct=False)  # the rules are kept by `write`

    def end_direct(self, fd: int) -> None:
        self.direct = False

    def write(self, fd: int, parts: Sequence[memoryview], at: int) -> int:
        self.log.append("direct" if self.direct else "plain")
        if self.direct:
            misplaced = at % BLOCK or any(len(p) % BLOCK or writing.address_of(p) % BLOCK
                                          for p in parts)  # fmt: skip
            self._left -= 1
            if misplaced or self._left < 0:
                raise OSError(errno.EINVAL, "not like this")
        room = self.takes.pop(0) if self.takes else 1 << 30
        taken = 0
        for part in parts:
            now = part[: room - taken]
            taken += os.pwrite(fd, now, at + taken) if now else 0
        return taken


def aligned(nbytes: int, seed: int) -> memoryview:
    """Random bytes in memory that begins at a page."""
    memory = mmap.mmap(-1, max(nbytes, 1))
    torch.frombuffer(memory, dtype=torch.uint8).random_(
        generator=torch.Generator().manual_seed(seed)
    )
    return memoryview(memory)[:nbytes]


SIZES = st.one_of(
    st.sampled_from([BLOCK, 4 * BLOCK, 16 * BLOCK]), st.integers(min_value=0, max_value=5 * BLOCK)
)


@given(
    parts=st.lists(st.tuples(SIZES, st.sampled_from([0, 0, 0, 64, 512])), max_size=6),
    takes=st.lists(st.integers(min_value=1, max_value=6 * BLOCK), max_size=6),
    groups=st.integers(min_value=1, max_value=3),
    header=st.sampled_from([0, BLOCK, 2 * BLOCK]),
    refuses_open=st.booleans(),
    refuses_after=st.sampled_from([0, 1, 2, 1 << 30]),
)
def test_any_bytes_over_any_disk(
    parts: list[tuple[int, int]],
    takes: list[int],
    groups: int,
    header: int,
    refuses_open: bool,
    refuses_after: int,
) -> None:
    views = [aligned(n + off, i)[off:] for i, (n, off) in enumerate(parts)]
    files = FickleFiles(takes, refuses_open, refuses_after)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/file"
        writer = LocalWriter(files, path)
        assert writer.reserve(header)
        for i in range(0, len(views), groups):
            writer.write(*views[i : i + groups])
        if header:
            writer.fill(b"h" * header)
        writer.finish()
        assert Path(path).read_bytes() == b"h" * header + b"".join(views)


def test_whole_blocks_go_past_the_page_cache(tmp_path: Path) -> None:
    files = FickleFiles()
    writer = LocalWriter(files, str(tmp_path / "file"))
    writer.reserve(BLOCK)
    writer.write(aligned(4 * BLOCK, 0), aligned(2 * BLOCK + 8, 1))
    writer.fill(bytes(BLOCK))
    writer.finish()
    assert files.log == ["direct", "plain", "plain"]  # two whole parts, the tail, the header


def test_an_error_is_no_refusal(tmp_path: Path) -> None:
    """A full disk must not look like a file system without direct writes."""

    class Full(OsFiles):
        def write(self, fd: int, parts: Sequence[memoryview], at: int) -> int:
            raise OSError(errno.ENOSPC, "full")

    writer = LocalWriter(Full(), str(tmp_path / "file"))
    with pytest.raises(OSError, match="full"):
        writer.write(aligned(BLOCK, 0))
    writer.abort()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_takes_nothing_is_an_error(tmp_path: Path) -> None:
    files = FickleFiles([0] * 10)
    fd = files.open(str(tmp_path / "file"))
    with pytest.raises(OSError, match="nothing could be written"):
        write_all(files, fd, [memoryview(b"data")], 0)
    os.close(fd)


def check_same_bytes(tmp_path: Path) -> None:
    """A whole save, once past the page cache and once through it, gives one and the same file."""
    torch.manual_seed(0)
    state = {"a": torch.randn(3 << 20), "b": torch.randn(1001), "c": torch.tensor(3)}
    found = []
    for direct, takes in ((True, [(1 << 20) + 100, 3 * BLOCK + 17, 2 << 20]), (False, [])):
        root = tmp_path / str(direct)
        files = FickleFiles()
        storage = LocalStorage(root, files, direct=direct)
        with Checkpointer(storage, {"x": state}, audit=True) as ckpt:
            files.takes = takes  # from the data files on
            ckpt.save(1).wait_committed()
        assert open_checkpoint(root).verify() == []
        assert not files.takes
        (file,) = root.glob("step-*/*.safetensors")
        found.append(file.read_bytes())
    assert found[0] == found[1]


def test_a_save_is_the_same_bytes_either_way(tmp_path: Path) -> None:
    check_same_bytes(tmp_path)


def test_sabotage_a_short_write_that_goes_on_inside_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting what was taken, and not what was asked for, is what the above rests on."""

    def careless(
        files: OsFiles, fd: int, parts: Sequence[memoryview], at: int, *, block: int = 1
    ) -> None:
        files.write(fd, parts, at)

    monkeypatch.setattr(writing, "write_all", careless)
    must_notice(check_same_bytes, tmp_path)
