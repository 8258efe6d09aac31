"""Writing a data file to a remote file system: bounded memory, and nothing left of half a file."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

from fsspec.spec import AbstractBufferedFile

from planaria.errors import StorageError

Call = Callable[[str, Callable[[], Any]], Any]


class RemoteWriter:
    """A data file that is streamed to a remote file system, a block at a time.

    Args:
        fs: The file system.
        call: Calls it within a deadline: what is done, for errors, and the call.
        path: The file, as the file system names it.
        block_nbytes: Bytes that are sent at once.
    """

    def __init__(self, fs: Any, call: Call, path: str, block_nbytes: int) -> None:
        self._fs, self._call, self._path, self._nbytes = fs, call, path, 0
        self._file = call(f"create {path}", lambda: fs.open(path, "wb", block_size=block_nbytes))

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
                count = self._call(f"write {self._path}", partial(self._file.write, data))
            except OSError as error:
                # Not to be tried again: some of it may have been taken, and there is no way back.
                raise StorageError(f"{self._path}: {error}") from error
            if count is not None and count != len(data):
                raise StorageError(f"{self._path}: only {count} of {len(data)} bytes were taken")
            self._nbytes += len(data)

    def finish(self) -> None:
        """See `Writer.finish`."""
        self._call(f"finish {self._path}", self._file.close)
        info = self._call(f"look at {self._path}", lambda: self._fs.info(self._path))
        if int(info["size"]) != self._nbytes:
            raise StorageError(
                f"{self._path}: {self._nbytes} bytes were sent, {info['size']} are there"
            )

    def abort(self) -> None:
        """See `Writer.abort`."""
        with contextlib.suppress(Exception):
            self._call(f"abort {self._path}", self._discard)
        with contextlib.suppress(Exception):
            self._call(f"remove {self._path}", lambda: self._fs.rm_file(self._path))

    def _discard(self) -> None:
        if not isinstance(self._file, AbstractBufferedFile):
            self._file.close()
            return
        try:
            self._file.discard()  # on S3, the parts that are there
        finally:
            # Not closed: that would make a whole file of what is half there.
            self._file.closed = True
