"""Bytes of images and parity that this node holds, compared with their checksums."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planaria.checkpoint.format.checksum import checksum
from planaria.checkpoint.memory.holdings import Held, Parity
from planaria.checkpoint.memory.memory import Memory
from planaria.checkpoint.memory.meta import ImageFile
from planaria.errors import CorruptError, NotCommittedError, WireError

Bytes = NDArray[np.uint8]


def make_file(
    name: str,
    image: Bytes,
    checksums: list[int],
    chunk_nbytes: int,
    data_start: int,
) -> ImageFile:
    """Describes an image that is complete; takes its header's checksum.

    Raises:
        WireError: The numbers do not fit its length.
    """
    head = checksum(image[:data_start])
    file = ImageFile(name, len(image), data_start, chunk_nbytes, (head, *checksums))
    file.check()
    return file


def mismatch(file: ImageFile, chunk: int, data: Bytes) -> bool:
    """Whether a chunk's bytes are not those that were sealed."""
    return checksum(data) != file.checksums[chunk]


def check_chunks(
    held: Held, file: ImageFile, image: Bytes, start: int, stop: int, good: set[int] | None = None
) -> None:
    """Compares every chunk that has a part in ``[start, stop)`` with its checksum.

    Args:
        held: For messages.
        file: The image's description.
        image: The image, uint8.
        start: First byte.
        stop: End.
        good: Chunks that need no look; those that were found good are added.

    Raises:
        CorruptError: One differs.
    """
    for chunk in file.chunks(start, stop):
        if good is not None and chunk in good:
            continue
        first, last = file.chunk_range(chunk)
        if mismatch(file, chunk, image[first:last]):
            raise CorruptError(
                f"bytes {first} to {last} of {file.name} of {held.key} were changed in memory"
            )
        if good is not None:
            good.add(chunk)


def read_file(memory: Memory, held: Held, name: str, start: int, into: memoryview) -> None:
    """Copies bytes of a file that this node holds; they are what was sealed.

    Raises:
        NotCommittedError: This node does not hold it.
        WireError: It is shorter.
        CorruptError: They are not what was sealed.
    """
    image = held.images.get(name)
    if image is None or image.file is None:
        raise NotCommittedError(f"{name} of {held.key} is not held here")
    view = memory.view(image.span)
    stop = start + len(into)
    if not 0 <= start <= stop <= len(view):
        raise WireError(f"{name} has {len(view)} bytes, {start} to {stop} were asked for")
    into[:] = view[start:stop].data
    # Afterwards: what is compared is what was copied, or what it was copied from.
    check_chunks(held, image.file, view, start, stop)


def read_image(
    memory: Memory, held: Held, start: int, stop: int, good: dict[str, set[int]] | None = None
) -> Bytes:
    """Copies bytes ``[start, stop)`` of this node's image; what lies past its end is zero.

    Args:
        memory: Where it lies.
        held: The snapshot, with its meta.
        start: First byte of the image.
        stop: End.
        good: Chunks that need no look, by file.

    Returns:
        The bytes, uint8.

    Raises:
        CorruptError: They are not what was sealed.
    """
    out = np.zeros(stop - start, np.uint8)
    for file, first, last, at in held.files_here().pieces(start, stop):
        view = memory.view(held.images[file.name].span)
        out[at - start : at - start + last - first] = view[first:last]
        seen = None if good is None else good.setdefault(file.name, set())
        check_chunks(held, file, view, first, last, seen)
    return out


def read_parity(
    memory: Memory, held: Held, parity: Parity, block_nbytes: int, start: int, stop: int
) -> Bytes:
    """Copies bytes ``[start, stop)`` of a parity chunk.

    Raises:
        NotCommittedError: A block is not there yet.
        CorruptError: They are not what was stored.
    """
    view = memory.view(parity.span)
    if not 0 <= start <= stop <= len(view):
        raise WireError(f"a parity of {len(view)} bytes, {start} to {stop} were asked for")
    out = view[start:stop].copy()
    for block in range(start // block_nbytes, -(-stop // block_nbytes)):
        expected = parity.checksums[block]
        if expected is None:
            raise NotCommittedError(f"a parity of {held.key} is not complete")
        if checksum(view[block * block_nbytes : (block + 1) * block_nbytes]) != expected:
            raise CorruptError(f"block {block} of a parity of {held.key} was changed in memory")
    return out
