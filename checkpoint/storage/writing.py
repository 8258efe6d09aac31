"""Writing one data file: past the page cache where that is possible.

Direct writes (O_DIRECT) cost the processor next to nothing and leave the page cache to others, but
the file system takes them only in whole blocks, from aligned memory to aligned places. What is
aligned goes that way, the rest (the tail, the header) through the page cache, and a file system
that refuses direct writes gets all of it so. Either way nothing counts before the sync at the end.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Sequence

import numpy as np

from planaria.checkpoint.storage.os_files import OsFiles

#: Block size that every file system with direct writes is content with, in bytes.
BLOCK = 4096
_NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)


class LocalWriter:
    """A data file that is written through `OsFiles`, from front to back.

    Args:
        files: Calls to the operating system.
        path: The file.
        direct: Whether to try direct writes.
    """

    def __init__(self, files: OsFiles, path: str, *, direct: bool = True) -> None:
        self._files, self._path, self._end = files, path, 0
        self._fd: int | None = None
        self._direct = direct
        if direct:
            try:
                self._fd = files.open(path, direct=True)
            except OSError as error:
                if error.errno not in _NO_DIRECT:
                    raise
                self._direct = False
        if self._fd is None:
            self._fd = files.open(path)

    def reserve(self, nbytes: int) -> bool:
        """See `Writer.reserve`."""
        self._end += nbytes
        return True

    def fill(self, data: bytes) -> None:
        """See `Writer.fill`."""
        self._write_plain([memoryview(data)], 0)

    def write(self, *parts: memoryview | bytes) -> None:
        """See `Writer.write`."""
        views = [memoryview(p).cast("B") for p in parts]
        at = self._end
        whole, rest = _split(views, at) if self._direct else ([], views)
        if whole and not self._write_direct(whole, at):
            whole, rest = [], views
        if rest:
            self._write_plain(rest, at + sum(map(len, whole)))
        # Only now: what failed and is tried again goes to the same place.
        self._end = at + sum(map(len, views))

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

    def _write_direct(self, parts: Sequence[memoryview], at: int) -> bool:
        """False if the file system will not have it after all."""
        assert self._fd is not None
        try:
            write_all(self._files, self._fd, parts, at, block=BLOCK)
        except OSError as error:
            if error.errno not in _NO_DIRECT:
                raise
            self._end_direct()
            return False
        return True

    def _write_plain(self, parts: Sequence[memoryview], at: int) -> None:
        assert self._fd is not None
        if self._direct:
            self._end_direct()
        write_all(self._files, self._fd, parts, at)

    def _end_direct(self) -> None:
        # There is no way back: what follows in a file is as little aligned as what came before.
        assert self._fd is not None
        self._files.end_direct(self._fd)
        self._direct = False


class ReplacingWriter(LocalWriter):
    """A data file that takes the place of another once it is whole and durable.

    Args:
        files: Calls to the operating system.
        path: Where it is written.
        final: The place that it takes.
        check: Called before it does; what it raises ends it.
        direct: Whether to try direct writes.
    """

    def __init__(
        self,
        files: OsFiles,
        path: str,
        final: str,
        check: Callable[[], object],
        *,
        direct: bool = True,
    ) -> None:
        self._final, self._check_written = final, check
        super().__init__(files, path, direct=direct)

    def finish(self) -> None:
        """See `Writer.finish`."""
        super().finish()
        self._check_written()
        self._files.rename(self._path, self._final)
        self._files.sync_folder(os.path.dirname(self._final))


def write_all(
    files: OsFiles, fd: int, parts: Sequence[memoryview], at: int, *, block: int = 1
) -> None:
    """Writes all of it, however often the system stops short.

    Args:
        files: Calls to the operating system.
        fd: The file.
        parts: Byte strings, which go one after the other.
        at: Place of the first byte.
        block: What place and length of every single write must be multiples of.

    Raises:
        OSError: It could not be written; EINVAL, too, where a disk takes no whole block.
    """
    left = [part for part in parts if part]
    while left:
        taken = files.write(fd, left, at)
        # A direct write that stops within a block has to begin that block again.
        taken -= taken % block
        if taken <= 0:
            raise OSError(errno.EINVAL if block > 1 else errno.EIO, "nothing could be written")
        at += taken
        while left and taken >= len(left[0]):
            taken -= len(left.pop(0))
        if left and taken:
            left[0] = left[0][taken:]


def _split(views: Sequence[memoryview], at: int) -> tuple[list[memoryview], list[memoryview]]:
    """What direct writes can take from byte `at` on, and what is left behind it."""
    whole: list[memoryview] = []
    for i, view in enumerate(views):
        fits = at % BLOCK == 0 and len(view) >= BLOCK and address_of(view) % BLOCK == 0
        cut = len(view) - len(view) % BLOCK if fits else 0
        if cut:
            whole.append(view[:cut])
        if cut < len(view):
            return whole, [view[cut:], *views[i + 1 :]]
        at += cut
    return whole, []


def address_of(view: memoryview) -> int:
    """Where a byte string lies in memory."""
    return np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0]
