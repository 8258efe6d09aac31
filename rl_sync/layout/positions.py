"""Positions in a box of a tensor as positions in the whole tensor, and digests of both."""

from __future__ import annotations

from math import prod

import numpy as np
import numpy.typing as npt

from planaria.core.box import Box
from planaria.rl_sync.diff.digest import Digest, tensor_seed
from planaria.rl_sync.diff.scan import Bits, Changes
from planaria.rl_sync.layout.table import Block, BlockTable, Segment

_CHUNK = 1 << 20


def first_of_run(shape: tuple[int, ...], box: Box) -> int | None:
    """Row-major position of a box's first element if the box is one run of them; None if not."""
    cut = False  # whether a dimension further left has more than one index
    for extent, size in zip(box.extent, shape, strict=True):
        if cut and extent != size:
            return None
        cut = cut or extent != 1
    first = 0
    for offset, size in zip(box.offset, shape, strict=True):
        first = first * size + offset
    return first


def flat_positions(
    shape: tuple[int, ...], box: Box, pos: npt.NDArray[np.unsignedinteger]
) -> npt.NDArray[np.uint64]:
    """Row-major positions in a tensor of elements that are given by their positions in a box."""
    first = first_of_run(shape, box)
    rest = pos.astype(np.uint64)
    if first is not None:
        return rest + np.uint64(first)
    out = np.zeros(pos.size, np.uint64)
    for dim in range(len(shape) - 1, -1, -1):
        extent = np.uint64(box.extent[dim])
        out += (rest % extent + np.uint64(box.offset[dim])) * np.uint64(prod(shape[dim + 1 :]))
        rest //= extent
    return out


def split_changes(block: Block, changes: Changes) -> list[tuple[Segment, Changes]]:
    """The changes of a block by segment, with positions in the segment's box."""
    if len(block.segments) == 1:
        return [(block.segments[0], changes)] if changes.size else []
    ends = np.cumsum([s.box.volume for s in block.segments])
    cuts = [0, *np.searchsorted(changes.pos, ends).tolist()]
    found = []
    for i, segment in enumerate(block.segments):
        a, b = cuts[i], cuts[i + 1]
        if a < b:
            begin = np.uint32(int(ends[i]) - segment.box.volume)
            part = Changes(changes.pos[a:b] - begin, changes.old[a:b], changes.new[a:b])
            found.append((segment, part))
    return found


def digest_of_changes(table: BlockTable, block: Block, changes: Changes) -> Digest:
    """What the changes of a block add to a digest."""
    total = Digest()
    for segment, part in split_changes(block, changes):
        tensor = table.tensors[segment.tensor]
        seed, first = tensor_seed(tensor.name), first_of_run(tensor.shape, segment.box)
        if first is not None:
            total += Digest.moved(seed, part.pos, part.old, part.new, first)
        else:
            at = flat_positions(tensor.shape, segment.box, part.pos)
            total += Digest.moved(seed, at, part.old, part.new)
    return total


def digest_of_block(table: BlockTable, block: Block, bits: Bits) -> Digest:
    """The digest of all elements of a block."""
    total, begin = Digest(), 0
    for segment in block.segments:
        tensor = table.tensors[segment.tensor]
        seed, end = tensor_seed(tensor.name), begin + segment.box.volume
        first = first_of_run(tensor.shape, segment.box)
        if first is not None:
            total += Digest.dense(seed, first, bits[begin:end])
        else:
            for start in range(begin, end, _CHUNK):
                stop = min(start + _CHUNK, end)
                pos = np.arange(start - begin, stop - begin, dtype=np.uint64)
                at = flat_positions(tensor.shape, segment.box, pos)
                total += Digest.at(seed, at, bits[start:stop])
        begin = end
    return total
