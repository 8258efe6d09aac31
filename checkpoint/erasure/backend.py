"""What a backend does: rows times coefficients, over a range of bytes. All give the same bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from planaria.checkpoint.erasure.field import Matrix, multiply
from planaria.errors import ConfigError, NotSupportedError

#: Address, length in bytes, and the buffer that lies there. A plain tuple: a call makes many.
Row = tuple[int, int, Any]


class Backend(Protocol):
    """Multiplies rows of bytes by a matrix over GF(2^8)."""

    name: str

    def rows(self, buffers: Any, what: str, *, writable: bool = False) -> list[Row]:
        """A caller's uint8[rows, n], or buffers, as rows, without a copy.

        Raises:
            ConfigError: One is not one dimension of contiguous bytes, or not writable.
        """
        ...

    def empty(self, rows: int, nbytes: int, like: Row) -> Any:
        """A new uint8[rows, nbytes] where `like` lies; its content is undefined."""
        ...

    def copy(self, source: Row, target: Row) -> None:
        """Copies a row; a shorter source is followed by zeros."""
        ...

    def clear(self, row: Row, start: int, stop: int) -> None:
        """Sets some bytes to zero."""
        ...

    def run(
        self, coefficients: Matrix, inputs: Sequence[Row], outputs: Sequence[Row],
        start: int, stop: int, *, add: bool = False,
    ) -> None:  # fmt: skip
        """Sets ``outputs[r][start:stop]`` to the sum of ``coefficients[r, j] * inputs[j]`` there.

        Args:
            coefficients: uint8[rows, columns], both >= 1.
            inputs: As many rows as there are columns.
            outputs: As many rows as the matrix has; none overlaps an input or another output.
            start: First byte.
            stop: One past the last byte.
            add: Adds (XOR) to what the outputs hold.
        """
        ...


_BYTES = np.dtype(np.uint8)
_first_byte: Any = ctypes.c_char.from_buffer
_address = ctypes.addressof


class HostRows:
    """Rows in host memory."""

    def rows(self, buffers: Any, what: str, *, writable: bool = False) -> list[Row]:
        """See `Backend.rows`."""
        if isinstance(buffers, np.ndarray) and buffers.ndim == 2:
            count, nbytes = buffers.shape
            if count and nbytes:
                first = _row(buffers[0], what, 0, writable)[0]
                step = buffers.strides[0]
                return [(first + i * step, nbytes, buffers) for i in range(count)]
        return [_row(each, what, i, writable) for i, each in enumerate(buffers)]

    def empty(self, rows: int, nbytes: int, like: Row) -> np.ndarray:
        """See `Backend.empty`."""
        return np.empty((rows, nbytes), np.uint8)

    def copy(self, source: Row, target: Row) -> None:
        """See `Backend.copy`."""
        ctypes.memmove(target[0], source[0], source[1])
        self.clear(target, source[1], target[1])

    def clear(self, row: Row, start: int, stop: int) -> None:
        """See `Backend.clear`."""
        ctypes.memset(row[0] + start, 0, stop - start)


def _row(buffer: Any, what: str, i: int, writable: bool) -> Row:
    if not isinstance(buffer, np.ndarray):
        try:
            buffer = np.frombuffer(buffer, np.uint8)
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"row {i} of {what} is no buffer of bytes: {error}") from error
    flags = buffer.flags
    if buffer.dtype != _BYTES or buffer.ndim != 1 or not flags.c_contiguous:
        raise ConfigError(
            f"row {i} of {what} must be contiguous uint8[n], not {buffer.dtype}"
            f"{list(buffer.shape)} with strides {list(buffer.strides)}"
        )
    nbytes = buffer.size
    if flags.writeable:
        # Three times faster than numpy's own ways to tell an address.
        return (_address(_first_byte(buffer)) if nbytes else 0), nbytes, buffer
    if writable:
        raise ConfigError(f"row {i} of {what} cannot be written to")
    return buffer.__array_interface__["data"][0], nbytes, buffer


def check(backend: Backend) -> None:
    """Lets a backend compute something, and compares it: it is compiled, and the library is right.

    Raises:
        NotSupportedError: The result differs from that of our own arithmetic.
    """
    nbytes = 259
    coefficients = np.array([[1, 1, 1], [1, 2, 4], [0x8E, 0x53, 0xFF]], np.uint8)
    data = (np.arange(3 * nbytes) * 7).astype(np.uint8).reshape(3, nbytes)
    expected = multiply(coefficients, data)
    for add in (False, True):
        inputs = backend.rows(data, "a check")
        result = backend.empty(3, nbytes, inputs[0])
        result[:] = 0x35
        backend.run(coefficients, inputs, backend.rows(result, "a check"), 0, nbytes, add=add)
        if not np.array_equal(np.asarray(result), expected ^ (0x35 if add else 0)):
            raise NotSupportedError(f"the erasure backend {backend.name} computes in another field")
