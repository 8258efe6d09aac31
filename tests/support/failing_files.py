"""Disks for tests: one that syncs nothing, one on which chosen operations fail."""

import os
import threading
from collections.abc import Sequence

from planaria.checkpoint.storage.os_files import OsFiles


class QuickFiles(OsFiles):
    """Syncs nothing: enough wherever the page cache outlives what is done to a job."""

    def fsync(self, fd: int) -> None:
        pass

    def sync_folder(self, path: str) -> None:
        if not os.path.isdir(path):
            raise FileNotFoundError(path)


class FailingFiles(QuickFiles):
    """Fails where it is told to; the lock's renewals, from a thread of their own, are spared.

    Attributes:
        done: Names of the operations since `arm`, in order.
    """

    def __init__(self) -> None:
        self.done: list[str] = []
        self._at, self._times, self._number = 0, 0.0, 0

    def arm(self, at: int = 0, number: int = 0, times: float = float("inf")) -> None:
        """Counts from here on.

        Args:
            at: The first operation to fail, counted from 1; 0 for none.
            number: With which errno.
            times: How many fail, from that one on.
        """
        self.done.clear()
        self._at, self._number, self._times = at, number, times

    def _count(self, name: str) -> None:
        if threading.current_thread().name == "planaria-lock":
            return
        self.done.append(name)
        if self._at and self._at <= len(self.done) < self._at + self._times:
            raise OSError(self._number, os.strerror(self._number))

    def open(self, path: str, *, direct: bool = False) -> int:
        self._count("open")
        return super().open(path, direct=direct)

    def write(self, fd: int, parts: Sequence[memoryview], at: int) -> int:
        try:
            self._count("write")
        except OSError:
            # As a full disk does: a part of it fitted.
            self.end_direct(fd)
            super().write(fd, [parts[0][: len(parts[0]) // 2]], at)
            raise
        return super().write(fd, parts, at)

    def fsync(self, fd: int) -> None:
        self._count("fsync")
        super().fsync(fd)

    def rename(self, old: str, new: str) -> None:
        self._count("rename")
        super().rename(old, new)

    def make_folder(self, path: str) -> None:
        self._count("mkdir")
        super().make_folder(path)

    def sync_folder(self, path: str) -> None:
        self._count("sync")
        super().sync_folder(path)

    def unlink(self, path: str) -> None:
        self._count("unlink")
        super().unlink(path)

    def remove_folder(self, path: str) -> None:
        self._count("rmdir")
        super().remove_folder(path)
