"""Comparisons of many elements at once whose result is a word with a bit for each element.

Written as LLVM's own vectors for kernels to call: from the loops that say the same it does not make
one comparison. Nothing is checked; arrays are contiguous.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def differing(typingctx: Any, a: Any, b: Any, start: Any) -> Any:
    """A word in which bit i says whether ``a[start + i] != b[start + i]``; of 64 elements."""
    if a.layout != "C" or b.layout != "C" or a.dtype != b.dtype:
        raise numba.TypingError("pieces of a block are contiguous arrays of one type")

    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, b = (_loaded(context, builder, signature.args[i], args[i], args[2], 64) for i in (0, 1))
        return builder.bitcast(builder.icmp_unsigned("!=", a, b), ir.IntType(64))

    return types.uint64(a, b, types.intp), make


@intrinsic
def within(
    typingctx: Any, a: Any, start: Any, shift: Any, mask: Any, lowest: Any, span: Any
) -> Any:
    """Which of 16 elements have a field ``(a[start + i] >> shift) & mask`` in a range.

    The range begins at ``lowest`` and has ``span + 1`` values; the word's bit i is of element i.
    """
    if a.layout != "C":
        raise numba.TypingError("a block is a contiguous array")

    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = _loaded(context, builder, signature.args[0], args[0], args[1], 16)
        element = values.type.element

        def every(value: Any) -> Any:
            narrow = builder.trunc(value, element) if element.width < 64 else value
            vector = ir.Constant(values.type, ir.Undefined)
            vector = builder.insert_element(vector, narrow, ir.IntType(32)(0))
            order = ir.Constant(ir.VectorType(ir.IntType(32), 16), [0] * 16)
            return builder.shuffle_vector(vector, vector, order)

        field = builder.and_(builder.lshr(values, every(args[2])), every(args[3]))
        inside = builder.icmp_unsigned("<=", builder.sub(field, every(args[4])), every(args[5]))
        return builder.zext(builder.bitcast(inside, ir.IntType(16)), ir.IntType(64))

    word = types.uint64
    return word(a, types.intp, word, word, word, word), make


@intrinsic
def lowest_bit(typingctx: Any, word: Any) -> Any:
    """The number of the lowest bit that is set; there must be one."""

    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), make


def _loaded(context: Any, builder: Any, kind: Any, value: Any, start: Any, count: int) -> Any:
    width = kind.dtype.bitwidth
    vector = ir.VectorType(ir.IntType(width), count)
    place = builder.gep(context.make_array(kind)(context, builder, value).data, [start])
    return builder.load(builder.bitcast(place, vector.as_pointer()), align=width // 8)
