"""How far two tensors of one dtype are apart: absolutely, relatively, in units in the last place.

Two elements are equal if their bits are; so a NaN equals itself, and +0 differs from -0, by 0 ULP.
The ULP distance counts the representable numbers from one to the other, in the tensor's own dtype.
Of a complex number, both parts are looked at by themselves.
"""

from dataclasses import dataclass

import numpy as np
import torch

from planaria.checkpoint.format.dtypes import StoredDtype, raw_bytes

_UINTS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass
class Distance:
    """How far two tensors, or parts of them, are apart.

    Attributes:
        elements: Elements that were compared (a complex number is one).
        differing: How many of them have other bits.
        nan: How many of these are a NaN on one side at least; the maxima leave them out.
        max_abs: Largest absolute difference.
        max_rel: Largest difference over the larger of both magnitudes.
        max_ulp: Largest ULP distance; None where the dtype has no floating point.
        worst: Flat index of the element with `max_abs`, None if none differs.
    """

    elements: int = 0
    differing: int = 0
    nan: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    max_ulp: int | None = None
    worst: int | None = None


def distance(a: torch.Tensor, b: torch.Tensor, stored: StoredDtype) -> Distance:
    """Compares two tensors of the same shape.

    Args:
        a: One, on the host.
        b: The other.
        stored: The dtype of both.
    """
    floating = stored.nan_above is not None
    result = Distance(a.numel(), max_ulp=0 if floating else None)
    width = stored.nan_width
    parts = stored.itemsize // width  # a complex number has two
    x, y = _bits(a, width), _bits(b, width)
    where = np.flatnonzero(x != y)
    if not where.size:
        return result
    x, y = x[where], y[where]
    result.differing = len(np.unique(where // parts)) if parts > 1 else len(where)
    if stored.nan_above is not None:
        flip, mask, limit = (x.dtype.type(v) for v in stored.nan_above)
        odd = (((x ^ flip) & mask) > limit) | (((y ^ flip) & mask) > limit)
        result.nan = len(np.unique(where[odd] // parts))
        where, x, y = where[~odd], x[~odd], y[~odd]
        if not where.size:
            return result
        result.max_ulp = int(_ulps(x, y, signed=stored.name != "float8_e8m0fnu").max())
        absolute, relative = _real(x, y, _part_dtype(stored))
    else:
        absolute, relative = _whole(x, y, stored)
    worst = int(absolute.argmax())
    result.max_abs, result.max_rel = float(absolute[worst]), float(relative.max())
    result.worst = int(where[worst]) // parts
    return result


def _bits(tensor: torch.Tensor, width: int) -> np.ndarray:
    return raw_bytes(tensor).numpy().view(_UINTS[width])


def _part_dtype(stored: StoredDtype) -> torch.dtype:
    """The real dtype that a floating or complex dtype is made of."""
    real = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}
    return getattr(torch, real.get(stored.name, stored.name))


def _ulps(x: np.ndarray, y: np.ndarray, *, signed: bool) -> np.ndarray:
    """Representable numbers from one to the other, as uint64: they may be 2**64 - 2**53 apart."""
    sign = x.dtype.type(1 << (8 * x.dtype.itemsize - 1) if signed else 0)
    a, b = (x & ~sign).astype(np.uint64), (y & ~sign).astype(np.uint64)
    across = ((x ^ y) & sign) != 0
    # Magnitudes count from zero: on both sides of it they add up.
    return np.where(across, a + b, np.maximum(a, b) - np.minimum(a, b))


def _real(x: np.ndarray, y: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Absolute and relative differences of floating-point numbers without NaN."""
    a, b = (torch.from_numpy(v.view(np.uint8)).view(dtype).double().numpy() for v in (x, y))
    with np.errstate(all="ignore"):
        absolute = np.abs(a - b)
        # Infinities differ by infinity from all but themselves, which were equal.
        relative = np.where(absolute == 0, 0.0, absolute / np.maximum(np.abs(a), np.abs(b)))
    return absolute, np.where(np.isnan(relative), np.inf, relative)


def _whole(x: np.ndarray, y: np.ndarray, stored: StoredDtype) -> tuple[np.ndarray, np.ndarray]:
    """The same of whole numbers; exact until they become floating-point."""
    signed = stored.name.startswith("int")
    a, b = (v.view(f"i{v.dtype.itemsize}") if signed else v for v in (x, y))
    high, low = np.maximum(a, b), np.minimum(a, b)
    # Two's complement: without a sign, the difference cannot overflow.
    absolute = (high.view(x.dtype) - low.view(x.dtype)).astype(np.float64)
    size = np.maximum(np.abs(a.astype(np.float64)), np.abs(b.astype(np.float64)))
    return absolute, absolute / size
