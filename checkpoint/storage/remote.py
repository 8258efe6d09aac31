"""Object stores and other file systems, through fsspec's interface."""

import contextlib
from typing import Any

import fsspec

from planaria.core.points import point
from planaria.errors import ConfigError, StorageError


class RemoteStorage:
    """Checkpoints under an fsspec URL (``s3://``, ``gs://``, ``memory://``...).

    A file appears there when it is closed, whole; so a small file is put atomically, and there are
    neither folders nor syncs to care for.

    Args:
        url: The folder's URL. Options of the file system come from fsspec's own configuration.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.local: str | None = None
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"cannot open {url!r}: {error}") from error

    def list(self, path: str = "") -> list[str]:
        """See `Storage.list`."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._at(path), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = {str(name).rstrip("/").rpartition("/")[2] for name in found}
        return sorted(names - {""})

    def size(self, path: str) -> int | None:
        """See `Storage.size`."""
        self._fs.invalidate_cache()
        try:
            return int(self._fs.info(self._at(path))["size"])
        except FileNotFoundError:
            return None

    def read(self, path: str) -> bytes:
        """See `Storage.read`."""
        return self._fs.cat_file(self._at(path))

    def read_into(self, path: str, start: int, buffer: memoryview) -> int:
        """See `Storage.read_into`."""
        data = self._fs.cat_file(self._at(path), start=start, end=start + len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def create(self, path: str) -> "RemoteWriter":
        """See `Storage.create`."""
        return RemoteWriter(self._fs, self._at(path))

    def put(
        self,
        path: str,
        data: bytes,
        *,
        points: tuple[str, str] | None = None,
        step: int | None = None,
    ) -> None:
        """See `Storage.put`."""
        if points:
            point(points[0], step=step)
        self._fs.pipe_file(self._at(path), data)
        if points:
            point(points[1], step=step)

    def make_folder(self, path: str) -> None:
        """See `Storage.make_folder`."""
        self._fs.makedirs(self._at(path), exist_ok=True)

    def sync_folder(self, path: str) -> None:
        """Nothing to do: see the class."""

    def remove(self, path: str) -> None:
        """See `Storage.remove`."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(path))

    def remove_folder(self, path: str) -> None:
        """See `Storage.remove_folder`."""
        if not self.list(path):
            with contextlib.suppress(FileNotFoundError):
                self._fs.rmdir(self._at(path))

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root


class RemoteWriter:
    """A data file that is streamed to a remote file system."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path, self._nbytes = fs, path, 0
        self._file = fs.open(path, "wb")

    def reserve(self, nbytes: int) -> bool:
        """See `Writer.reserve`."""
        return False

    def fill(self, data: bytes) -> None:
        """See `Writer.fill`."""
        raise AssertionError("a stream has no room left at its front")

    def write(self, *parts: memoryview | bytes) -> None:
        """See `Writer.write`."""
        for data in parts:
            try:
                count = self._file.write(data)
            except OSError as error:
                # Not to be tried again: some of it may have been taken, and there is no way back.
                raise StorageError(f"{self._path}: {error}") from error
            if count is not None and count != len(data):
                raise StorageError(f"{self._path}: only {count} of {len(data)} bytes were taken")
            self._nbytes += len(data)

    def finish(self) -> None:
        """See `Writer.finish`."""
        self._file.close()
        self._fs.invalidate_cache()
        found = int(self._fs.info(self._path)["size"])
        if found != self._nbytes:
            raise StorageError(f"{self._path}: {self._nbytes} bytes were sent, {found} are there")

    def abort(self) -> None:
        """See `Writer.abort`."""
        # What an unfinished upload leaves differs between stores; only a manifest makes it count.
        with contextlib.suppress(Exception):
            if hasattr(self._file, "discard"):
                self._file.discard()
            self._file.close()
        with contextlib.suppress(Exception):
            self._fs.rm_file(self._path)
