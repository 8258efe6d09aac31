"""Bounded host memory that captures copy into: reused, page-aligned, touched before it is needed.

Copying into fresh pages costs several times a plain copy, so buffers are faulted in when the pool
grows and never given back until it is closed. When all are in use the copying waits for the writing
(back-pressure): the pool bounds what checkpoints add to a process's memory.
"""

import contextlib
import ctypes
import mmap
import os
import threading
from dataclasses import dataclass
from typing import Protocol

import torch

from planaria.checkpoint.capture.aligned import aligned_bytes
from planaria.core.deadline import Deadline
from planaria.errors import ConfigError, DeadlineError, StateError

#: No pool is made smaller than this by default.
_MIN_NBYTES = 64 << 20
#: So many buffers that are made together lie next to each other: a file is read into all of them in
#: one go. A power of two, which page-locked memory is rounded up to.
NEIGHBOURS = 8


@dataclass(slots=True)
class Buffer:
    """One buffer of the pool.

    Attributes:
        tensor: Its memory as bytes, uint8[capacity].
        generation: Changes each time it is handed out, so that a use after release is found.
    """

    tensor: torch.Tensor
    generation: int = 0

    def view(self, nbytes: int) -> memoryview:
        """Its first bytes."""
        return self.tensor.numpy().data[:nbytes]


class Buffers(Protocol):
    """What a capture fills: `BufferPool`, or an image in shared memory.

    Attributes:
        buffer_nbytes: Size of a buffer.
        limit: How many there are at a time.
    """

    buffer_nbytes: int
    limit: int

    def acquire(self, deadline: Deadline) -> Buffer:
        """A buffer of one's own."""
        ...

    def release(self, buffer: Buffer, generation: int) -> None:
        """Gives a buffer back."""
        ...

    def check(self, buffer: Buffer, generation: int) -> None:
        """Makes sure that a buffer still holds what it was acquired for."""
        ...


class BufferPool:
    """A bounded set of equal buffers.

    Args:
        nbytes: Upper bound of its memory; rounded up to one buffer.
        buffer_nbytes: Size of a buffer; a multiple of the page size.
        pinned: Whether buffers are page-locked for copies from CUDA devices.

    Attributes:
        limit: How many buffers there are at most.
        pinned: Whether they are page-locked.
    """

    def __init__(self, nbytes: int, buffer_nbytes: int, *, pinned: bool = False) -> None:
        if buffer_nbytes < mmap.PAGESIZE or buffer_nbytes % mmap.PAGESIZE:
            raise ConfigError(f"buffer size {buffer_nbytes} is no multiple of {mmap.PAGESIZE}")
        self.buffer_nbytes = buffer_nbytes
        self.limit = max(1, nbytes // buffer_nbytes)
        self.pinned = pinned
        self._free: list[Buffer] = []
        self._made = 0
        self._changed = threading.Condition()

    @property
    def nbytes(self) -> int:
        """Memory in use by the pool, free buffers included."""
        return self._made * self.buffer_nbytes

    @property
    def idle(self) -> bool:
        """Whether nobody has a buffer."""
        return len(self._free) == self._made

    def raise_limit(self, nbytes: int) -> None:
        """Allows for more memory; less than it may have already changes nothing."""
        self.limit = max(self.limit, nbytes // self.buffer_nbytes)

    def reserve(self, nbytes: int) -> None:
        """Makes buffers for `nbytes` ahead of time, within the bound."""
        wanted = min(self.limit, -(-nbytes // self.buffer_nbytes))
        while self._made < wanted:
            buffers = self._make(min(NEIGHBOURS, wanted - self._made))
            with self._changed:
                self._free += buffers

    def acquire(self, deadline: Deadline) -> Buffer:
        """A buffer of one's own, waiting for one to be released where all are in use.

        Raises:
            DeadlineError: None was released in time.
        """
        with self._changed:
            if not self._free and self._made >= self.limit:
                self._changed.wait_for(lambda: bool(self._free), timeout=deadline.timeout())
                if not self._free:
                    raise DeadlineError(
                        f"no capture buffer became free within {deadline.budget:g} s: storage is "
                        "too slow or stuck; save less often, or raise pool_bytes"
                    )
            buffer = self._free.pop() if self._free else None
        buffer = buffer or self._make(1)[0]
        buffer.generation += 1
        return buffer

    def try_acquire(self) -> Buffer | None:
        """A buffer of one's own, None where all are in use."""
        with self._changed:
            if not self._free and self._made >= self.limit:
                return None
            buffer = self._free.pop() if self._free else None
        buffer = buffer or self._make(1)[0]
        buffer.generation += 1
        return buffer

    def release(self, buffer: Buffer, generation: int) -> None:
        """Gives a buffer back.

        Raises:
            StateError: It has been handed to someone else meanwhile.
        """
        self.check(buffer, generation)
        with self._changed:
            buffer.generation += 1
            self._free.append(buffer)
            self._changed.notify()

    def check(self, buffer: Buffer, generation: int) -> None:
        """Makes sure that a buffer still holds what it was acquired for.

        Raises:
            StateError: It has been handed to someone else meanwhile.
        """
        if buffer.generation != generation:
            raise StateError(
                f"a capture buffer of generation {generation} is already at generation "
                f"{buffer.generation}: it was reused before it was written"
            )

    def _make(self, count: int) -> list[Buffer]:
        self._made += count
        nbytes = count * self.buffer_nbytes
        try:
            if self.pinned:
                memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            else:
                memory = aligned_bytes(nbytes)
                ctypes.memset(memory.data_ptr(), 0, nbytes)  # fault the pages in
        except BaseException:  # there is no memory for them
            self._made -= count
            raise
        return [Buffer(part) for part in memory.split(self.buffer_nbytes)]


def fair_limit(wanted: int) -> int:
    """A bound for a pool that could use `wanted` bytes: this rank's part of the free memory.

    A quarter of what the machine has available is shared by its ranks.
    """
    ranks_here = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(_MIN_NBYTES, min(wanted, _available_memory() // 4 // ranks_here))


def _available_memory() -> int:
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
