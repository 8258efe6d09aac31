"""Reading a part of a local file: from the page cache if it is there, else the faster way.

A checkpoint that is restored is mostly not in the page cache: it was written past it, or on another
machine. Direct reads (O_DIRECT) take less of the processor and push nothing else out; whether they
are faster, too, is found out (`read_choice`). What does not begin or end at a block, and file
systems without direct reads, go through the page cache.
"""

import ctypes
import errno
import mmap
import os
import time

from planaria.checkpoint.storage.read_choice import choice_for
from planaria.checkpoint.storage.writing import BLOCK, address_of

_libc = ctypes.CDLL(None, use_errno=True)
_CACHESTAT = 451  # on all of Linux's platforms but Alpha
_NOT_SO = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


def read_into(path: str, start: int, buffer: memoryview, *, direct: bool) -> int:
    """Fills `buffer` from byte `start` of a file on; returns how much there was.

    Args:
        path: The file.
        start: First byte.
        buffer: Where it goes; direct reads need it to begin at a block.
        direct: Whether to try direct reads.

    Raises:
        OSError: The file cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        if direct and start % BLOCK == 0 and len(buffer) >= BLOCK and _at_block(buffer):
            done = _cached(fd, start, buffer)
            end = len(buffer) - len(buffer) % BLOCK
            if done < end:
                done += _faster(fd, path, start + done, buffer[done:end])
        return done + _plain(fd, start + done, buffer[done:])
    finally:
        os.close(fd)


def _faster(fd: int, path: str, start: int, buffer: memoryview) -> int:
    """Whole blocks, read the way that is faster here; 0 where direct reads are not to be had."""
    choice = choice_for(os.fstat(fd).st_dev)
    direct = choice.next(len(buffer))
    began = time.perf_counter()
    done = _direct(path, start, buffer) if direct else _plain(fd, start, buffer)
    choice.took(direct, done, time.perf_counter() - began)
    return done if direct else done - done % BLOCK


def _at_block(buffer: memoryview) -> bool:
    return address_of(buffer) % BLOCK == 0


def _cached(fd: int, start: int, buffer: memoryview) -> int:
    """Whole blocks that the page cache has, if it has all of them."""
    if not _in_cache(fd, start, len(buffer)):
        return 0
    try:
        count = os.preadv(fd, [buffer], start, os.RWF_NOWAIT)
    except BlockingIOError:
        return 0
    except OSError as error:
        if error.errno not in _NOT_SO:
            raise
        return 0
    return count if count == len(buffer) else count - count % BLOCK


def _in_cache(fd: int, start: int, nbytes: int) -> bool:
    """Whether the page cache has a part of a file.

    Asked without reading: a read that may not wait begins to read ahead what is missing, so that
    the disk would have to deliver everything twice. Kernels before 6.5 do not tell.
    """
    part, found = (ctypes.c_uint64 * 2)(start, nbytes), (ctypes.c_uint64 * 5)()
    if _libc.syscall(_CACHESTAT, fd, ctypes.byref(part), ctypes.byref(found), 0) != 0:
        return False
    return found[0] * mmap.PAGESIZE >= nbytes


def _direct(path: str, start: int, buffer: memoryview) -> int:
    """What a direct read gives; 0 where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno not in _NOT_SO:
            raise
        return 0
    try:
        done = 0
        while done < len(buffer):
            count = os.preadv(fd, [buffer[done:]], start + done)
            done += count - count % BLOCK
            if count % BLOCK or count == 0:  # the file ends here
                break
        return done
    except OSError as error:
        if error.errno not in _NOT_SO:
            raise
        return 0
    finally:
        os.close(fd)


def _plain(fd: int, start: int, buffer: memoryview) -> int:
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], start + done)
        if count == 0:
            break
        done += count
    return done
