"""What the machine can do: copies in memory, aligned writes and reads past the page cache.

Every suite that moves bytes runs these beside the libraries, in the same turns: how far a library
is from the limit is then a ratio of the same minutes.
"""

import contextlib
import ctypes
import mmap
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

#: Bytes in one direct write or read: large enough for a disk's full speed.
BLOCK_NBYTES = 32 << 20
ALIGNMENT = 4096
HUGE_PAGE = 2 << 20


class Memory:
    """Host memory that begins at a page and has been touched, in huge pages where there are any.

    A disk takes a direct request in more pieces, and slower, from pages of 4 KB.

    Args:
        nbytes: Its size; rounded up to whole pages.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = -(-nbytes // ALIGNMENT) * ALIGNMENT
        self._map = mmap.mmap(
            -1, self.nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        with contextlib.suppress(OSError):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        first = -ctypes.addressof(ctypes.c_char.from_buffer(self._map)) % HUGE_PAGE
        self.view = memoryview(self._map)[first : first + self.nbytes]
        self.tensor = torch.frombuffer(self.view, dtype=torch.uint8)
        ctypes.memset(self.tensor.data_ptr(), 1, self.nbytes)


def memcpy(source: Memory, target: Memory) -> None:
    """One plain copy with one thread."""
    ctypes.memmove(target.tensor.data_ptr(), source.tensor.data_ptr(), source.nbytes)


def write_raw(path: Path, memory: Memory, *, threads: int = 1) -> None:
    """Writes aligned memory to a new file past the page cache, and syncs it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        fd = os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError:  # a file system without direct writes
        fd = os.open(path, flags, 0o644)
    try:

        def write(start: int, stop: int) -> None:
            while start < stop:
                start += os.pwrite(fd, memory.view[start:stop], start)

        _in_blocks(write, memory.nbytes, threads)
        os.fsync(fd)
    finally:
        os.close(fd)


def commit_raw(folder: Path, memory: Memory, manifest: bytes) -> None:
    """The same promise as a checkpoint's: data, its folder, a manifest by rename, its folder."""
    folder.mkdir()
    write_raw(folder / "data", memory)
    sync(folder)
    temporary = folder / "manifest.tmp"
    with temporary.open("wb") as file:
        file.write(manifest)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / "manifest")
    sync(folder)


def read_raw(path: Path, memory: Memory, *, threads: int = 2, direct: bool = True) -> None:
    """Reads a file into aligned memory, past the page cache or through it."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        fd = os.open(path, flags | (os.O_DIRECT if direct else 0))
    except OSError:
        fd = os.open(path, flags)
    try:

        def read(start: int, stop: int) -> None:
            while start < stop:
                count = os.preadv(fd, [memory.view[start:stop]], start)
                if count == 0:
                    return
                start += count

        _in_blocks(read, memory.nbytes, threads, block=8 << 20)
    finally:
        os.close(fd)


def _in_blocks(
    work: Callable[[int, int], None], nbytes: int, threads: int, block: int = BLOCK_NBYTES
) -> None:
    blocks = [(start, min(start + block, nbytes)) for start in range(0, nbytes, block)]
    if threads == 1 or len(blocks) == 1:
        for start, stop in blocks:
            work(start, stop)
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, start, stop) for start, stop in blocks]:
            done.result()


def sync(path: Path) -> None:
    """Syncs a file, or a folder with all it holds, to disk."""
    if path.is_dir():
        for entry in path.iterdir():
            sync(entry)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def forget(path: Path) -> None:
    """Drops what the page cache holds of a file, or of a folder's files: the next read is cold."""
    if path.is_dir():
        for entry in path.iterdir():
            forget(entry)
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Removes a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
