"""The block table: which elements of which tensors each block of a version holds.

Blocks are cut along the boxes of the trainer's ranks *and* those of the rollout's shards, so that
one rank can encode a block by itself, and a shard that needs one holds all of its old values. The
table names tensors as the rollout does; who encodes a block is not part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from planaria.core.box import Box, BoxIndex
from planaria.errors import FormatError
from planaria.rl_sync.bits import FORMATS, BitFormat
from planaria.rl_sync.codecs.base import MAX_BLOCK


@dataclass(frozen=True)
class TableTensor:
    """A tensor of the rollout.

    Attributes:
        name: Its name there.
        shape: Its whole shape.
        fmt: Format in which it is sent.
        cut_dim: Dimension along which the rollout's shards cut it; None if each holds all of it.
        sections: Sizes along that dimension of parts that are each cut by themselves (q, k and v
            of a fused tensor): a shard holds its part of each, one after the other. Empty for one.
    """

    name: str
    shape: tuple[int, ...]
    fmt: BitFormat
    cut_dim: int | None = None
    sections: tuple[int, ...] = ()

    def shard_boxes(self, shard: int, shards: int) -> list[Box]:
        """What a shard holds, box by box: each section is cut as ``torch.chunk`` does."""
        whole = Box.full(self.shape)
        if self.cut_dim is None or shards == 1:
            return [whole]
        boxes, begin = [], 0
        for rows in self.sections or (self.shape[self.cut_dim],):
            size = -(-rows // shards)
            start = min(shard * size, rows)
            offset, extent = list(whole.offset), list(whole.extent)
            offset[self.cut_dim] = begin + start
            extent[self.cut_dim] = min(size, rows - start)
            boxes.append(Box(tuple(offset), tuple(extent)))
            begin += rows
        return boxes

    def shard_shape(self, shard: int, shards: int) -> tuple[int, ...]:
        """The shape of what a shard holds."""
        shape = list(self.shape)
        if self.cut_dim is not None and shards > 1:
            boxes = self.shard_boxes(shard, shards)
            shape[self.cut_dim] = sum(box.extent[self.cut_dim] for box in boxes)
        return tuple(shape)


@dataclass(frozen=True)
class Segment:
    """A box of a tensor, in row-major order; `tensor` is its number in the table."""

    tensor: int
    box: Box


@dataclass(frozen=True)
class Block:
    """Segments of one format, one after the other, for the shards in `audience`."""

    fmt: BitFormat
    segments: tuple[Segment, ...]
    audience: tuple[int, ...]

    @cached_property
    def elements(self) -> int:
        """How many elements it has."""
        return sum(segment.box.volume for segment in self.segments)

    @property
    def nbytes(self) -> int:
        """Bytes of all its elements."""
        return self.elements * self.fmt.width


@dataclass(frozen=True)
class BlockTable:
    """All tensors and blocks.

    Attributes:
        tensors: The rollout's tensors.
        blocks: Blocks; every element of every shard lies in exactly one of those it is to get.
        shards: How many parts the rollout's tensors are cut into.
        aliases: Further name of a tensor -> the name it is in the table under (tied weights).
    """

    tensors: tuple[TableTensor, ...]
    blocks: tuple[Block, ...]
    shards: int = 1
    aliases: dict[str, str] = field(default_factory=dict)

    @cached_property
    def encoded(self) -> bytes:
        """The table as JSON."""
        data = {
            "tensors": [
                [t.name, list(t.shape), t.fmt.name, t.cut_dim, list(t.sections)]
                for t in self.tensors
            ],
            "blocks": [
                [b.fmt.name, list(b.audience),
                 [[s.tensor, list(s.box.offset), list(s.box.extent)] for s in b.segments]]
                for b in self.blocks
            ],
            "shards": self.shards,
            "aliases": self.aliases,
        }  # fmt: skip
        return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()

    @cached_property
    def key(self) -> str:
        """Names the table: a hash of all that it says. A manifest, which is signed, holds it."""
        return hashlib.sha256(self.encoded).hexdigest()

    def dense_bytes(self, shard: int | None = None) -> int:
        """Bytes of all elements, or of those that a shard gets."""
        return sum(b.nbytes for b in self.blocks if shard is None or shard in b.audience)

    @classmethod
    def decode(cls, data: bytes | bytearray, key: str) -> BlockTable:
        """Reads a table that came from elsewhere.

        Args:
            data: JSON.
            key: What a signed manifest calls it.

        Raises:
            FormatError: It is another table, or not one: its blocks overlap or leave gaps.
        """
        if hashlib.sha256(data).hexdigest() != key:
            raise FormatError(
                "a block table is not the one that its manifest names; fetch it again"
            )
        try:
            raw = json.loads(data)
            tensors = tuple(
                _tensor(name, _numbers(shape), FORMATS[fmt], dim, _numbers(sections))
                for name, shape, fmt, dim, sections in raw["tensors"]
            )
            blocks = tuple(
                Block(
                    FORMATS[fmt], tuple(_segment(s, tensors) for s in segments), _numbers(audience)
                )
                for fmt, audience, segments in raw["blocks"]
            )
            aliases = {_text(k): _text(v) for k, v in raw["aliases"].items()}
            table = cls(tensors, blocks, int(raw["shards"]), aliases)
            table._check()
        except (KeyError, ValueError, TypeError, IndexError, RecursionError) as error:
            raise FormatError(f"a block table is malformed ({error!r}); it is of another version") \
                from error  # fmt: skip
        return table

    def _check(self) -> None:
        """Every shard gets each element of its tensors from exactly one block."""
        if not 1 <= self.shards <= 1 << 16:
            raise ValueError(f"{self.shards} shards")
        held: dict[tuple[int, int], list[Box]] = {}
        for block in self.blocks:
            if block.elements > MAX_BLOCK:
                raise ValueError(f"a block of {block.elements} elements")
            for segment in block.segments:
                if self.tensors[segment.tensor].fmt != block.fmt:
                    raise ValueError(
                        f"{self.tensors[segment.tensor].name} in a {block.fmt.name} block"
                    )
                for shard in block.audience:
                    held.setdefault((segment.tensor, shard), []).append(segment.box)
        for number, tensor in enumerate(self.tensors):
            for shard in range(self.shards):
                wanted = tensor.shard_boxes(shard, self.shards)
                boxes = held.get((number, shard), [])
                index = BoxIndex(boxes)
                missing = any(index.cover(box)[1] for box in wanted)
                volume = sum(box.volume for box in wanted)
                if missing or sum(box.volume for box in boxes) != volume:
                    raise ValueError(f"blocks do not hold {tensor.name} exactly once")


def _tensor(
    name: Any, shape: tuple[int, ...], fmt: BitFormat, dim: Any, sections: tuple[int, ...]
) -> TableTensor:
    if dim is not None and (type(dim) is not int or not 0 <= dim < len(shape)):
        raise ValueError(f"{name} has no dimension {dim}")
    if sections and (dim is None or sum(sections) != shape[dim]):
        raise ValueError(f"sections {sections} of {name} are not its size")
    return TableTensor(_text(name), shape, fmt, dim, sections)


def _segment(raw: Any, tensors: Sequence[TableTensor]) -> Segment:
    number, offset, extent = raw
    box = Box(_numbers(offset), _numbers(extent))
    if (
        not isinstance(number, int)
        or number < 0
        or not Box.full(tensors[number].shape).contains(box)
    ):
        raise ValueError(f"a segment {raw} lies outside of its tensor")
    return Segment(number, box)


def _numbers(raw: Any) -> tuple[int, ...]:
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in raw):
        raise ValueError(f"{raw} are no sizes")
    return tuple(raw)


def _text(raw: Any) -> str:
    if not isinstance(raw, str):
        raise TypeError(f"{raw!r} is no name")
    return raw
