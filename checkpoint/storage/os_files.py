"""The calls to the operating system that durability rests on.

They stand in one place, so that tests can record them, drop them, cut them short or make them fail.
"""

import fcntl
import os
from collections.abc import Sequence


class OsFiles:
    """One call each."""

    def open(self, path: str, *, direct: bool = False) -> int:
        """Opens a new file for writing.

        Args:
            path: Where.
            direct: Whether writes go past the page cache (O_DIRECT).

        Raises:
            OSError: It cannot be made, or the file system knows no direct writes.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        return os.open(path, flags | (os.O_DIRECT if direct else 0), 0o644)

    def end_direct(self, fd: int) -> None:
        """From now on writes to a file opened as direct go through the page cache."""
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)

    def write(self, fd: int, parts: Sequence[memoryview], at: int) -> int:
        """Writes byte strings one after the other from byte `at` on.

        Returns:
            How many bytes were taken, which may be fewer than were given.
        """
        return os.pwritev(fd, parts, at)

    def fsync(self, fd: int) -> None:
        """Makes a file's bytes durable."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """Closes a file."""
        os.close(fd)

    def rename(self, old: str, new: str) -> None:
        """Puts a file in the place of another, atomically."""
        os.replace(old, new)

    def make_folder(self, path: str) -> None:
        """Makes a folder, harmless if it exists."""
        try:
            os.mkdir(path)
        except FileExistsError:
            if not os.path.isdir(path):
                raise

    def sync_folder(self, path: str) -> None:
        """Makes the names in a folder durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def unlink(self, path: str) -> None:
        """Removes a file."""
        os.unlink(path)

    def remove_folder(self, path: str) -> None:
        """Removes an empty folder."""
        os.rmdir(path)
