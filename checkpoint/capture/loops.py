"""Loops over bytes in memory, compiled by numba, or loaded from its cache on disk.

Everything stands at the top level: that cache misses functions that refer to what surrounds them.
Imported where it is used, as numba takes a moment to load.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

#: Pieces from this length on are written past the caches.
STREAMED_NBYTES = 1 << 16
_VECTOR = ir.VectorType(ir.IntType(64), 4)


def compiled(function: Callable[..., Any]) -> Any:
    """Has numba compile a function when it is first called; it runs without the GIL."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return numba.njit(nogil=True)(function)


@intrinsic
def _copy(typing_context, target, source, nbytes):
    def generate(context, builder, signature, args):
        target, source = (builder.inttoptr(a, cgutils.voidptr_t) for a in args[:2])
        cgutils.raw_memcpy(builder, target, source, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def _pointer(typing_context, address, like):
    """An address as a pointer to elements of the type of `like`."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.int64, like), generate


@intrinsic
def _stream(typing_context, target, source):
    """64 bytes, past the caches, to an address that is a multiple of 32."""

    def generate(context, builder, signature, args):
        past_caches = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        for at in (0, 32):
            into, from_ = (
                builder.inttoptr(builder.add(a, a.type(at)), _VECTOR.as_pointer()) for a in args
            )
            stored = builder.store(builder.load(from_, align=1), into, align=32)
            stored.set_metadata("nontemporal", past_caches)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _exchange(typing_context, target, source):
    """64 bytes change places; the target, an address that is a multiple of 32, past the caches."""

    def generate(context, builder, signature, args):
        past_caches = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        for at in (0, 32):
            into, from_ = (
                builder.inttoptr(builder.add(a, a.type(at)), _VECTOR.as_pointer()) for a in args
            )
            new, old = builder.load(from_, align=1), builder.load(into, align=32)
            builder.store(old, from_, align=1)
            builder.store(new, into, align=32).set_metadata("nontemporal", past_caches)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _fence(typing_context):
    """What was streamed is seen by all from here on."""

    def generate(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@compiled
def any_above(values: np.ndarray, flip: Any, mask: Any, limit: Any) -> bool:
    """Whether any element, with some bits flipped and some left out, is above a limit."""
    block = 4096
    for start in range(0, values.size, block):
        found = False
        for i in range(start, min(start + block, values.size)):
            found |= ((values[i] ^ flip) & mask) > limit
        if found:
            return True
    return False


@compiled
def copy_pieces(target: int, places: np.ndarray, sources: np.ndarray, sizes: np.ndarray) -> None:
    """See `kernels.copy_pieces`."""
    for i in range(places.size):
        _copy(target + places[i], sources[i], sizes[i])  # pyright: ignore[reportCallIssue]


@numba.njit(nogil=True)  # a part of what those that call it are cached as
def copy_part(
    target: int, source: int, nbytes: int, width: int, flip: Any, mask: Any, limit: Any
) -> bool:
    """Copies elements of a width; whether any is as `any_above` looks for."""
    found = False
    count = nbytes // width
    values = numba.carray(_pointer(target, flip), count)  # pyright: ignore[reportCallIssue]
    if source % width:  # a view of bytes that begins anywhere
        _copy(target, source, nbytes)  # pyright: ignore[reportCallIssue]
        for k in range(count):
            found |= ((values[k] ^ flip) & mask) > limit
        return found
    read = numba.carray(_pointer(source, flip), count)  # pyright: ignore[reportCallIssue]
    for k in range(count):
        value = read[k]
        values[k] = value
        found |= ((value ^ flip) & mask) > limit
    return found


@compiled
def copy_looking(
    target: int,
    places: np.ndarray,
    sources: np.ndarray,
    sizes: np.ndarray,
    width: int,
    flip: Any,
    mask: Any,
    limit: Any,
) -> bool:
    """As `copy_pieces`, and whether any element is as `any_above` looks for.

    What is looked at is what is written, while it is in a register: a second pass would read all of
    it once more.
    """
    found = False
    for i in range(places.size):
        found |= copy_part(target + places[i], sources[i], sizes[i], width, flip, mask, limit)
    return found


@compiled
def place_pieces(targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray) -> None:
    """See `kernels.place_pieces`."""
    for i in range(targets.size):
        target, source, nbytes = targets[i], sources[i], sizes[i]
        if nbytes < STREAMED_NBYTES:
            _copy(target, source, nbytes)  # pyright: ignore[reportCallIssue]
            continue
        at = -target % 64
        _copy(target, source, at)  # pyright: ignore[reportCallIssue]
        for _ in range((nbytes - at) // 64):
            _stream(target + at, source + at)  # pyright: ignore[reportCallIssue]
            at += 64
        _copy(target + at, source + at, nbytes - at)  # pyright: ignore[reportCallIssue]
    _fence()  # pyright: ignore[reportCallIssue]


@compiled
def _exchange_bytes(target: int, source: int, nbytes: int) -> None:
    like = np.uint8(0)
    a = numba.carray(_pointer(target, like), nbytes)  # pyright: ignore[reportCallIssue]
    b = numba.carray(_pointer(source, like), nbytes)  # pyright: ignore[reportCallIssue]
    for k in range(nbytes):
        old = a[k]
        a[k] = b[k]
        b[k] = old


@compiled
def exchange_pieces(targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray) -> None:
    """See `kernels.exchange_pieces`."""
    for i in range(targets.size):
        target, source, nbytes = targets[i], sources[i], sizes[i]
        head = min(-target % 64, nbytes)
        wide = (nbytes - head) // 64 * 64
        _exchange_bytes(target, source, head)
        for at in range(head, head + wide, 64):
            _exchange(target + at, source + at)  # pyright: ignore[reportCallIssue]
        done = head + wide
        _exchange_bytes(target + done, source + done, nbytes - done)
    _fence()  # pyright: ignore[reportCallIssue]
