"""Chunk checksums, by name, so that a later format can use another one."""

import re
from collections.abc import Callable
from typing import Any

import crc32c

from planaria.errors import FormatError

#: The checksum of new checkpoints: hardware CRC-32C, faster than any disk.
DEFAULT = "crc32c"

_PACKED = re.compile(r"(?:[0-9a-f]{8})*")
# Longer than this, crc32c gives up the GIL while it runs.
_ALGORITHMS: dict[str, Callable[[Any], int]] = {"crc32c": crc32c.crc32c}


def checksum(data: Any, algorithm: str = DEFAULT) -> int:
    """The checksum of a bytes-like object.

    Raises:
        FormatError: The algorithm is unknown to this version.
    """
    if algorithm not in _ALGORITHMS:
        raise FormatError(
            f"the checkpoint uses checksum {algorithm!r}; this version knows "
            f"{sorted(_ALGORITHMS)}: use a newer one"
        )
    return _ALGORITHMS[algorithm](data)


def extend(value: int, data: Any) -> int:
    """The default checksum of what `value` is the checksum of, with a bytes-like object added."""
    return crc32c.crc32c(data, value)


def pack(values: list[int]) -> str:
    """32-bit checksums as one hexadecimal string, 8 digits each."""
    return "".join(f"{v:08x}" for v in values)


def unpack(text: str) -> list[int]:
    """Inverse of `pack`.

    Raises:
        FormatError: The text is not a whole number of 8-digit groups.
    """
    # int() alone would take signs, spaces and underscores, too.
    if not _PACKED.fullmatch(text):
        raise FormatError(f"bad checksum list in the manifest: {text[:32]!r}...")
    return [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]
