"""What every codec does: changes of a block to bytes and back, bit for bit, or an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from planaria.errors import CorruptError
from planaria.rl_sync.bits import BitFormat
from planaria.rl_sync.diff.scan import Bits, Changes

#: Largest block, in elements: positions are 32-bit integers.
MAX_BLOCK = 1 << 28


@dataclass(frozen=True)
class Job:
    """One block to encode.

    Attributes:
        fmt: Format of its elements.
        base: Its bits at the base version, flat; the changes refer to them.
        changes: What changed since.
    """

    fmt: BitFormat
    base: Bits
    changes: Changes


class Codec(Protocol):
    """One way to write changes.

    A codec gets all blocks that it is to encode at once, so that they can share a *model* (tables).
    """

    name: str

    def size(self, fmt: BitFormat, elements: int, changes: Changes) -> float:
        """About how many bytes `encode` will need for a block."""
        ...

    def encode(self, jobs: Sequence[Job]) -> tuple[bytes, list[bytes]]:
        """Encodes blocks of one format.

        Returns:
            The model, and the bytes of each block.
        """
        ...

    def decode(
        self, data: bytes | bytearray | memoryview, fmt: BitFormat, base: Bits, count: int,
        model: bytes | bytearray | memoryview = b"",
    ) -> Changes:  # fmt: skip
        """Finds the changes again.

        Args:
            data: The bytes of a block.
            fmt: Format of its elements.
            base: Its bits at the base version, flat.
            count: How many changes there are, as the manifest says.
            model: What `encode` returned with the block.

        Returns:
            The changes, ascending, each a real one (old and new bits differ).

        Raises:
            CorruptError: The bytes are not what `encode` makes for such a base. Memory and time
                stay in proportion to the block, whatever the bytes are.
        """
        ...


def checked(changes: Changes, elements: int, count: int, codec: str) -> Changes:
    """Changes as decoded, after a look whether they can be ones of such a block.

    Raises:
        CorruptError: They cannot.
    """
    pos = changes.pos
    if pos.size != count:
        raise CorruptError(f"a {codec} block has {pos.size} changes; its manifest says {count}")
    if count and (int(pos[-1]) >= elements or not (pos[1:] > pos[:-1]).all()):
        raise CorruptError(f"a {codec} block has positions out of order or outside of the block")
    if (changes.old == changes.new).any():
        raise CorruptError(f"a {codec} block lists an element as changed that is not")
    return changes


def as_array(data: bytes | bytearray | memoryview, dtype: str) -> np.ndarray:
    """Bytes as an array, without a copy.

    Raises:
        CorruptError: They are not a whole number of elements.
    """
    if len(data) % np.dtype(dtype).itemsize:
        raise CorruptError(f"{len(data)} bytes are no whole number of {dtype} elements")
    return np.frombuffer(data, dtype=dtype)


def taken(data: memoryview, size: int, what: str) -> tuple[memoryview, memoryview]:
    """The first bytes of a buffer, and the rest.

    Raises:
        CorruptError: There are not so many.
    """
    if not 0 <= size <= len(data):
        raise CorruptError(f"a block is cut short: its {what} should be {size} bytes")
    return data[:size], data[size:]
