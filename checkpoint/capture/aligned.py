"""Host memory for direct reads and writes: whole pages, and huge ones where there are any.

A disk is handed memory as a list of pieces, each of which lies in one in physical memory, and takes
only so many of them at a time. Memory in pages of 4 KB is as many pieces, so that a large request
is cut into several; in huge pages it is a few. Needs no torch to be imported.
"""

import contextlib
import ctypes
import mmap
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: What huge pages are aligned to; less memory than that has none.
HUGE_PAGE = 2 << 20
_WIPE_ON_FORK = 18  # MADV_WIPEONFORK, which Python has no name for


def aligned_memory(nbytes: int) -> memoryview:
    """Memory that begins at a page, and is empty in a child that is forked."""
    if nbytes < HUGE_PAGE:
        return memoryview(mmap.mmap(-1, max(1, nbytes)))[:nbytes]
    # Shared memory has no huge pages, as systems are set up. What is private a fork would make
    # both processes copy, page by page, as soon as it is written: so the child gets none of it.
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":  # elsewhere these numbers mean other things, or nothing
        for advice in (mmap.MADV_HUGEPAGE, _WIPE_ON_FORK):
            with contextlib.suppress(OSError):  # an older kernel, or one without
                memory.madvise(advice)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE
    return memoryview(memory)[start : start + nbytes]


def aligned_bytes(nbytes: int) -> "torch.Tensor":
    """The same as a tensor, uint8[nbytes]."""
    import torch

    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(aligned_memory(nbytes), dtype=torch.uint8)
