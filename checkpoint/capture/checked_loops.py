"""Copying memory, with a checksum and a look for NaNs on the way, compiled for x86.

By blocks that fit into the first-level cache: a block is copied there and looked at; then it is
written past the caches and checksummed, in three lanes at once (an instruction takes three cycles,
and one can begin in each of them), while the block after it is fetched. So memory is read once and
written once, and the processor has something to do meanwhile. What is checksummed is what is
written, whatever becomes of the source in between.

The three lanes are put together as if the first two were followed by zeros: a product without
carries, which the next checksum instruction reduces (V. Gopal et al., Fast CRC Computation for
iSCSI Polynomial Using CRC32 Instruction, 2011).

Imported where it is used, as numba takes a moment to load.
"""

from functools import cache
from typing import Any

import crc32c
import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from planaria.checkpoint.capture.loops import _copy, _fence, compiled, copy_part

#: Bytes of a lane: whole lines of the cache, but no multiple of 4096, at which the lanes' lines
#: would compete for the same places in it. A multiple of the widest element, as blocks must be.
LANE = 1344
BLOCK = 3 * LANE
_LINE = 64
#: A checksum that nothing was added to.
NOTHING = 0xFFFFFFFF
_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_VECTOR, _PAIR = ir.VectorType(_I64, 4), ir.VectorType(_I64, 2)


def available() -> bool:
    """Whether the processor has the instructions, and numba may use them."""
    settings = vars(numba.config)
    if settings.get("CPU_NAME") is not None or settings.get("CPU_FEATURES") is not None:
        return False  # it compiles for another one than this
    return _has_instructions()


@cache
def _has_instructions() -> bool:
    try:
        features = llvmlite.binding.get_host_cpu_features()
    except RuntimeError:  # LLVM cannot tell
        return False
    return all(features.get(name) for name in ("sse4.2", "pclmul", "avx"))


def _key(zeros: int) -> int:
    """What a checksum is multiplied by, so that it is as if followed by so many zeros.

    It is x^(8 zeros - 33): the product, as its bits are in reverse, and the instruction that
    reduces it add the other 33.
    """
    start = 1 << 24  # x^7, as x^0 is the highest bit; each byte of zeros adds 8
    return crc32c.crc32c(bytes(zeros - 5), start ^ NOTHING) ^ NOTHING


_KEY_1, _KEY_2 = _key(LANE), _key(2 * LANE)


def _crc_of(builder: Any, width: int) -> Any:
    value = _I64 if width == 64 else _I32
    name = "llvm.x86.sse42.crc32.64.64" if width == 64 else "llvm.x86.sse42.crc32.32.8"
    kind = ir.FunctionType(value, [value, _I64 if width == 64 else _I8])
    return cgutils.get_or_insert_function(builder.module, kind, name)


def _at(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    return builder.inttoptr(builder.add(address, _I64(offset)), kind.as_pointer())


@intrinsic
def _add_word(typing_context, crc, address):
    """A checksum with 8 bytes more."""

    def generate(context, builder, signature, args):
        word = builder.load(_at(builder, args[1], 0, _I64), align=1)
        return builder.call(_crc_of(builder, 64), [args[0], word])

    return types.uint64(types.uint64, types.int64), generate


@intrinsic
def _add_byte(typing_context, crc, address):
    """A checksum with one byte more."""

    def generate(context, builder, signature, args):
        byte = builder.load(_at(builder, args[1], 0, _I8), align=1)
        crc = builder.call(_crc_of(builder, 8), [builder.trunc(args[0], _I32), byte])
        return builder.zext(crc, _I64)

    return types.uint64(types.uint64, types.int64), generate


@intrinsic
def _fold(typing_context, crc, key):
    """A checksum as if so many zeros followed as the key stands for."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(_PAIR, [_PAIR, _PAIR, _I8])
        multiply = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.pclmulqdq")
        first = _I32(0)
        pairs = [builder.insert_element(ir.Constant(_PAIR, [0, 0]), a, first) for a in args]
        product = builder.extract_element(builder.call(multiply, [*pairs, _I8(0)]), first)
        return builder.call(_crc_of(builder, 64), [_I64(0), product])

    return types.uint64(types.uint64, types.uint64), generate


@intrinsic
def _write_line(typing_context, a, b, c, block, target, ahead):
    """Writes a line of each lane past the caches and checksums it; fetches as much from ahead."""

    def generate(context, builder, signature, args):
        crcs, (block, target, ahead) = list(args[:3]), args[3:]
        kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        for lane in range(3):
            where = _at(builder, ahead, _LINE * lane, _I8)
            builder.call(fetch, [where, _I32(0), _I32(3), _I32(1)])
        past_caches = builder.module.add_metadata([_I32(1)])
        for at in range(0, _LINE, 32):
            for lane in range(3):
                offset = lane * LANE + at
                value = builder.load(_at(builder, block, offset, _VECTOR), align=32)
                stored = builder.store(value, _at(builder, target, offset, _VECTOR), align=32)
                stored.set_metadata("nontemporal", past_caches)
            for within in range(at, at + 32, 8):
                for lane in range(3):
                    word = builder.load(_at(builder, block, lane * LANE + within, _I64), align=8)
                    crcs[lane] = builder.call(_crc_of(builder, 64), [crcs[lane], word])
        return context.make_tuple(builder, signature.return_type, crcs)

    u64, i64 = types.uint64, types.int64
    return types.UniTuple(u64, 3)(u64, u64, u64, i64, i64, i64), generate


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
    block: int,
    state: np.ndarray,
) -> bool:
    """As `loops.copy_looking`, with a checksum of what has been copied so far.

    Args:
        target: Address that the places count from, a multiple of 64.
        places: Where each piece goes, int64[n], multiples of an element; each follows the one
            before it, be it of an earlier call.
        sources: Address that each piece lies at, int64[n].
        sizes: Bytes of each piece, whole elements, int64[n].
        width: Bytes of an element: 1, 2, 4, 8; 0 where there are no NaNs to look for.
        flip: See `loops.any_above`; uint64 for all widths, so that this is compiled, stored and
            loaded once.
        mask: See there.
        limit: See there.
        block: Address of `BLOCK` bytes for use in between, a multiple of 64.
        state: The checksum, uint64[1], `NOTHING` where the first piece goes to place 0.
    """
    found = False
    for i in range(places.size):
        place, source, left = places[i], sources[i], sizes[i]
        while left:
            inside = place % BLOCK
            nbytes = min(BLOCK - inside, left)
            at = block + inside
            if width == 0:
                _copy(at, source, nbytes)  # pyright: ignore[reportCallIssue]
            elif width == 1:
                found |= copy_part(
                    at, source, nbytes, 1, np.uint8(flip), np.uint8(mask), np.uint8(limit)
                )
            elif width == 2:
                found |= copy_part(
                    at, source, nbytes, 2, np.uint16(flip), np.uint16(mask), np.uint16(limit)
                )
            elif width == 4:
                found |= copy_part(
                    at, source, nbytes, 4, np.uint32(flip), np.uint32(mask), np.uint32(limit)
                )
            else:
                found |= copy_part(at, source, nbytes, 8, flip, mask, limit)
            place, source, left = place + nbytes, source + nbytes, left - nbytes
            if inside + nbytes == BLOCK:
                ahead = source
                if left == 0 and i + 1 < places.size:
                    ahead = sources[i + 1]
                into = target + place - BLOCK
                a, b, c = state[0], np.uint64(0), np.uint64(0)
                for k in range(0, LANE, _LINE):
                    a, b, c = _write_line(a, b, c, block + k, into + k, ahead + 3 * k)  # pyright: ignore[reportCallIssue, reportGeneralTypeIssues]
                first, second = _fold(a, np.uint64(_KEY_2)), _fold(b, np.uint64(_KEY_1))  # pyright: ignore[reportCallIssue]
                state[0] = first ^ second ^ c
    return found


@compiled
def finish(target: int, nbytes: int, block: int, state: np.ndarray) -> int:
    """Writes what is left of the last block; the checksum of all `nbytes`, for `copy_looking`."""
    rest = nbytes % BLOCK
    crc = state[0]
    words = rest // 8 * 8
    for k in range(0, words, 8):
        crc = _add_word(crc, block + k)  # pyright: ignore[reportCallIssue]
    for k in range(words, rest):
        crc = _add_byte(crc, block + k)  # pyright: ignore[reportCallIssue]
    _copy(target + nbytes - rest, block, rest)  # pyright: ignore[reportCallIssue]
    _fence()  # pyright: ignore[reportCallIssue]
    state[0] = NOTHING
    return crc ^ np.uint64(NOTHING)
