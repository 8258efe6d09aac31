"""Numba kernels that are compiled once and kept on disk, and run without the GIL."""

from collections.abc import Callable
from typing import Any

import numba


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a function on first use.

    Kernels that call each other stand in one file: numba does not notice that a compiled function
    of another file has changed.
    """
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return numba.njit(nogil=True)(function)
