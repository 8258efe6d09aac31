"""One piece of shared memory, from which a node's images and parities are cut.

It is an anonymous file (memfd) of the budget's length, whose pages come into being when they are
first written and stay for the next image. The snapshot process owns it; ranks get its descriptor
over a Unix socket and map the same pages. It has no name, so nothing of it can be left behind: it
goes with the last process that holds it. Its length is sealed: nobody who maps it can be made to
read past its end.

Where the system can, it is made of huge pages, and mapped where these fit: then neither the copies
of a capture nor a restart stop at each of its small pages to look it up.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import fcntl
import mmap
import os
import threading
from functools import cache

import numpy as np
from numpy.typing import NDArray

from planaria.checkpoint.memory.memory import Span, aligned
from planaria.errors import ConfigError, MemoryBudgetError

#: Memory is brought into being in pieces that are multiples of it, where it can be.
HUGE_PAGE = 2 << 20
# Linux 5.14 and 6.1; the mmap module has no names for them.
_MADV_POPULATE_WRITE = 23
_MADV_COLLAPSE = 25
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Mapping:
    """A mapped arena, without the right to cut it.

    Args:
        fd: Its descriptor; the mapping takes it over.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.nbytes = os.fstat(fd).st_size
        self._map, self._bytes = _map_aligned(fd, self.nbytes)
        self._collapses = True

    def view(self, span: Span) -> NDArray[np.uint8]:
        """The span's bytes: uint8, writable, of length ``span.nbytes``.

        Raises:
            ConfigError: It does not lie in this memory.
        """
        if not 0 <= span.offset <= span.offset + span.nbytes <= self.nbytes:
            raise ConfigError(f"{span} does not lie in a memory of {self.nbytes} bytes")
        return self._bytes[span.offset : span.offset + span.nbytes]

    def populate(self, offset: int, nbytes: int) -> bool:
        """Brings pages into being as if they were written to; what they hold stays.

        Args:
            offset: First byte, a multiple of 4096.
            nbytes: How many.

        Returns:
            Whether the system could do it.
        """
        first = -(-offset // HUGE_PAGE) * HUGE_PAGE
        stop = (offset + nbytes) // HUGE_PAGE * HUGE_PAGE
        if first < stop:
            self._collapse(first, stop)
        return not self._advise(_MADV_POPULATE_WRITE, offset, nbytes)

    def _collapse(self, first: int, stop: int) -> None:
        """Makes huge pages, if the system can; what they hold stays."""
        if not self._collapses:
            return
        for at in range(first, stop, HUGE_PAGE):  # what is all empty is not made one
            self._advise(_MADV_POPULATE_WRITE, at, 4096)
        # Where memory is in too many pieces, or is busy, small pages do.
        self._collapses = self._advise(_MADV_COLLAPSE, first, stop - first) != errno.EINVAL

    def _advise(self, advice: int, offset: int, nbytes: int) -> int:
        """Calls madvise without holding up other threads; returns the error's number, or 0."""
        where = ctypes.c_void_p(self._bytes.ctypes.data + offset)
        failed = _libc().madvise(where, ctypes.c_size_t(nbytes), ctypes.c_int(advice))
        return ctypes.get_errno() if failed else 0

    def close(self) -> None:
        """Gives the descriptor back; the memory itself goes with the last view of it."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Arena(Mapping):
    """Memory of a budget, and what of it is free. Thread-safe.

    Args:
        nbytes: The budget; rounded up to whole pages.

    Raises:
        ConfigError: The system has no such memory.
    """

    def __init__(self, nbytes: int) -> None:
        if nbytes < 1:
            raise ConfigError(f"a memory of {nbytes} bytes: give at least one page (4096)")
        try:
            fd = os.memfd_create("planaria", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise ConfigError(f"no shared memory to be had: {error}") from error
        try:
            os.ftruncate(fd, aligned(nbytes))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            super().__init__(fd)
        except (OSError, ValueError) as error:
            os.close(fd)
            raise ConfigError(
                f"no shared memory of {nbytes} bytes to be had: {error}; give a smaller budget"
            ) from error
        # Free runs as (offset, length), by offset, no two of them adjacent.
        self._free: list[tuple[int, int]] = [(0, self.nbytes)]
        self._taken: dict[int, int] = {}
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes of the spans that are out."""
        with self._lock:
            return sum(self._taken.values())

    def allocate(self, nbytes: int) -> Span:
        """Takes a span out; what it holds is left from earlier.

        The smallest run that will do is used: sizes recur from snapshot to snapshot, so memory
        that was touched already is used again, and does not break up.

        Raises:
            MemoryBudgetError: There is no room.
        """
        length = aligned(max(1, nbytes))
        with self._lock:
            fits = [(size, start) for start, size in self._free if size >= length]
            if not fits:
                used = sum(self._taken.values())
                raise MemoryBudgetError(
                    f"no room for {nbytes} bytes in the memory of {self.nbytes} bytes, of which "
                    f"{used} are in use: give MemoryTier a larger budget, or save less state"
                )
            size, start = min(fits)
            at = bisect.bisect_left(self._free, (start, size))
            self._free[at : at + 1] = [] if size == length else [(start + length, size - length)]
            self._taken[start] = length
        return Span(start, nbytes)

    def free(self, span: Span) -> None:
        """Gives a span back, once.

        Raises:
            ConfigError: It is not out.
        """
        with self._lock:
            length = self._taken.pop(span.offset, None)
            if length is None:
                raise ConfigError(f"{span} was given back twice")
            start, end = span.offset, span.offset + length
            at = bisect.bisect_left(self._free, (start, 0))
            if at < len(self._free) and self._free[at][0] == end:
                end += self._free.pop(at)[1]
            if at and sum(self._free[at - 1]) == start:
                at -= 1
                start = self._free.pop(at)[0]
            self._free.insert(at, (start, end - start))


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _map_aligned(fd: int, nbytes: int) -> tuple[mmap.mmap, NDArray[np.uint8]]:
    """Maps a file at an address at which its huge pages can be mapped as such.

    Returns:
        What must live as long as the bytes are used, and the bytes.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    room = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=flags, prot=_READ_WRITE)
    whole = np.frombuffer(room, dtype=np.uint8)
    skipped = -whole.ctypes.data % HUGE_PAGE
    call = _libc().mmap
    call.restype = ctypes.c_void_p
    # Into the room, which is unmapped as one when its last view is gone.
    found = call(
        ctypes.c_void_p(whole.ctypes.data + skipped), ctypes.c_size_t(nbytes),
        ctypes.c_int(_READ_WRITE), ctypes.c_int(mmap.MAP_SHARED | _MAP_FIXED), ctypes.c_int(fd),
        ctypes.c_long(0),
    )  # fmt: skip
    if found != whole.ctypes.data + skipped:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return room, whole[skipped : skipped + nbytes]
