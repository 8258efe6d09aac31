"""Hot loops on captured bytes, compiled once and kept on disk by numba."""

import ctypes
from functools import cache
from typing import Any

import numpy as np

from planaria.checkpoint.format.dtypes import StoredDtype

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@cache
def _any_above() -> Any:
    import numba

    def any_above(values, flip, mask, limit):
        block = 4096
        for start in range(0, values.size, block):
            found = False
            for i in range(start, min(start + block, values.size)):
                found |= ((values[i] ^ flip) & mask) > limit
            if found:
                return True
        return False

    try:
        return numba.njit(nogil=True, cache=True)(any_above)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return numba.njit(nogil=True)(any_above)


def has_nan(data: memoryview, dtype: StoredDtype) -> bool:
    """Whether stored elements hold a NaN; releases the GIL.

    Args:
        data: Whole elements.
        dtype: Their stored dtype.
    """
    if dtype.nan_above is None or not data:
        return False
    kind = _UNSIGNED[dtype.nan_width]
    flip, mask, limit = map(kind, dtype.nan_above)
    return bool(_any_above()(np.frombuffer(data, dtype=kind), flip, mask, limit))


def warm() -> None:
    """Compiles (or loads) the kernels, so that the first save does not wait for it."""
    for kind in _UNSIGNED.values():
        _any_above()(np.zeros(1, dtype=kind), kind(0), kind(1), kind(1))


def copy_bytes(target: int, source: int, nbytes: int) -> None:
    """Copies between two addresses, without the GIL."""
    ctypes.memmove(target, source, nbytes)
