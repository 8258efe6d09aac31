"""Bytes of images and parity that this node holds, compared with their checksums."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planaria.checkpoint.format.checksum import checksum
from planaria.checkpoint.memory.held import Held, Parity
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


def view_file(memory: Memory, held: Held, name: str, start: int, stop: int) -> Bytes:
    """Bytes ``[start, stop)`` of a file that this node holds, where they lie; as they were sealed.

    Raises:
        NotCommittedError: This node does not hold it.
        WireError: It is shorter.
        CorruptError: They are not what was sealed.
    """
    image = held.images.get(name)
    if image is None or image.file is None:
        raise NotCommittedError(f"{name} of {held.key} is not held here")
    view = memory.view(image.span)
    if not 0 <= start <= stop <= len(view):
        raise WireError(f"{name} has {len(view)} bytes, {start} to {stop} were asked for")
    check_chunks(held, image.file, view, start, stop)
    return view[start:stop]


def view_image(
    memory: Memory,
    held: Held,
    start: int,
    stop: int,
    good: dict[str, set[int]] | None = None,
    check: bool = True,
) -> Bytes:
    """Bytes ``[start, stop)`` of this node's image, where they lie if that is in one file.

    Args:
        memory: Where it lies.
        held: The snapshot, sealed.
        start: First byte of the image.
        stop: End; what lies between and after files is zero.
        good: Chunks that need no look, by file; those that were found good are added.
        check: Whether to look at any.

    Returns:
        The bytes, uint8; not to be written to.

    Raises:
        CorruptError: They are not what was sealed.
    """
    pieces = held.files_here().pieces(start, stop)
    for file, first, last, _ in pieces if check else ():
        seen = None if good is None else good.setdefault(file.name, set())
        check_chunks(held, file, memory.view(held.images[file.name].span), first, last, seen)
    if len(pieces) == 1 and pieces[0][2] - pieces[0][1] == stop - start:
        file, first, last, _ = pieces[0]
        return memory.view(held.images[file.name].span)[first:last]
    out = np.zeros(stop - start, np.uint8)
    for file, first, last, at in pieces:
        source = memory.view(held.images[file.name].span)[first:last]
        out[at - start : at - start + last - first] = source
    return out


def view_parity(
    memory: Memory,
    held: Held,
    parity: Parity,
    block_nbytes: int,
    start: int,
    stop: int,
    check: bool = True,
) -> Bytes:
    """Bytes ``[start, stop)`` of a parity chunk, where they lie; compared with their checksums.

    Raises:
        NotCommittedError: A block is not there yet.
        CorruptError: They are not what was stored.
    """
    view = memory.view(parity.span)
    if not 0 <= start <= stop <= len(view):
        raise WireError(f"a parity of {len(view)} bytes, {start} to {stop} were asked for")
    for block in range(start // block_nbytes, -(-stop // block_nbytes)):
        expected = parity.checksums[block]
        if expected is None:
            raise NotCommittedError(f"a parity of {held.key} is not complete")
        whole = view[block * block_nbytes : (block + 1) * block_nbytes]
        if check and checksum(whole) != expected:
            raise CorruptError(f"block {block} of a parity of {held.key} was changed in memory")
    return view[start:stop]
