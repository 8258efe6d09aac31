"""How torch dtypes are named in a manifest and stored in a safetensors file.

Looking at a manifest needs no torch, so it is loaded where a dtype itself is wanted.
"""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from planaria.errors import FormatError, StateError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class StoredDtype:
    """One dtype as it lies in a file.

    Attributes:
        name: Name in the manifest (torch's own, without ``torch.``).
        code: safetensors dtype code of the stored elements.
        itemsize: Bytes per tensor element.
        per_element: Stored elements per tensor element (2 where complex numbers are kept as pairs).
        nan_above: (flip, mask, limit): an element is a NaN where (bits ^ flip) & mask > limit, over
            integers of the width of one stored element; None for dtypes without NaN.
    """

    name: str
    code: str
    itemsize: int
    per_element: int = 1
    nan_above: tuple[int, int, int] | None = None

    @property
    def dtype(self) -> "torch.dtype":
        """The torch dtype.

        Raises:
            FormatError: This torch does not have it.
        """
        import torch

        found = getattr(torch, self.name, None)
        if found is None:
            raise FormatError(
                f"the checkpoint holds dtype {self.name!r}, which torch {torch.__version__} does "
                "not know; use a newer one"
            )
        return found

    @property
    def nan_width(self) -> int:
        """Bytes of the integers that `nan_above` speaks of."""
        return self.itemsize // (2 if self.name.startswith("complex") else 1)

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the file of a tensor of this shape."""
        return (*shape, self.per_element) if self.per_element > 1 else shape


_F64 = (0, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000)
_F32 = (0, 0x7FFFFFFF, 0x7F800000)
_F16 = (0, 0x7FFF, 0x7C00)
_BF16 = (0, 0x7FFF, 0x7F80)
_ONLY_0X80 = (0x7F, 0xFF, 0xFE)  # what would be -0 is the one NaN

_TABLE = [
    StoredDtype("float64", "F64", 8, 1, _F64),
    StoredDtype("float32", "F32", 4, 1, _F32),
    StoredDtype("float16", "F16", 2, 1, _F16),
    StoredDtype("bfloat16", "BF16", 2, 1, _BF16),
    StoredDtype("int64", "I64", 8, 1, None),
    StoredDtype("int32", "I32", 4, 1, None),
    StoredDtype("int16", "I16", 2, 1, None),
    StoredDtype("int8", "I8", 1, 1, None),
    StoredDtype("uint64", "U64", 8, 1, None),
    StoredDtype("uint32", "U32", 4, 1, None),
    StoredDtype("uint16", "U16", 2, 1, None),
    StoredDtype("uint8", "U8", 1, 1, None),
    StoredDtype("bool", "BOOL", 1, 1, None),
    StoredDtype("complex64", "C64", 8, 1, _F32),
    StoredDtype("complex128", "F64", 16, 2, _F64),
    StoredDtype("complex32", "F16", 4, 2, _F16),
    StoredDtype("float8_e4m3fn", "F8_E4M3", 1, 1, (0, 0x7F, 0x7E)),
    StoredDtype("float8_e5m2", "F8_E5M2", 1, 1, (0, 0x7F, 0x7C)),
    # Not every safetensors release knows the rest: they are stored as plain bytes.
    StoredDtype("float8_e4m3fnuz", "U8", 1, 1, _ONLY_0X80),
    StoredDtype("float8_e5m2fnuz", "U8", 1, 1, _ONLY_0X80),
    StoredDtype("float8_e8m0fnu", "U8", 1, 1, (0, 0xFF, 0xFE)),
]

_BY_NAME = {stored.name: stored for stored in _TABLE}


@cache
def _by_dtype() -> "dict[torch.dtype, StoredDtype]":
    import torch

    # The newest float8 kinds depend on the torch release.
    return {stored.dtype: stored for stored in _TABLE if hasattr(torch, stored.name)}


def stored_dtype(dtype: "torch.dtype", tensor_name: str) -> StoredDtype:
    """How a tensor of this dtype is stored.

    Raises:
        StateError: The dtype has no stored form (quantised and packed sub-byte types).
    """
    known = _by_dtype()
    if dtype not in known:
        raise StateError(
            f"tensor {tensor_name!r} has dtype {dtype}, which has no stored form; save its "
            "underlying integers (tensor.view(torch.uint8) or .int_repr()) instead"
        )
    return known[dtype]


def dtype_by_name(name: str) -> StoredDtype:
    """The stored form of a dtype named in a manifest.

    Raises:
        FormatError: This version does not know the dtype.
    """
    if name not in _BY_NAME:
        raise FormatError(
            f"the checkpoint holds dtype {name!r}, which this version of Planaria does not know; "
            "use a newer one"
        )
    return _BY_NAME[name]


def raw_bytes(tensor: "torch.Tensor") -> "torch.Tensor":
    """The bytes of a tensor as a row-major array, uint8[n] on the host; a copy where needed."""
    import torch

    data = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # The strides of a dimension of size 0 or 1 may be anything, which view() would stumble over.
    return data.as_strided((data.numel(),), (1,)).view(torch.uint8)
