"""Sums of rows times coefficients, compiled by numba: vector code on any processor, without tables.

A row of the result is ``sum_j c_j x_j``. With S_b the XOR of the inputs whose coefficient has bit b
set, that is ``(..(2 S_7 + S_6) 2 + ..) 2 + S_0``: Horner's rule, where doubling a byte is a shift
and a masked XOR, which vectors of bytes do at once. A row of ones costs an XOR, and Q of P + Q
hardly more. Works through blocks that stay in the first-level cache, up to four inputs at a time.
Nothing need be aligned.

Everything stands at the top level: numba's cache on disk misses functions that closures refer to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

_WIDTH = 64  # bytes of a vector; LLVM splits it into what the processor has
_BLOCK = 4096
_REDUCTION = 0x1D

Addresses = npt.NDArray[np.int64]


def _jit(function: Callable[..., Any]) -> Any:
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return numba.njit(nogil=True)(function)


def _generator(width: int, keep: bool, double: bool) -> Callable[..., Any]:
    """Code for: ``target = [2] [target] + sources``, for `width` bytes at each address."""
    vector = ir.VectorType(ir.IntType(8), width)

    def constant(value: int) -> Any:
        return ir.Constant(vector, [value] * width)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, *sources = (builder.inttoptr(a, vector.as_pointer()) for a in args)
        terms = [builder.load(target, align=1)] if keep else []
        if double:
            # An arithmetic shift makes 0xff of a set highest bit, and 0 of one that is not.
            carry = builder.and_(builder.ashr(terms[0], constant(7)), constant(_REDUCTION))
            terms = [builder.shl(terms[0], constant(1)), carry]
        total = None
        for term in (*terms, *(builder.load(source, align=1) for source in sources)):
            total = term if total is None else builder.xor(total, term)
        builder.store(total, target, align=1)
        return context.get_dummy_value()

    return generate


def _step(width: int, sources: int, *, keep: bool = False, double: bool = False) -> Any:
    """One vector of a pass over some sources, as a function that compiled code can call."""
    signature = types.void(*[types.int64] * (1 + sources))
    generate = _generator(width, keep or double, double)

    def step0(context, o):
        return signature, generate

    def step1(context, o, a):
        return signature, generate

    def step2(context, o, a, b):
        return signature, generate

    def step4(context, o, a, b, c, d):
        return signature, generate

    return intrinsic({0: step0, 1: step1, 2: step2, 4: step4}[sources])


_set1, _set1_byte = _step(_WIDTH, 1), _step(1, 1)
_set2, _set2_byte = _step(_WIDTH, 2), _step(1, 2)
_set4, _set4_byte = _step(_WIDTH, 4), _step(1, 4)
_add1, _add1_byte = _step(_WIDTH, 1, keep=True), _step(1, 1, keep=True)
_add2, _add2_byte = _step(_WIDTH, 2, keep=True), _step(1, 2, keep=True)
_add4, _add4_byte = _step(_WIDTH, 4, keep=True), _step(1, 4, keep=True)
_twice0, _twice0_byte = _step(_WIDTH, 0, double=True), _step(1, 0, double=True)
_twice1, _twice1_byte = _step(_WIDTH, 1, double=True), _step(1, 1, double=True)
_twice2, _twice2_byte = _step(_WIDTH, 2, double=True), _step(1, 2, double=True)
_twice4, _twice4_byte = _step(_WIDTH, 4, double=True), _step(1, 4, double=True)


@_jit
def _begin(o, src, idx, j, count, start, stop):
    """The target becomes the sum of the first sources; returns how many it took."""
    i = start
    if count >= 4:
        a, b, c, d = src[idx[j]], src[idx[j + 1]], src[idx[j + 2]], src[idx[j + 3]]
        while i + _WIDTH <= stop:
            _set4(o + i, a + i, b + i, c + i, d + i)
            i += _WIDTH
        while i < stop:
            _set4_byte(o + i, a + i, b + i, c + i, d + i)
            i += 1
        return 4
    if count >= 2:
        a, b = src[idx[j]], src[idx[j + 1]]
        while i + _WIDTH <= stop:
            _set2(o + i, a + i, b + i)
            i += _WIDTH
        while i < stop:
            _set2_byte(o + i, a + i, b + i)
            i += 1
        return 2
    a = src[idx[j]]
    while i + _WIDTH <= stop:
        _set1(o + i, a + i)
        i += _WIDTH
    while i < stop:
        _set1_byte(o + i, a + i)
        i += 1
    return 1


@_jit
def _double(o, src, idx, j, count, start, stop):
    """The target is doubled, and the first sources are added; returns how many it took."""
    i = start
    if count >= 4:
        a, b, c, d = src[idx[j]], src[idx[j + 1]], src[idx[j + 2]], src[idx[j + 3]]
        while i + _WIDTH <= stop:
            _twice4(o + i, a + i, b + i, c + i, d + i)
            i += _WIDTH
        while i < stop:
            _twice4_byte(o + i, a + i, b + i, c + i, d + i)
            i += 1
        return 4
    if count >= 2:
        a, b = src[idx[j]], src[idx[j + 1]]
        while i + _WIDTH <= stop:
            _twice2(o + i, a + i, b + i)
            i += _WIDTH
        while i < stop:
            _twice2_byte(o + i, a + i, b + i)
            i += 1
        return 2
    if count == 1:
        a = src[idx[j]]
        while i + _WIDTH <= stop:
            _twice1(o + i, a + i)
            i += _WIDTH
        while i < stop:
            _twice1_byte(o + i, a + i)
            i += 1
        return 1
    while i + _WIDTH <= stop:
        _twice0(o + i)
        i += _WIDTH
    while i < stop:
        _twice0_byte(o + i)
        i += 1
    return 0


@_jit
def _add(o, src, idx, j, count, start, stop):
    """The first sources are added to the target; returns how many it took."""
    i = start
    if count >= 4:
        a, b, c, d = src[idx[j]], src[idx[j + 1]], src[idx[j + 2]], src[idx[j + 3]]
        while i + _WIDTH <= stop:
            _add4(o + i, a + i, b + i, c + i, d + i)
            i += _WIDTH
        while i < stop:
            _add4_byte(o + i, a + i, b + i, c + i, d + i)
            i += 1
        return 4
    if count >= 2:
        a, b = src[idx[j]], src[idx[j + 1]]
        while i + _WIDTH <= stop:
            _add2(o + i, a + i, b + i)
            i += _WIDTH
        while i < stop:
            _add2_byte(o + i, a + i, b + i)
            i += 1
        return 2
    _add_one(o, src[idx[j]], start, stop)
    return 1


@_jit
def _add_one(o, a, start, stop):
    i = start
    while i + _WIDTH <= stop:
        _add1(o + i, a + i)
        i += _WIDTH
    while i < stop:
        _add1_byte(o + i, a + i)
        i += 1


@_jit
def combine(
    src: Addresses,
    dst: Addresses,
    idx: Addresses,
    cuts: Addresses,
    start: int,
    stop: int,
    add: bool,
) -> None:
    """Sets, or adds to, each target the sum of its sources times their coefficients.

    Args:
        src: Addresses of the inputs, int64[columns].
        dst: Addresses of the outputs, int64[rows].
        idx: Inputs whose coefficient has a bit set, row by row and from bit 7 down to 0, int64.
        cuts: Where each of these lists begins, int64[8 * rows + 1].
        start: First byte.
        stop: One past the last byte.
        add: Whether to add.
    """
    scratch = np.empty(_BLOCK, np.uint8)
    for low in range(start, stop, _BLOCK):
        high = min(low + _BLOCK, stop)
        for r in range(dst.size):
            o = scratch.ctypes.data - low if add else dst[r]
            begun = False
            for part in range(8 * r, 8 * r + 8):
                j, end = cuts[part], cuts[part + 1]
                if begun:
                    j += _double(o, src, idx, j, end - j, low, high)
                elif end > j:
                    j += _begin(o, src, idx, j, end - j, low, high)
                    begun = True
                while end > j:
                    j += _add(o, src, idx, j, end - j, low, high)
            if add and begun:
                _add_one(dst[r], o, low, high)
            elif not add and not begun:
                _add_one(o, o, low, high)  # x + x is 0
