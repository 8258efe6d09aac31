"""The information in a set of changes, to measure codecs against.

The bound of the exponent-conditioned code is, over classes c of old exponents,
sum N_c H(p_c) + n_c H(ULP distance given c): N_c elements of the class, n_c changes, H Shannon's
entropy (1948) of what was counted. The i.i.d. bound is the same with one class.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from planaria.rl_sync.codecs.base import Job
from planaria.rl_sync.codecs.tokens import ulp_distance


def entropy_bound_bits(jobs: Iterable[Job], *, conditional: bool = True) -> float:
    """Bits that the changes of blocks hold, as counted over all of them together.

    Args:
        jobs: Blocks of one format.
        conditional: Whether the receiver's knowledge of the old exponents is used.
    """
    elements: dict[int, int] = {}
    distances: dict[int, list[np.ndarray]] = {}
    for job in jobs:
        fmt, changes = job.fmt, job.changes
        mask = (1 << fmt.exponent_bits) - 1 if conditional else 0
        exponent = (job.base >> fmt.mantissa_bits) & mask
        counts = np.bincount(exponent, minlength=1)
        value = np.empty(changes.size, np.uint64)
        ulp_distance(changes.old, changes.new, 1 << (8 * fmt.width - 1), value)
        changed = (changes.old >> fmt.mantissa_bits) & mask
        for c in np.flatnonzero(counts).tolist():
            elements[c] = elements.get(c, 0) + int(counts[c])
            distances.setdefault(c, []).append(value[changed == c])
    bits = 0.0
    for c, total in elements.items():
        values = np.concatenate(distances[c])
        n = values.size
        bits += total * _entropy(np.array([n, total - n]))
        bits += n * _entropy(np.unique(values, return_counts=True)[1])
    return bits


def _entropy(counts: np.ndarray) -> float:
    """Bits a symbol."""
    total = counts.sum()
    p = counts[counts > 0] / total if total else np.ones(1)
    return float(-(p * np.log2(p)).sum())
