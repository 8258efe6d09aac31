"""A folder on a file system: data is synced before anything refers to it."""

import contextlib
import os
import secrets
from typing import Any

from planaria.core.points import point
from planaria.errors import RootError


class OsFiles:
    """The calls to the operating system that durability rests on.

    They stand in one place, so that tests can record them, drop them or make them fail.
    """

    def open(self, path: str) -> int:
        """Opens a new file for writing."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def write(self, fd: int, data: Any) -> None:
        """Writes all of it, however often the system stops short."""
        view = memoryview(data).cast("B")
        while view:
            view = view[os.write(fd, view) :]

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


class LocalStorage:
    """Checkpoints in a local (or mounted) folder.

    Args:
        path: The folder.
        files: Calls to the operating system.
    """

    def __init__(self, path: str | os.PathLike[str], files: OsFiles | None = None) -> None:
        self.local: str | None = os.path.abspath(os.fspath(path))
        self.url = self.local
        self._files = files or OsFiles()

    def list(self, path: str = "") -> list[str]:
        """See `Storage.list`."""
        try:
            return sorted(os.listdir(self._at(path)))
        except FileNotFoundError:
            return []
        except NotADirectoryError as error:
            raise RootError(
                f"{self._at(path)} is a file, or lies below one; give a folder"
            ) from error

    def size(self, path: str) -> int | None:
        """See `Storage.size`."""
        try:
            return os.stat(self._at(path)).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, path: str) -> bytes:
        """See `Storage.read`."""
        with open(self._at(path), "rb") as file:
            return file.read()

    def read_into(self, path: str, start: int, buffer: memoryview) -> int:
        """See `Storage.read_into`."""
        done, fd = 0, os.open(self._at(path), os.O_RDONLY | os.O_CLOEXEC)
        try:
            while done < len(buffer):
                count = os.preadv(fd, [buffer[done:]], start + done)
                if count == 0:
                    break
                done += count
            return done
        finally:
            os.close(fd)

    def create(self, path: str) -> "LocalWriter":
        """See `Storage.create`."""
        return LocalWriter(self._files, self._at(path))

    def put(
        self,
        path: str,
        data: bytes,
        *,
        points: tuple[str, str] | None = None,
        step: int | None = None,
    ) -> None:
        """See `Storage.put`."""
        final = self._at(path)
        temporary = f"{final}.tmp-{secrets.token_hex(4)}"
        try:
            fd = self._files.open(temporary)
            try:
                self._files.write(fd, data)
                self._files.fsync(fd)
            finally:
                self._files.close(fd)
            if points:
                point(points[0], step=step)
            self._files.rename(temporary, final)
        except BaseException:
            with contextlib.suppress(OSError):
                self._files.unlink(temporary)
            raise
        if points:
            point(points[1], step=step)
        self._files.sync_folder(os.path.dirname(final))

    def make_folder(self, path: str) -> None:
        """See `Storage.make_folder`."""
        target = self._at(path)
        new = []
        while not os.path.isdir(target):
            # Looked at again: another rank may have made it since.
            if os.path.lexists(target) and not os.path.isdir(target):
                raise RootError(f"{target} is a file; give a folder")
            new.append(target)
            target = os.path.dirname(target)
        for folder in reversed(new):
            self._files.make_folder(folder)
            self._files.sync_folder(os.path.dirname(folder))
        # What is there already may have been made by a process that died before it synced it, or
        # (above the root) by one that never does.
        if path and not new:
            self._files.sync_folder(os.path.dirname(self._at(path)))
        while not path and (above := os.path.dirname(target)) != target:
            with contextlib.suppress(OSError):  # not ours: it may not even be readable
                self._files.sync_folder(above)
            target = above

    def sync_folder(self, path: str) -> None:
        """See `Storage.sync_folder`."""
        self._files.sync_folder(self._at(path))

    def remove(self, path: str) -> None:
        """See `Storage.remove`."""
        with contextlib.suppress(FileNotFoundError):
            self._files.unlink(self._at(path))

    def remove_folder(self, path: str) -> None:
        """See `Storage.remove_folder`."""
        for name in self.list(path):
            self.remove(f"{path}/{name}")
        with contextlib.suppress(FileNotFoundError):
            self._files.remove_folder(self._at(path))

    def _at(self, path: str) -> str:
        assert self.local is not None
        return os.path.join(self.local, path) if path else self.local


class LocalWriter:
    """A data file that is written through `OsFiles`."""

    def __init__(self, files: OsFiles, path: str) -> None:
        self._files, self._path = files, path
        self._fd: int | None = files.open(path)

    def write(self, data: Any) -> None:
        """See `Writer.write`."""
        assert self._fd is not None
        start = os.lseek(self._fd, 0, os.SEEK_CUR)
        try:
            self._files.write(self._fd, data)
        except OSError:
            # A retry must not leave a torn first try in the middle of the file.
            os.lseek(self._fd, start, os.SEEK_SET)
            raise

    def finish(self) -> None:
        """See `Writer.finish`."""
        assert self._fd is not None
        self._files.fsync(self._fd)
        # Given up first: a close that fails has closed it, and the number may be another file's.
        fd, self._fd = self._fd, None
        self._files.close(fd)
        self._files.sync_folder(os.path.dirname(self._path))

    def abort(self) -> None:
        """See `Writer.abort`."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            with contextlib.suppress(OSError):
                self._files.close(fd)
        with contextlib.suppress(OSError):
            self._files.unlink(self._path)
