"""Hot loops on captured bytes; `loops.py` has them as numba compiles them."""

import ctypes

import numpy as np

from planaria.checkpoint.format.dtypes import StoredDtype

#: Bytes of an element -> integers of that width.
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def has_nan(data: memoryview, dtype: StoredDtype) -> bool:
    """Whether stored elements hold a NaN; releases the GIL.

    Args:
        data: Whole elements.
        dtype: Their stored dtype.
    """
    if dtype.nan_above is None or not data:
        return False
    from planaria.checkpoint.capture import loops

    kind = UNSIGNED[dtype.nan_width]
    flip, mask, limit = map(kind, dtype.nan_above)
    return bool(loops.any_above(np.frombuffer(data, dtype=kind), flip, mask, limit))


def copy_pieces(target: int, places: np.ndarray, sources: np.ndarray, sizes: np.ndarray) -> None:
    """Copies many pieces of host memory in one go, without the GIL.

    Args:
        target: Address that the places count from.
        places: Where each piece goes, int64[n].
        sources: Address that each piece lies at, int64[n].
        sizes: Bytes of each piece, int64[n].
    """
    from planaria.checkpoint.capture import loops

    loops.copy_pieces(target, places, sources, sizes)


def copy_looking_for_nan(
    target: int, places: np.ndarray, sources: np.ndarray, sizes: np.ndarray, dtype: StoredDtype
) -> bool:
    """As `copy_pieces`, and whether what was copied holds a NaN.

    Args:
        target: Address that the places count from; with each of them a multiple of the element.
        places: Where each piece goes, int64[n].
        sources: Address that each piece lies at, int64[n].
        sizes: Bytes of each piece, whole elements, int64[n].
        dtype: Their stored dtype.
    """
    from planaria.checkpoint.capture import loops

    if dtype.nan_above is None:
        loops.copy_pieces(target, places, sources, sizes)
        return False
    width = dtype.nan_width
    flip, mask, limit = map(UNSIGNED[width], dtype.nan_above)
    return bool(loops.copy_looking(target, places, sources, sizes, width, flip, mask, limit))


def place_pieces(targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray) -> None:
    """Copies pieces to where nobody reads them soon, without the GIL.

    Large ones go past the caches: a processor that writes by way of them reads first what was
    there, in vain.

    Args:
        targets: Address that each piece goes to, int64[n].
        sources: Address that each piece lies at, int64[n].
        sizes: Bytes of each piece, int64[n].
    """
    from planaria.checkpoint.capture import loops

    loops.place_pieces(targets, sources, sizes)


def exchange_pieces(targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray) -> None:
    """Lets pieces change places, without the GIL: what was there can be put back by a second call.

    Args:
        targets: Address of each piece that nobody reads soon, int64[n].
        sources: Address of each piece that it changes places with, int64[n].
        sizes: Bytes of each piece, int64[n].
    """
    from planaria.checkpoint.capture import loops

    loops.exchange_pieces(targets, sources, sizes)


def copy_bytes(target: int, source: int, nbytes: int) -> None:
    """Copies between two addresses, without the GIL."""
    ctypes.memmove(target, source, nbytes)
