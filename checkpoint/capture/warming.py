"""Compiles what saves and loads need, so that the first one does not wait for it."""

import numpy as np

from planaria.checkpoint.capture import kernels
from planaria.checkpoint.capture.checked import CheckedCopy


def warm() -> None:
    """Compiles the kernels, or loads them from numba's cache on disk."""
    from planaria.checkpoint.capture import loops

    nothing = np.zeros(0, dtype=np.int64)
    for width, kind in kernels.UNSIGNED.items():
        looked_for = kind(0), kind(1), kind(1)
        loops.any_above(np.zeros(1, dtype=kind), *looked_for)
        loops.copy_looking(0, nothing, nothing, nothing, width, *looked_for)
    kernels.copy_pieces(0, nothing, nothing, nothing)
    kernels.place_pieces(nothing, nothing, nothing)
    kernels.exchange_pieces(nothing, nothing, nothing)
    if CheckedCopy.available():
        CheckedCopy().warm()
