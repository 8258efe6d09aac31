"""What a backend does: rows times coefficients, over a range of bytes. All give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from planaria.checkpoint.erasure.field import Matrix, multiply
from planaria.errors import ConfigError, NotSupportedError


class Backend(Protocol):
    """Multiplies rows of bytes by a matrix over GF(2^8).

    A *row* is what `row` makes of a caller's buffer: one dimension of bytes, not copied.
    """

    name: str

    def row(self, buffer: Any, what: str, *, writable: bool = False) -> Any:
        """A caller's buffer as a row, without a copy.

        Raises:
            ConfigError: It is not one dimension of contiguous bytes, or not writable.
        """
        ...

    def empty(self, rows: int, nbytes: int, like: Any) -> Any:
        """A new uint8[rows, nbytes], where `like` (a row) lies; its content is undefined."""
        ...

    def copy(self, source: Any, target: Any) -> None:
        """Copies a row; a shorter source is followed by zeros."""
        ...

    def overlap(self, a: Any, b: Any) -> bool:
        """Whether two rows share a byte."""
        ...

    def run(
        self, coefficients: Matrix, inputs: Sequence[Any], outputs: Sequence[Any],
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


class HostRows:
    """Rows in host memory: numpy arrays."""

    def row(self, buffer: Any, what: str, *, writable: bool = False) -> np.ndarray:
        """See `Backend.row`."""
        if not isinstance(buffer, np.ndarray):
            try:
                buffer = np.frombuffer(buffer, np.uint8)
            except (TypeError, ValueError, AttributeError) as error:
                raise ConfigError(f"{what} is no buffer of contiguous bytes: {error}") from error
        if buffer.dtype != np.uint8 or buffer.ndim != 1:
            raise ConfigError(f"{what} must be uint8[n], not {buffer.dtype}{list(buffer.shape)}")
        if not buffer.flags.c_contiguous:
            raise ConfigError(f"{what} must be contiguous")
        if writable and not buffer.flags.writeable:
            raise ConfigError(f"{what} cannot be written to")
        return buffer

    def empty(self, rows: int, nbytes: int, like: Any) -> np.ndarray:
        """See `Backend.empty`."""
        return np.empty((rows, nbytes), np.uint8)

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """See `Backend.copy`."""
        target[: source.size] = source
        target[source.size :] = 0

    def overlap(self, a: np.ndarray, b: np.ndarray) -> bool:
        """See `Backend.overlap`."""
        return np.may_share_memory(a, b)  # exact for contiguous rows: it compares their bounds


def address(row: np.ndarray) -> int:
    """Where a row begins."""
    return row.__array_interface__["data"][0]


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
        result = backend.empty(3, nbytes, backend.row(data[0], "a row"))
        result[:] = 0x35
        inputs = [backend.row(row, "a row") for row in data]
        backend.run(coefficients, inputs, list(result), 0, nbytes, add=add)
        if not np.array_equal(np.asarray(result), expected ^ (0x35 if add else 0)):
            raise NotSupportedError(f"the erasure backend {backend.name} computes in another field")
