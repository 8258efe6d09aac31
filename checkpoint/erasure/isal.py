"""ISA-L's own kernels through ctypes: assembly for SSE, AVX2, AVX-512, GFNI, NEON and SVE."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

from planaria.checkpoint.erasure.backend import HostRows, Row, check
from planaria.checkpoint.erasure.field import Matrix
from planaria.checkpoint.erasure.threads import Threads, spread
from planaria.errors import NotSupportedError

_TABLE_BYTES = 32  # of one coefficient
_LONGEST = 1 << 30  # its lengths are C ints
_POINTER = ctypes.c_void_p


class Isal(HostRows):
    """A library that has been loaded; takes rows at any address and of any length."""

    name = "isal"

    def __init__(self, library: ctypes.CDLL, threads: Threads = "auto") -> None:
        """Declares what is called of it, and tries it.

        Raises:
            NotSupportedError: It lacks a function, or computes something else.
        """
        self._threads: Threads = threads
        number = ctypes.c_int
        try:
            self._init = library.ec_init_tables
            self._encode = library.ec_encode_data
            self._update = library.ec_encode_data_update
        except AttributeError as error:
            raise NotSupportedError(f"this is no ISA-L with erasure codes: {error}") from error
        self._init.argtypes = [number, number, _POINTER, _POINTER]
        self._encode.argtypes = [number, number, number, _POINTER, _POINTER, _POINTER]
        self._update.argtypes = [number, number, number, number, *[_POINTER] * 3]
        for function in (self._init, self._encode, self._update):
            function.restype = None
        self._tables = lru_cache(maxsize=256)(self._make_tables)
        check(self)

    def run(
        self, coefficients: Matrix, inputs: Sequence[Row], outputs: Sequence[Row],
        start: int, stop: int, *, add: bool = False,
    ) -> None:  # fmt: skip
        """See `Backend.run`."""
        rows, columns = coefficients.shape
        tables = self._tables(coefficients.tobytes(), rows)
        sources = [row[0] for row in inputs]
        targets = [row[0] for row in outputs]

        def work(low: int, high: int) -> None:
            for at in range(low, high, _LONGEST):
                length = min(high - at, _LONGEST)
                into = (_POINTER * rows)(*[a + at for a in targets])
                if add:
                    for j, a in enumerate(sources):
                        self._update(length, columns, rows, j, tables, a + at, into)
                else:
                    data = (_POINTER * columns)(*[a + at for a in sources])
                    self._encode(length, columns, rows, tables, data, into)

        spread(work, start, stop, self._threads)

    def _make_tables(self, coefficients: bytes, rows: int) -> ctypes.Array[ctypes.c_char]:
        columns = len(coefficients) // rows
        tables = ctypes.create_string_buffer(_TABLE_BYTES * len(coefficients))
        self._init(columns, rows, coefficients, tables)
        return tables
