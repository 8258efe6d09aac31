"""Number formats as integers: which bits are sign, exponent and mantissa.

Everything in this package compares, moves and hashes bits, never numbers: -0 differs from +0, and a
NaN keeps its payload. An element travels as an unsigned integer of its own width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from planaria.errors import NotSupportedError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class BitFormat:
    """A dtype as bits.

    Attributes:
        name: torch's name of the dtype, without ``torch.``.
        width: Bytes of an element.
        exponent_bits: Bits of the exponent; 0 for integers.
        mantissa_bits: Bits below the exponent.
    """

    name: str
    width: int
    exponent_bits: int
    mantissa_bits: int

    @property
    def unsigned(self) -> np.dtype:
        """The numpy dtype of its bits."""
        return np.dtype(f"u{self.width}")

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype."""
        import torch

        return getattr(torch, self.name)


FORMATS = {
    each.name: each
    for each in (
        BitFormat("float32", 4, 8, 23),
        BitFormat("float16", 2, 5, 10),
        BitFormat("bfloat16", 2, 8, 7),
        BitFormat("float8_e4m3fn", 1, 4, 3),
        BitFormat("float8_e5m2", 1, 5, 2),
        BitFormat("int32", 4, 0, 31),
        BitFormat("int16", 2, 0, 15),
        BitFormat("int8", 1, 0, 7),
        BitFormat("uint8", 1, 0, 7),
        BitFormat("bool", 1, 0, 7),
    )
}


def format_of(dtype: torch.dtype | str, name: str = "a tensor") -> BitFormat:
    """The format of a dtype.

    Args:
        dtype: A torch dtype, or its name.
        name: The tensor that has it, for the error.

    Raises:
        NotSupportedError: Its elements are not of 1, 2 or 4 bytes.
    """
    found = FORMATS.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise NotSupportedError(
            f"{name} has dtype {dtype}, which cannot be synchronised; known are "
            f"{', '.join(FORMATS)}. Leave it out (only=...) or give a dtype to send it in (dtype=)"
        )
    return found


def chosen_formats(
    dtype: torch.dtype | Callable[[str], torch.dtype] | None,
) -> Callable[[str, str], BitFormat]:
    """In which format each tensor is sent, by its name and the name of its own dtype.

    Args:
        dtype: One for all floating-point tensors, or a function of the name; None for their own.
    """
    import torch

    def found(name: str, own: str) -> BitFormat:
        wanted: Any = own
        if dtype is not None and getattr(torch, own).is_floating_point:
            wanted = dtype if isinstance(dtype, torch.dtype) else dtype(name)
        return format_of(wanted, name)

    return found


@cache
def _carriers() -> dict[int, torch.dtype]:
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def bits_of(tensor: torch.Tensor) -> npt.NDArray[np.unsignedinteger]:
    """The bits of a contiguous tensor on the host, as a flat array that shares its memory.

    Args:
        tensor: Contiguous, of a dtype in `FORMATS`.

    Returns:
        uint8, uint16 or uint32, of shape (tensor.numel(),).
    """
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    width = tensor.element_size()
    return flat.view(_carriers()[width]).numpy().view(f"u{width}")


def integers(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers of the same width, whatever its strides and device."""
    return tensor.detach().view(_carriers()[tensor.element_size()])


def tensor_of(bits: npt.NDArray[np.unsignedinteger]) -> torch.Tensor:
    """Bits as an integer tensor (see `integers`) that shares their memory."""
    import torch

    return torch.from_numpy(bits.view({1: np.uint8, 2: np.int16, 4: np.int32}[bits.itemsize]))
