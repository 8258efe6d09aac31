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


@cache
def _copy_pieces() -> Any:
    import numba
    from numba.core import cgutils, types
    from numba.extending import intrinsic

    @intrinsic
    def copy(typing_context, target, source, nbytes):
        def generate(context, builder, signature, args):
            target, source = (builder.inttoptr(a, cgutils.voidptr_t) for a in args[:2])
            cgutils.raw_memcpy(builder, target, source, args[2], 1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), generate

    def copy_pieces(target, places, sources, sizes):
        for i in range(places.size):
            copy(target + places[i], sources[i], sizes[i])  # pyright: ignore[reportCallIssue]

    try:
        return numba.njit(nogil=True, cache=True)(copy_pieces)
    except RuntimeError:
        return numba.njit(nogil=True)(copy_pieces)


def copy_pieces(target: int, places: np.ndarray, sources: np.ndarray, sizes: np.ndarray) -> None:
    """Copies many pieces of host memory in one go, without the GIL.

    Args:
        target: Address that the places count from.
        places: Where each piece goes, int64[n].
        sources: Address that each piece lies at, int64[n].
        sizes: Bytes of each piece, int64[n].
    """
    _copy_pieces()(target, places, sources, sizes)


def warm() -> None:
    """Compiles (or loads) the kernels, so that the first save does not wait for it."""
    for kind in _UNSIGNED.values():
        _any_above()(np.zeros(1, dtype=kind), kind(0), kind(1), kind(1))
    nothing = np.zeros(0, dtype=np.int64)
    copy_pieces(0, nothing, nothing, nothing)


def copy_bytes(target: int, source: int, nbytes: int) -> None:
    """Copies between two addresses, without the GIL."""
    ctypes.memmove(target, source, nbytes)
