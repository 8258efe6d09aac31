"""Arithmetic of GF(2^8) on small matrices: numbers are bytes, addition is XOR.

The field is that of ISA-L and of Linux's RAID-6: modulo x^8 + x^4 + x^3 + x^2 + 1 (0x11d), where 2
generates all non-zero elements (Plank, "A tutorial on Reed-Solomon coding", 1997; Anvin, "The
mathematics of RAID-6").
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from planaria.errors import ConfigError

Matrix = npt.NDArray[np.uint8]

POLYNOMIAL = 0x11D
ORDER = 255


@cache
def _logarithms() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Powers of 2, over two periods, and their inverse; the logarithm of 0 is not used."""
    powers = np.empty(2 * ORDER, np.uint8)
    logs = np.zeros(256, np.int64)
    x = 1
    for i in range(ORDER):
        powers[i] = powers[i + ORDER] = x
        logs[x] = i
        x <<= 1
        if x & 0x100:
            x ^= POLYNOMIAL
    return powers, logs


@cache
def products() -> Matrix:
    """The multiplication table, uint8[256, 256], read-only."""
    powers, logs = _logarithms()
    table = powers[logs[:, None] + logs[None, :]]
    table[0, :] = table[:, 0] = 0
    table.flags.writeable = False
    return table


@cache
def inverses() -> Matrix:
    """``inverses()[x] * x == 1``, uint8[256]; the entry of 0 is 0."""
    powers, logs = _logarithms()
    table = powers[(ORDER - logs) % ORDER]
    table[0] = 0
    table.flags.writeable = False
    return table


def power_of_two(exponent: int) -> int:
    """2 to a power, in the field."""
    return int(_logarithms()[0][exponent % ORDER])


def multiply(a: Matrix, b: Matrix) -> Matrix:
    """The product of uint8[r, s] and uint8[s, c], uint8[r, c]."""
    table = products()
    result = np.zeros((a.shape[0], b.shape[1]), np.uint8)
    for i in range(a.shape[1]):
        result ^= table[a[:, i][:, None], b[i][None, :]]
    return result


def invert(matrix: Matrix) -> Matrix:
    """The inverse of uint8[n, n], by Gauss-Jordan elimination.

    Raises:
        ConfigError: It has none.
    """
    table, inverse = products(), inverses()
    n = matrix.shape[0]
    work = np.concatenate([matrix, np.eye(n, dtype=np.uint8)], axis=1)
    for i in range(n):
        pivot = i + int(np.argmax(work[i:, i] != 0))
        if work[pivot, i] == 0:
            raise ConfigError("the matrix has no inverse over GF(2^8)")
        if pivot != i:
            work[[i, pivot]] = work[[pivot, i]]
        work[i] = table[inverse[work[i, i]], work[i]]
        factors = work[:, i].copy()
        factors[i] = 0
        work ^= table[factors[:, None], work[i][None, :]]
    return np.ascontiguousarray(work[:, n:])
