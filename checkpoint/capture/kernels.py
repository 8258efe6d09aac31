"""Hot loops on captured bytes, compiled once and kept on disk by numba."""

import ctypes
from functools import cache
from typing import Any

import numpy as np

from planaria.checkpoint.format.dtypes import StoredDtype

# Pieces from this length on are written past the caches.
_STREAMED_NBYTES = 1 << 16
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

    return _compiled(numba, any_above)


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

    copy, _, _ = _instructions()

    def copy_pieces(target, places, sources, sizes):
        for i in range(places.size):
            copy(target + places[i], sources[i], sizes[i])

    return _compiled(numba, copy_pieces)


@cache
def _place_pieces() -> Any:
    import numba

    copy, stream, fence = _instructions()

    def place_pieces(targets, sources, sizes):
        for i in range(targets.size):
            target, source, nbytes = targets[i], sources[i], sizes[i]
            if nbytes < _STREAMED_NBYTES:
                copy(target, source, nbytes)
                continue
            at = -target % 64
            copy(target, source, at)
            for _ in range((nbytes - at) // 64):
                stream(target + at, source + at)
                at += 64
            copy(target + at, source + at, nbytes - at)
        fence()

    return _compiled(numba, place_pieces)


@cache
def _instructions() -> tuple[Any, Any, Any]:
    """Copying between addresses, the same of 64 bytes past the caches, and a fence after those."""
    from llvmlite import ir
    from numba.core import cgutils, types
    from numba.extending import intrinsic

    @intrinsic
    def copy(typing_context, target, source, nbytes):
        def generate(context, builder, signature, args):
            target, source = (builder.inttoptr(a, cgutils.voidptr_t) for a in args[:2])
            cgutils.raw_memcpy(builder, target, source, args[2], 1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), generate

    @intrinsic
    def stream(typing_context, target, source):
        vector = ir.VectorType(ir.IntType(64), 4)

        def generate(context, builder, signature, args):
            past_caches = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
            for at in (0, 32):
                into, from_ = (
                    builder.inttoptr(builder.add(a, a.type(at)), vector.as_pointer()) for a in args
                )
                stored = builder.store(builder.load(from_, align=1), into, align=32)
                stored.set_metadata("nontemporal", past_caches)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    @intrinsic
    def fence(typing_context):
        def generate(context, builder, signature, args):
            builder.fence("seq_cst")
            return context.get_dummy_value()

        return types.void(), generate

    return copy, stream, fence


def _compiled(numba: Any, function: Any) -> Any:
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return numba.njit(nogil=True)(function)


def copy_pieces(target: int, places: np.ndarray, sources: np.ndarray, sizes: np.ndarray) -> None:
    """Copies many pieces of host memory in one go, without the GIL.

    Args:
        target: Address that the places count from.
        places: Where each piece goes, int64[n].
        sources: Address that each piece lies at, int64[n].
        sizes: Bytes of each piece, int64[n].
    """
    _copy_pieces()(target, places, sources, sizes)


def place_pieces(targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray) -> None:
    """Copies pieces to where nobody reads them soon, without the GIL.

    Large ones go past the caches: a processor that writes by way of them reads first what was
    there, in vain.

    Args:
        targets: Address that each piece goes to, int64[n].
        sources: Address that each piece lies at, int64[n].
        sizes: Bytes of each piece, int64[n].
    """
    _place_pieces()(targets, sources, sizes)


def warm() -> None:
    """Compiles (or loads) the kernels, so that the first save does not wait for it."""
    for kind in _UNSIGNED.values():
        _any_above()(np.zeros(1, dtype=kind), kind(0), kind(1), kind(1))
    nothing = np.zeros(0, dtype=np.int64)
    copy_pieces(0, nothing, nothing, nothing)
    place_pieces(nothing, nothing, nothing)


def copy_bytes(target: int, source: int, nbytes: int) -> None:
    """Copies between two addresses, without the GIL."""
    ctypes.memmove(target, source, nbytes)
