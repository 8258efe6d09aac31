"""Encoding, decoding and updating the rows of a stripe; checks what it is given, once for all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from planaria.checkpoint.erasure.backend import Backend, Row
from planaria.checkpoint.erasure.field import Matrix
from planaria.checkpoint.erasure.matrices import MAX_ROWS, chosen, parity_matrix, rebuild_matrix
from planaria.errors import ConfigError, CorruptError

#: A uint8[rows, n] array, or its rows one by one: any contiguous buffers of bytes.
Rows = Any


class Codec:
    """A systematic code: k data rows, m parity rows, of which any m may be lost.

    Row i of a stripe is data for i < k, parity i - k for k <= i < k + m. Rows are buffers of bytes
    (numpy, bytearray, memoryview; tensors with the backend "torch"), and are never copied. Inputs
    may be shorter than the stripe: from their end on they count as zeros. Backends give the same
    bytes. Calls may come from any number of threads, and give up the GIL while they compute.

    Attributes:
        k: Data rows.
        m: Parity rows.
        backend: Name of what computes: "isal", "numba" or "torch".
    """

    def __init__(self, k: int, m: int, backend: Backend) -> None:
        """Made by `make_codec`.

        Raises:
            ConfigError: k or m are out of range.
        """
        for name, value in (("k", k), ("m", m)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"{name} of an erasure code must be a whole number, not {value!r}"
                )
        if k + m > MAX_ROWS:
            raise ConfigError(f"an erasure code has at most {MAX_ROWS} rows, not {k} + {m}")
        self.k, self.m = k, m
        self.backend = backend.name
        self._backend = backend

    @property
    def matrix(self) -> Matrix:
        """The parity's coefficients, uint8[m, k], read-only."""
        return parity_matrix(self.k, self.m)

    def encode(self, data: Rows, out: Rows | None = None) -> Any:
        """The parity of k data rows.

        Args:
            data: uint8[k, n], or k rows.
            out: uint8[m, n], or m rows of one length, to be overwritten; by default new ones.

        Returns:
            `out`, or a new uint8[m, n].

        Raises:
            ConfigError: A number of rows, a length, a dtype is wrong, or `out` overlaps the data.
        """
        inputs = self._rows(data, self.k, "data")
        if out is None:
            out = self._backend.empty(self.m, max(row[1] for row in inputs), inputs[0])
        outputs = self._rows(out, self.m, "out", writable=True)
        self._combine(self.matrix, inputs, outputs)
        return out

    def encode_spans(self, data: Rows, parity: Rows, spans: Iterable[tuple[int, int]]) -> None:
        """Brings the parity up to date where data has changed, and leaves the rest of it alone.

        Args:
            data: uint8[k, n], or k rows, as they are now.
            parity: uint8[m, n], or m rows, as they were.
            spans: (start, stop) in bytes of what has changed in any row.

        Raises:
            ConfigError: As in `encode`, or a span lies outside of the rows.
        """
        inputs = self._rows(data, self.k, "data")
        outputs = self._rows(parity, self.m, "parity", writable=True)
        self._combine(self.matrix, inputs, outputs, spans=spans)

    def update(self, parity: Rows, index: int, old: Any, new: Any) -> None:
        """Brings the parity up to date after one data row has changed, from that row alone.

        Args:
            parity: uint8[m, n], or m rows.
            index: Which data row has changed.
            old: The row that the parity was made from, uint8[n].
            new: The row as it is now, uint8[n].

        Raises:
            ConfigError: As in `encode`, or there is no such data row.
        """
        if not 0 <= index < self.k:
            raise ConfigError(f"there is no data row {index} of {self.k}")
        inputs = self._rows([old, new], 2, "old and new")
        outputs = self._rows(parity, self.m, "parity", writable=True)
        column = self.matrix[:, index]
        self._combine(np.stack([column, column], axis=1), inputs, outputs, add=True)

    def decode(self, parts: Mapping[int, Any], out: Rows | None = None) -> Any:
        """All data rows, from any k rows.

        Args:
            parts: Index -> row uint8[n], at least k of them; what they hold is trusted.
            out: uint8[k, n], or k rows, to be overwritten; by default new ones.

        Returns:
            `out`, or a new uint8[k, n].

        Raises:
            CorruptError: There are fewer than k parts.
            ConfigError: An index, a length, a dtype is wrong, or `out` overlaps the parts.
        """
        there = self._parts(parts)
        if out is None:
            rows = list(there.values())
            out = self._backend.empty(self.k, max(row[1] for row in rows), rows[0])
        outputs = self._rows(out, self.k, "out", writable=True)
        self._rebuild(there, dict(enumerate(outputs)))
        return out

    def rebuild(self, parts: Mapping[int, Any], wanted: Mapping[int, Any]) -> None:
        """Only some rows, data or parity, from any k rows.

        Args:
            parts: Index -> row uint8[n], at least k of them; what they hold is trusted.
            wanted: Index -> buffer uint8[n] to write that row to.

        Raises:
            CorruptError: There are fewer than k parts.
            ConfigError: An index, a length, a dtype is wrong, or buffers overlap.
        """
        there = self._parts(parts)
        self._index_check(wanted)
        outputs = self._rows(list(wanted.values()), len(wanted), "wanted", writable=True)
        self._rebuild(there, dict(zip(wanted, outputs, strict=True)))

    def _rebuild(self, parts: dict[int, Row], wanted: dict[int, Row]) -> None:
        lost = {i: row for i, row in wanted.items() if i not in parts}
        have = chosen(self.k, set(parts))
        if lost:
            coefficients = rebuild_matrix(self.k, self.m, have, tuple(lost))
            self._combine(coefficients, [parts[i] for i in have], list(lost.values()))
        if len(lost) == len(wanted):
            return
        _check_overlaps(list(parts.values()), list(wanted.values()))
        for i in wanted.keys() - lost.keys():
            if parts[i][1] > wanted[i][1]:
                raise ConfigError(f"row {i} has {parts[i][1]} bytes, its buffer {wanted[i][1]}")
            self._backend.copy(parts[i], wanted[i])

    def _parts(self, parts: Mapping[int, Any]) -> dict[int, Row]:
        self._index_check(parts)
        if len(parts) < self.k:
            raise CorruptError(
                f"{len(parts)} of {self.k + self.m} parts are left; {self.k} are needed to decode"
            )
        return dict(zip(parts, self._backend.rows(list(parts.values()), "parts"), strict=True))

    def _index_check(self, rows: Mapping[int, Any]) -> None:
        if rows and not (min(rows) >= 0 and max(rows) < self.k + self.m):
            raise ConfigError(f"there are no rows {sorted(rows)} of {self.k} + {self.m}")

    def _rows(self, rows: Rows, count: int, what: str, *, writable: bool = False) -> list[Row]:
        if len(rows) != count:
            raise ConfigError(f"{what} must be {count} rows, not {len(rows)}")
        return self._backend.rows(rows, what, writable=writable)

    def _combine(
        self, coefficients: Matrix, inputs: Sequence[Row], outputs: Sequence[Row],
        *, add: bool = False, spans: Iterable[tuple[int, int]] | None = None,
    ) -> None:  # fmt: skip
        """Checks lengths and overlaps, then computes: where rows have ended, without them."""
        nbytes = outputs[0][1]
        if {row[1] for row in outputs} != {nbytes}:
            raise ConfigError(f"output rows differ in length: {[row[1] for row in outputs]}")
        lengths = {row[1] for row in inputs}
        longest = max(lengths)
        if longest > nbytes:
            raise ConfigError(f"an input row has {longest} bytes, the output {nbytes}")
        _check_overlaps(inputs, outputs)
        if spans is None and nbytes and lengths == {nbytes}:
            self._backend.run(coefficients, inputs, outputs, 0, nbytes, add=add)
            return
        edges = sorted({0, nbytes, *lengths})
        for span in [(0, nbytes)] if spans is None else spans:
            if not 0 <= span[0] <= span[1] <= nbytes:
                raise ConfigError(f"bytes {span[0]} to {span[1]} are outside of {nbytes}")
            for low, high in pairwise(edges):
                start, stop = max(low, span[0]), min(high, span[1])
                if start < stop:
                    self._run(coefficients, inputs, outputs, start, stop, add)

    def _run(
        self, coefficients: Matrix, inputs: Sequence[Row], outputs: Sequence[Row],
        start: int, stop: int, add: bool,
    ) -> None:  # fmt: skip
        there = [j for j, row in enumerate(inputs) if row[1] >= stop]
        if len(there) < len(inputs):
            coefficients = np.ascontiguousarray(coefficients[:, there])
            inputs = [inputs[j] for j in there]
        if inputs:
            self._backend.run(coefficients, inputs, outputs, start, stop, add=add)
        elif not add:
            for row in outputs:
                self._backend.clear(row, start, stop)


def _check_overlaps(inputs: Sequence[Row], outputs: Sequence[Row]) -> None:
    """Makes sure that what is written is neither read nor written as another row."""
    spans = [(row[0], row[0] + row[1], False) for row in inputs]
    spans += [(row[0], row[0] + row[1], True) for row in outputs]
    spans.sort()
    read = written = 0
    for start, stop, output in spans:
        if (start < written or (output and start < read)) and start < stop:
            raise ConfigError("a row that is written overlaps another one")
        if stop > read:
            read = stop
        if output and stop > written:
            written = stop
