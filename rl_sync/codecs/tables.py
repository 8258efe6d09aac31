"""Frequency tables of tokens: made from counts, quantised, written in a few bytes.

The tables of all contexts of a version are its *model*. A context's table is written in the
cheapest of three ways: as nothing (the context is not used), as one byte (a geometric distribution:
what the gaps between independent changes follow), or as one byte a token. Tables are rebuilt with
integers, and with sums and products of doubles in a fixed order, so that both sides get the same.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planaria.errors import CorruptError
from planaria.rl_sync.codecs.tokens import TOKENS, token_range

PRECISION = 12
TOTAL = 1 << PRECISION
_UNUSED, _GEOMETRIC, _LISTED = 0, 1, 2
# Eighths of an octave: 0 is absent, q is round(2 ** ((q - 1) / 8)).
_LEVELS = [0] + [
    (math.isqrt(math.isqrt(math.isqrt(1 << (q + 8 * 16)))) + (1 << 15)) >> 16 for q in range(97)
]


class Tables(NamedTuple):
    """Decoding and encoding tables of several contexts.

    Attributes:
        freq: Frequency of each token, uint16 of shape (contexts, TOKENS); a row adds up to
            TOTAL, or to 0 where a context is not used.
        start: Sum of the frequencies of smaller tokens, likewise.
        token: Which token each of TOTAL slots belongs to, uint8 of shape (contexts, TOTAL).
        used: Whether each context is used, uint8.
    """

    freq: npt.NDArray[np.uint16]
    start: npt.NDArray[np.uint16]
    token: npt.NDArray[np.uint8]
    used: npt.NDArray[np.uint8]


def write_tables(counts: npt.NDArray[np.int64]) -> bytes:
    """The cheapest description of tables for these counts.

    Args:
        counts: How often each token occurs in each context, of shape (contexts, TOKENS).
    """
    return b"".join(_write_one(row) for row in counts)


def read_tables(data: bytes, contexts: int) -> Tables:
    """Rebuilds tables.

    Raises:
        CorruptError: The description is malformed.
    """
    freq = np.zeros((contexts, TOKENS), np.uint16)
    at = 0
    try:
        for context in range(contexts):
            kind = data[at]
            at += 1
            if kind == _GEOMETRIC:
                freq[context] = _geometric(data[at])
                at += 1
            elif kind == _LISTED:
                first, size = data[at], data[at + 1]
                levels = data[at + 2 : at + 2 + size]
                if not size or len(levels) < size or first + size > TOKENS:
                    raise CorruptError("a table of the entropy coder has no such tokens")
                freq[context] = _listed(first, levels)
                at += 2 + size
            elif kind != _UNUSED:
                raise CorruptError(f"a table of the entropy coder is of unknown kind {kind}")
    except IndexError:
        raise CorruptError("the tables of the entropy coder are cut short") from None
    if at != len(data):
        raise CorruptError("the tables of the entropy coder are too long")
    start = np.zeros_like(freq)
    start[:, 1:] = np.cumsum(freq, axis=1)[:, :-1]
    token = np.zeros((contexts, TOTAL), np.uint8)
    for context in range(contexts):
        if freq[context].any():
            token[context] = np.repeat(np.arange(TOKENS, dtype=np.uint8), freq[context])
    used = np.array([row.any() for row in freq], np.uint8)
    return Tables(freq, start, token, used)


def _write_one(counts: npt.NDArray[np.int64]) -> bytes:
    total = int(counts.sum())
    if total == 0:
        return bytes([_UNUSED])
    tokens = np.flatnonzero(counts)
    first, last = int(tokens[0]), int(tokens[-1])
    scale = TOTAL / total
    levels = bytes(_level(c * scale) if c else 0 for c in counts[first : last + 1].tolist())
    listed = bytes([_LISTED, first, len(levels)]) + levels
    with np.errstate(divide="ignore"):
        cost = len(listed) * 8 + _bits(_listed(first, levels))[tokens] @ counts[tokens]
    geometric = 16 + _bits_geometric()[:, tokens] @ counts[tokens]
    best = int(geometric.argmin())
    return bytes([_GEOMETRIC, best]) if geometric[best] < cost else listed


@cache
def _bits_geometric() -> npt.NDArray[np.float64]:
    """`_bits` of every geometric table, of shape (256, TOKENS)."""
    with np.errstate(divide="ignore"):
        return np.stack([_bits(_geometric(q)) for q in range(256)])


def _bits(freq: npt.NDArray[np.uint16]) -> npt.NDArray[np.float64]:
    """Bits that each token takes with a table; infinite where it has no code."""
    return PRECISION - np.log2(freq, dtype=np.float64)


def _level(wanted: float) -> int:
    return min(max(round(8 * math.log2(max(wanted, 1.0))) + 1, 1), 97)


def _listed(first: int, levels: bytes) -> npt.NDArray[np.uint16]:
    weights = [0] * TOKENS
    for i, level in enumerate(levels):
        if level >= len(_LEVELS):
            raise CorruptError(f"a table of the entropy coder has unknown level {level}")
        weights[first + i] = _LEVELS[level]
    return _normalised(weights)


@cache
def _geometric(q: int) -> npt.NDArray[np.uint16]:
    """The table of the number of failures before a success of probability 2 ** (-q / 12)."""
    root = 1 / 1.0594630943592953  # 2 ** (-1 / 12)
    p = min(_power(root, q), 1 - 2.0**-10)
    weights = []
    for token in range(TOKENS):
        first, end = token_range(token)
        weight = _power(1 - p, first) - _power(1 - p, end)
        weights.append(max(1, int(weight * TOTAL * 64)) if weight > 2.0**-22 else 0)
    return _normalised(weights)


def _power(base: float, exponent: int) -> float:
    """By squaring: the same bits on every machine, which ``pow`` does not promise."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def _normalised(weights: list[int]) -> npt.NDArray[np.uint16]:
    """Frequencies in proportion to the weights that add up to TOTAL, each used one at least 1."""
    total = sum(weights)
    if total == 0:
        raise CorruptError("a table of the entropy coder is empty")
    wanted = np.array(weights, np.int64)
    freq = np.where(wanted > 0, np.maximum(wanted * TOTAL // total, 1), 0)
    spare = TOTAL - int(freq.sum())
    while spare:
        # What rounding left goes to the largest; what it took too much comes from there.
        largest = int(freq.argmax())
        step = spare if spare > 0 else -min(-spare, max(int(freq[largest]) // 2, 1))
        freq[largest] += step
        spare -= step
    return freq.astype(np.uint16)
