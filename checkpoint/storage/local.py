"""A folder on a file system: data is synced before anything refers to it."""

import contextlib
import os
import secrets
from collections.abc import Callable

from planaria.checkpoint.storage.direct_reads import read_into
from planaria.checkpoint.storage.os_files import OsFiles
from planaria.checkpoint.storage.writing import LocalWriter, ReplacingWriter, write_all
from planaria.core.points import point
from planaria.errors import RootError


class LocalStorage:
    """Checkpoints in a local (or mounted) folder.

    Args:
        path: The folder.
        files: Calls to the operating system.
        direct: Whether data files are written, and read where they are not in the page cache, past
            it (O_DIRECT), as far as the file system knows how.
    """

    def __init__(
        self, path: str | os.PathLike[str], files: OsFiles | None = None, *, direct: bool = True
    ) -> None:
        self.local: str | None = os.path.abspath(os.fspath(path))
        self.url = self.local
        self._files, self._direct = files or OsFiles(), direct

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
        return read_into(self._at(path), start, buffer, direct=self._direct)

    def create(self, path: str) -> LocalWriter:
        """See `Storage.create`."""
        return LocalWriter(self._files, self._at(path), direct=self._direct)

    def replace(self, path: str, check: Callable[[str], object]) -> LocalWriter:
        """See `ReplacesFiles.replace`."""
        new = f"{path}.tmp-{secrets.token_hex(4)}"
        return ReplacingWriter(
            self._files, self._at(new), self._at(path), lambda: check(new), direct=self._direct
        )

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
                write_all(self._files, fd, [memoryview(data)], 0)
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
        if not self.list(path):
            with contextlib.suppress(FileNotFoundError):
                self._files.remove_folder(self._at(path))

    def _at(self, path: str) -> str:
        assert self.local is not None
        return os.path.join(self.local, path) if path else self.local
