"""The smallest codec: positions and values conditioned on the old exponent, entropy coded."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planaria.errors import CorruptError
from planaria.rl_sync.bits import BitFormat
from planaria.rl_sync.codecs import rans
from planaria.rl_sync.codecs.base import Job, as_array, checked, taken
from planaria.rl_sync.codecs.tables import Tables, read_tables, write_tables
from planaria.rl_sync.codecs.tokens import TOKENS, split_integers, ulp_distance, ulp_move
from planaria.rl_sync.diff.scan import Bits, Changes, gather

_HEADER = struct.Struct("<IIH")  # rANS state, words, classes used
_REASONS = {
    rans.CUT_SHORT: "it is cut short",
    rans.TOO_MANY: "it has more changes than the block has room for",
    rans.NO_TABLE: "it uses a table that its model lacks",
    rans.NOT_AT_END: "it does not end where it should",
}


class _Symbols(NamedTuple):
    """A block as symbols in the decoder's order."""

    contexts: npt.NDArray[np.uint8]
    tokens: npt.NDArray[np.uint8]
    extra: npt.NDArray[np.uint64]
    extra_bits: npt.NDArray[np.uint8]
    per_class: npt.NDArray[np.int64]


class ExponentCodec:
    """Exponent-conditioned gaps and ULP distances, rANS coded."""

    name = "exponent"

    def __init__(self) -> None:
        #: Bits a change took lately, by format; what the next estimate goes by.
        self._lately: dict[str, float] = {}

    def size(self, fmt: BitFormat, elements: int, changes: Changes) -> float:
        """See `Codec.size`."""
        count = changes.size
        bits = self._lately.get(fmt.name)
        if bits is None:
            p = max(count, 1) / max(elements, 1)
            bits = 0.7 * max(-np.log2(p), 0.1) + 2.5 + (0.5 * fmt.mantissa_bits if p > 0.3 else 0)
        return 24 + count * bits / 8

    def encode(self, jobs: Sequence[Job]) -> tuple[bytes, list[bytes]]:
        """See `Codec.encode`."""
        if not jobs:
            return b"", []
        fmt = jobs[0].fmt
        lowest = _lowest_exponent(jobs)
        streams = [_symbols(job, _classes(fmt, lowest)) for job in jobs]
        counts = np.zeros((rans.CONTEXTS, TOKENS), np.int64)
        for s in streams:
            at = s.contexts.astype(np.int64) * TOKENS + s.tokens
            counts += np.bincount(at, minlength=counts.size).reshape(counts.shape)
        tables = write_tables(counts)
        model = bytes([lowest]) + tables
        made = read_tables(tables, rans.CONTEXTS)
        blocks = [_write(s, made) for s in streams]
        changes = sum(job.changes.size for job in jobs)
        if changes:
            self._lately[fmt.name] = 8 * sum(map(len, blocks)) / changes
        return model, blocks

    def decode(
        self, data: bytes | bytearray | memoryview, fmt: BitFormat, base: Bits, count: int,
        model: bytes | bytearray | memoryview = b"",
    ) -> Changes:  # fmt: skip
        """See `Codec.decode`."""
        if not 0 <= count <= base.size:
            raise CorruptError(f"{count} changes in a block of {base.size} elements")
        lowest, tables = _model(bytes(model))
        head, rest = taken(memoryview(data), _HEADER.size, "header")
        state, words, used = _HEADER.unpack(head)
        counts = np.zeros(rans.CLASSES, np.int64)
        for c in range(rans.CLASSES):
            if used >> c & 1:
                counts[c], rest = _varint(rest)
        if int(counts.sum()) != count or (counts > base.size).any():
            raise CorruptError(f"an exponent block does not have the {count} changes it should")
        coded, bits = taken(rest, 2 * words, "coded words")
        pos = np.empty(count, np.uint32)
        zigzag = np.empty(count, np.uint64)
        result = rans.decode_changes(
            base, *_classes(fmt, lowest), counts, state, as_array(coded, "<u2"),
            as_array(bits, "u1"), *tables, pos, zigzag,
        )  # fmt: skip
        if result != rans.OK:
            raise CorruptError(f"an exponent block does not decode: {_REASONS[result]}")
        old, new = np.empty(count, base.dtype), np.empty(count, base.dtype)
        gather(base, pos, old)
        if not ulp_move(old, zigzag, 1 << (8 * fmt.width - 1), new):
            raise CorruptError("an exponent block moves a number out of its range")
        return checked(Changes(pos, old, new), base.size, count, self.name)


@lru_cache(maxsize=64)
def _model(data: bytes) -> tuple[int, Tables]:
    if not data:
        raise CorruptError("an exponent block has no model")
    return data[0], read_tables(data[1:], rans.CONTEXTS)


class _Classes(NamedTuple):
    """What finds an element's class; the first arguments of the kernels.

    Attributes:
        of: Class of each exponent.
        ones: The same as a 1 in the class's four bits.
        shift: Bits below the exponent.
        mask: The bits of an exponent.
    """

    of: npt.NDArray[np.uint8]
    ones: npt.NDArray[np.uint64]
    shift: np.uint64
    mask: np.uint64


@lru_cache(maxsize=64)
def _classes(fmt: BitFormat, lowest: int) -> _Classes:
    """Class 0 is for zeros and subnormals, 1 for the lowest exponent and those below, and so on."""
    exponents = np.arange(1 << fmt.exponent_bits)
    found = np.clip(exponents - lowest, 0, rans.CLASSES - 2) + 1
    found[0] = 0
    ones = np.uint64(1) << (4 * found).astype(np.uint64)
    mask = np.uint64(found.size - 1)
    return _Classes(found.astype(np.uint8), ones, np.uint64(fmt.mantissa_bits), mask)


def _lowest_exponent(jobs: Sequence[Job]) -> int:
    """Where the classes begin: so that the largest exponents that change have one each."""
    fmt = jobs[0].fmt
    seen = np.zeros(1 << fmt.exponent_bits, np.int64)
    mask = len(seen) - 1
    for job in jobs:
        old = (job.changes.old >> fmt.mantissa_bits) & mask
        seen += np.bincount(old, minlength=len(seen))
    total = int(seen.sum())
    if not total:
        return 0
    # The few changes of the largest exponents need no class of their own.
    above = np.cumsum(seen[::-1])[::-1]
    top = int(np.flatnonzero(above > total / 4096)[-1])
    return max(0, top - (rans.CLASSES - 2))


def _symbols(job: Job, classes: _Classes) -> _Symbols:
    fmt, changes = job.fmt, job.changes
    n = changes.size
    kind, following = np.empty(n, np.uint8), np.empty(n, np.int64)
    gap, value = np.empty(n, np.uint64), np.empty(n, np.uint64)
    count = np.zeros(rans.CLASSES, np.int64)
    first = np.full(rans.CLASSES, -1, np.int64)
    rans.class_gaps(job.base, changes.pos, *classes, kind, gap, following, count, first)
    ulp_distance(changes.old, changes.new, 1 << (8 * fmt.width - 1), value)
    gap_token, gap_bits, value_token, value_bits = (np.empty(n, np.uint8) for _ in range(4))
    split_integers(gap, gap_token, gap_bits)
    split_integers(value, value_token, value_bits)
    contexts, tokens, extra_bits = (np.empty(2 * n, np.uint8) for _ in range(3))
    extra = np.empty(2 * n, np.uint64)
    made = rans.order_symbols(
        kind, gap_token, gap_bits, value_token, value_bits, gap, value, following, first,
        contexts, tokens, extra, extra_bits,
    )  # fmt: skip
    return _Symbols(contexts[:made], tokens[:made], extra[:made], extra_bits[:made], count)


def _write(s: _Symbols, tables: Tables) -> bytes:
    words = np.empty(s.tokens.size + 1, "<u2")
    state, at = rans.encode_symbols(s.contexts, s.tokens, tables.freq, tables.start, words)
    bits = np.zeros(int(s.extra_bits.sum(dtype=np.int64) + 7) // 8, np.uint8)
    rans.pack_bits(s.extra, s.extra_bits, bits)
    used = sum(1 << c for c in range(rans.CLASSES) if s.per_class[c])
    counts = b"".join(_as_varint(int(c)) for c in s.per_class if c)
    head = _HEADER.pack(state, words.size - at, used)
    return b"".join((head, counts, words[at:].tobytes(), bits.tobytes()))


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint(data: memoryview) -> tuple[int, memoryview]:
    value = 0
    for i in range(min(len(data), 5)):
        value |= (data[i] & 0x7F) << 7 * i
        if not data[i] & 0x80:
            return value, data[i + 1 :]
    raise CorruptError("a block is cut short: its counts do not end")
