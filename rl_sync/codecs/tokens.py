"""Integers as tokens and extra bits, and the ULP distance of two numbers as such an integer.

A small integer is its own token. A larger one has the token of its length in bits and its two bits
below the first, and the rest as extra bits (the hybrid integers of JPEG XL, ISO/IEC 18181-1).
"""

from __future__ import annotations

import numpy as np

from planaria.rl_sync.compiled import kernel

#: Integers up to 34 bits: the distance of two 32-bit numbers with its sign.
TOKENS = 16 + 4 * 30


def token_range(token: int) -> tuple[int, int]:
    """The smallest integer of a token, and one past the largest."""
    if token < 16:
        return token, token + 1
    length, sub = 5 + (token - 16) // 4, (token - 16) % 4
    first = (4 + sub) << (length - 3)
    return first, first + (1 << (length - 3))


@kernel
def split_integers(values: np.ndarray, tokens: np.ndarray, extra_bits: np.ndarray) -> None:
    """The token and the number of extra bits of each value (uint64)."""
    for i in range(values.size):
        v = values[i]
        if v < 16:
            tokens[i] = v
            extra_bits[i] = 0
        else:
            length = 5
            while (v >> length) != 0:
                length += 1
            tokens[i] = 16 + (length - 5) * 4 + ((v >> (length - 3)) & 3)
            extra_bits[i] = length - 3


@kernel
def ulp_distance(old: np.ndarray, new: np.ndarray, sign: int, zigzag: np.ndarray) -> None:
    """How far apart numbers lie in the order of their values, as a zigzag integer.

    Bits become an integer that grows with the number: those of a negative number are turned round.
    ``sign`` is the sign's bit as an integer; 0 and -0 are neighbours, and NaNs lie outside the
    infinities, so every bit pattern has its place and its distance.
    """
    mask = 2 * sign - 1
    for i in range(old.size):
        a = np.int64(old[i])
        b = np.int64(new[i])
        # Without a branch: which sign comes next cannot be foreseen.
        a ^= mask - (sign - 1) * (a < sign)
        b ^= mask - (sign - 1) * (b < sign)
        zigzag[i] = ((b - a) << 1) ^ ((b - a) >> 63)


@kernel
def ulp_move(old: np.ndarray, zigzag: np.ndarray, sign: int, new: np.ndarray) -> bool:
    """Inverse of `ulp_distance`; returns False if a distance leads out of the number's range."""
    mask = 2 * sign - 1
    outside = False
    for i in range(old.size):
        z = np.int64(zigzag[i])
        a = np.int64(old[i])
        b = (a ^ (mask - (sign - 1) * (a < sign))) + ((z >> 1) ^ -(z & 1))
        outside |= (b & mask) != b
        new[i] = b ^ (mask - (sign - 1) * (b >= sign))
    return not outside
