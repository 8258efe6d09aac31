"""What a place for checkpoints must be able to do, and how one is chosen from a path."""

import errno
import os
import time
from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

from planaria.errors import ConfigError, CorruptError, StorageError

#: Seconds to wait before a failed read is tried again, one after the other.
READ_AGAIN_AFTER_S = (0.1, 0.5)


T = TypeVar("T")


class Writer(Protocol):
    """One data file that is being written from front to back."""

    def reserve(self, nbytes: int) -> bool:
        """Leaves room at the front, for `fill`; before anything else.

        Returns:
            False where a file can only be written in order: what goes there comes first.
        """
        ...

    def write(self, *parts: memoryview | bytes) -> None:
        """Appends byte strings; all of them, or OSError and none of them counts."""
        ...

    def fill(self, data: bytes) -> None:
        """Writes what room was left for, after everything else."""
        ...

    def finish(self) -> None:
        """Makes the file durable and closes it."""
        ...

    def abort(self) -> None:
        """Closes it and leaves nothing behind that could be taken for a whole file."""
        ...


@runtime_checkable
class Storage(Protocol):
    """A folder, by whatever means. Paths are relative to it, with forward slashes.

    Attributes:
        url: Where it is, for people.
        local: Path on this machine, None if it is remote.
    """

    url: str
    local: str | None

    def list(self, path: str = "") -> list[str]:
        """Names in a folder; an empty list where there is none."""
        ...

    def size(self, path: str) -> int | None:
        """Length of a file in bytes, None where there is none."""
        ...

    def read(self, path: str) -> bytes:
        """A whole small file.

        Raises:
            FileNotFoundError: There is none.
        """
        ...

    def read_into(self, path: str, start: int, buffer: memoryview) -> int:
        """Fills `buffer` from byte `start` on; returns how much there was."""
        ...

    def create(self, path: str) -> Writer:
        """Opens a new data file; its folder exists."""
        ...

    def put(
        self,
        path: str,
        data: bytes,
        *,
        points: tuple[str, str] | None = None,
        step: int | None = None,
    ) -> None:
        """Writes a small file durably, wholly or not at all, over an older one.

        Args:
            path: Where.
            data: Its bytes.
            points: Fault points to pass when written, and when in place.
            step: The step that these points are told.
        """
        ...

    def make_folder(self, path: str) -> None:
        """Makes a folder, durably; harmless if it exists."""
        ...

    def sync_folder(self, path: str) -> None:
        """Makes the names in a folder durable."""
        ...

    def remove(self, path: str) -> None:
        """Removes a file; harmless if there is none."""
        ...

    def remove_folder(self, path: str) -> None:
        """Removes a folder if it is empty; harmless if it is not, or if there is none."""
        ...


@runtime_checkable
class Mapped(Protocol):
    """A storage whose files lie in memory, at least some of them."""

    def view(self, path: str, start: int, nbytes: int) -> memoryview | None:
        """A part of a file in place; None where it must be read."""
        ...


@runtime_checkable
class PutsIfAbsent(Protocol):
    """A storage that can write a small file only if nobody else has: see `Root.write_manifest`."""

    def put_new(
        self,
        path: str,
        data: bytes,
        *,
        points: tuple[str, str] | None = None,
        step: int | None = None,
    ) -> None:
        """As `Storage.put`, for a file that is not there yet.

        Raises:
            FileExistsError: It is; it was left as it is.
        """
        ...


@runtime_checkable
class ReplacesFiles(Protocol):
    """A storage where a data file that is written anew would be in pieces meanwhile."""

    def replace(self, path: str, check: Callable[[str], object]) -> Writer:
        """As `Storage.create`; until it is finished, the file that is there stays as it is.

        Args:
            path: The file.
            check: Called with the path of the new file once that is durable, before it takes its
                place; what it raises ends it.
        """
        ...


def open_storage(path: "str | os.PathLike[str] | Storage") -> Storage:
    """The storage for a local path or an fsspec URL such as ``s3://bucket/run``.

    Raises:
        ConfigError: It is no path; or the URL's protocol is unknown, or its package not installed.
    """
    if isinstance(path, Storage):
        return path
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigError(f"path {path!r}: give the name of a folder, or an fsspec URL")
    # fsspec's own local file system neither syncs nor puts a file in place atomically.
    text = text.removeprefix("file://").removeprefix("local://")
    if "://" in text:
        from planaria.checkpoint.storage.remote import RemoteStorage

        return RemoteStorage(text)
    from planaria.checkpoint.storage.local import LocalStorage

    return LocalStorage(text)


def reading(what: str, read: Callable[[], T]) -> T:
    """Reads, and tries again where that may help.

    Only what says that the data itself is gone or unreadable counts as damage, for which a restore
    falls back to an older step: a step must not be given up for a moment's trouble.

    Args:
        what: Path, for messages.
        read: Does the reading.

    Raises:
        CorruptError: The file is not there, or the device cannot read it.
        StorageError: It cannot be read for another reason.
    """
    for pause in (*READ_AGAIN_AFTER_S, None):
        try:
            return read()
        except FileNotFoundError as error:
            raise CorruptError(f"{what} is missing") from error
        except OSError as error:
            if pause is not None:
                time.sleep(pause)
            elif error.errno == errno.EIO:
                raise CorruptError(f"{what} cannot be read: {error}") from error
            else:
                raise StorageError(
                    f"{what} cannot be read now: {error}; it may well be whole, so nothing older "
                    "was taken in its place: mend the cause and try again"
                ) from error
    raise AssertionError("unreachable")
