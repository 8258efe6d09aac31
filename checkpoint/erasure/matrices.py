"""Which combination of rows gives which row: parity from data, what is lost from what is left.

Row i of a stripe is data for i < k and parity i - k for k <= i < k + m. For every k and m any k
rows give all the others:

- m = 1: the parity is the XOR of the data.
- m = 2: P + Q as in RAID-6: P is the XOR, Q the sum of ``2^j * data[j]``.
- more: a Cauchy matrix ``1 / (x_i + y_j)`` with x_i = k + i and y_j = j (Blomer et al., 1995),
  columns and rows scaled so that its first row and column are ones. Scaling keeps every square part
  invertible, and makes the first parity the XOR whatever m is: one lost row costs an XOR.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from planaria.checkpoint.erasure.field import (
    Matrix,
    inverses,
    invert,
    multiply,
    power_of_two,
    products,
)

#: Rows of a stripe, at most.
MAX_ROWS = 255


@lru_cache(maxsize=256)
def parity_matrix(k: int, m: int) -> Matrix:
    """The coefficients of the parity rows, uint8[m, k], read-only."""
    matrix = np.ones((m, k), np.uint8)
    if m == 2:
        matrix[1] = [power_of_two(j) for j in range(k)]
    elif m > 2:
        table, inverse = products(), inverses()
        matrix = inverse[np.arange(k, k + m)[:, None] ^ np.arange(k)[None, :]]
        matrix = table[matrix, inverse[matrix[0]][None, :]]
        matrix = table[matrix, inverse[matrix[:, 0]][:, None]]
    matrix.flags.writeable = False
    return matrix


@lru_cache(maxsize=4096)
def rebuild_matrix(k: int, m: int, have: tuple[int, ...], wanted: tuple[int, ...]) -> Matrix:
    """The coefficients by which k rows give others.

    Args:
        k: Data rows of a stripe.
        m: Parity rows of a stripe.
        have: The k rows that are there, ascending.
        wanted: Other rows.

    Returns:
        uint8[len(wanted), k], read-only; columns in the order of `have`.
    """
    parity = parity_matrix(k, m)
    there = [i for i in have if i < k]
    used = [i - k for i in have if i >= k]
    lost = sorted(set(range(k)) - set(there))
    # Lost data from what is there: parity[used, lost] * lost = used + parity[used, there] * there.
    solved = invert(parity[np.ix_(used, lost)])
    data = np.zeros((k, k), np.uint8)
    data[there, range(len(there))] = 1
    data[lost, : len(there)] = multiply(solved, parity[np.ix_(used, there)])
    data[lost, len(there) :] = solved
    rows = [data[[i]] if i < k else multiply(parity[[i - k]], data) for i in wanted]
    result = np.concatenate(rows) if rows else np.zeros((0, k), np.uint8)
    result.flags.writeable = False
    return result


def chosen(k: int, parts: set[int]) -> tuple[int, ...]:
    """The k rows to rebuild others from: data first, then the first parities; ascending."""
    return tuple(sorted(parts)[:k])
