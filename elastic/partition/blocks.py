"""Blocks: the pieces of the parameters that have one owner each.

A block is a slab of rows, hence a box, and an optimizer's tensor of its own. Where a parameter is
cut is a function of the model alone, never of the ranks: an optimizer's kernels round otherwise
where a tensor is cut otherwise, so blocks that stay the same give the same bits for ever.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from planaria.core.box import Box
from planaria.errors import ConfigError

if TYPE_CHECKING:
    import torch

#: Elements of a block, about, for models of any size but the smallest and the largest.
BLOCK_NUMEL = 1 << 20
#: No model has more blocks than this, about, for its size alone.
MOST_BLOCKS = 1 << 16
#: And a small one has about as many, where its rows allow it.
FEWEST_BLOCKS = 64

#: Optimizers of torch whose update of an element depends on that element alone.
ELEMENTWISE = frozenset({
    "SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta", "ASGD",
    "Rprop",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Block:
    """A slab of rows of one parameter.

    Attributes:
        name: The parameter's name.
        box: Where it lies in the parameter.
        shape: The parameter's shape.
        nbytes: What counts in balancing: bytes of what the owner keeps of it.
        layer: What it is spread together with, see :func:`layer_of`.
    """

    name: str
    box: Box
    shape: tuple[int, ...]
    nbytes: int
    layer: str

    @property
    def start(self) -> int:
        """Its first element in the parameter, row-major."""
        return self.box.offset[0] * prod(self.shape[1:]) if self.shape else 0

    @property
    def stop(self) -> int:
        """One past its last element."""
        return self.start + self.box.volume


def block_numel(total: int) -> int:
    """The size of a block in elements: a power of two, by the number of elements of the model."""
    size = BLOCK_NUMEL
    while size > 1 << 10 and total // size < FEWEST_BLOCKS:
        size //= 2
    while total // size > MOST_BLOCKS:
        size *= 2
    return size


def layer_of(name: str) -> str:
    """The layer that a parameter belongs to: its name up to the first number.

    ``layers.3.mlp.up.weight`` belongs to ``layers.3``; what has no number, to its first part.
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: i + 1])
    return parts[0]


def cut(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    numel: int | None = None,
    whole: Collection[str] = (),
    bytes_per_element: int = 12,
) -> list[Block]:
    """Cuts parameters into blocks: a pure function of the model.

    Args:
        shapes: Name -> shape, in the model's order.
        numel: Elements of a block, at most, where a single row has no more; None for a size that
            fits the model. It is part of what fixes the bits.
        whole: Parameters that are not cut: those of optimizers that look at a whole tensor.
        bytes_per_element: What an owner keeps for each element: 12 for float32 and two moments.

    Raises:
        ConfigError: `numel` is below 1.
    """
    if numel is None:
        numel = block_numel(sum(map(prod, shapes.values())))
    if numel < 1:
        raise ConfigError(f"a block of {numel} elements: give 1 or more")
    blocks: list[Block] = []
    for name, shape in shapes.items():
        layer = layer_of(name)
        for box in _slabs(shape, 0 if name in whole else numel):
            nbytes = box.volume * bytes_per_element
            blocks.append(Block(name, box, shape, nbytes, layer))
    return blocks


def shapes_of(parameters: "Mapping[str, torch.Tensor]") -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that need gradients, in their order."""
    return {name: tuple(p.shape) for name, p in parameters.items() if p.requires_grad}


def _slabs(shape: tuple[int, ...], numel: int) -> list[Box]:
    full = Box.full(shape)
    if not shape or not numel or full.volume <= numel:
        return [full]
    # Slabs of the same number of rows but for the last one: most blocks then have one shape.
    rows = max(1, numel // prod(shape[1:]))
    return [
        Box((first, *full.offset[1:]), (min(rows, shape[0] - first), *shape[1:]))
        for first in range(0, shape[0], rows)
    ]
