"""The backend for tensors: torch's own operations, on the CPU or on a GPU, where the rows lie."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from planaria.checkpoint.erasure.backend import HostRows, Row, check
from planaria.checkpoint.erasure.field import Matrix
from planaria.errors import ConfigError

_REDUCTION = 0x1D
# Bytes worked on at a time. On a CPU too few for torch to wake threads, which costs more than they
# bring; on a GPU many, as each operation is a launch.
_BLOCK = {"cpu": 24 << 10}
_GPU_BLOCK = 16 << 20


class Tensors:
    """Rows are tensors uint8[n] on one device; host buffers are taken, too, as CPU tensors."""

    name = "torch"

    def __init__(self) -> None:
        self._host = HostRows()
        check(self)

    def rows(self, buffers: Any, what: str, *, writable: bool = False) -> list[Row]:
        """See `Backend.rows`."""
        return [self._row(b, f"row {i} of {what}", writable) for i, b in enumerate(buffers)]

    def _row(self, buffer: Any, what: str, writable: bool) -> Row:
        tensor = buffer
        if not isinstance(buffer, torch.Tensor):
            start, nbytes, array = self._host.rows([buffer], what, writable=writable)[0]
            if not nbytes:
                tensor = torch.empty(0, dtype=torch.uint8)
            elif array.flags.writeable:
                tensor = torch.from_numpy(array)
            else:
                # torch knows no read-only tensors and would warn; nothing here writes to an input,
                # and the caller holds the buffer until the call is over.
                memory = (ctypes.c_ubyte * nbytes).from_address(start)
                tensor = torch.frombuffer(memory, dtype=torch.uint8)
        if tensor.dtype != torch.uint8 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise ConfigError(
                f"{what} must be contiguous uint8[n], not {tensor.dtype}{list(tensor.shape)}"
            )
        return tensor.data_ptr(), tensor.numel(), tensor.detach()

    def empty(self, rows: int, nbytes: int, like: Row) -> torch.Tensor:
        """See `Backend.empty`."""
        return torch.empty(rows, nbytes, dtype=torch.uint8, device=like[2].device)

    def copy(self, source: Row, target: Row) -> None:
        """See `Backend.copy`."""
        target[2][: source[1]].copy_(source[2])
        self.clear(target, source[1], target[1])

    def clear(self, row: Row, start: int, stop: int) -> None:
        """See `Backend.clear`."""
        row[2][start:stop] = 0

    def run(
        self, coefficients: Matrix, inputs: Sequence[Row], outputs: Sequence[Row],
        start: int, stop: int, *, add: bool = False,
    ) -> None:  # fmt: skip
        """See `Backend.run`; on a GPU it returns once the work is in the current stream."""
        devices = {row[2].device for row in (*inputs, *outputs)}
        if len(devices) > 1:
            raise ConfigError(f"rows lie on several devices: {sorted(map(str, devices))}")
        block = _BLOCK.get(outputs[0][2].device.type, _GPU_BLOCK)
        for low in range(start, stop, block):
            high = min(low + block, stop)
            parts = [row[2][low:high] for row in inputs]
            for r, (_, _, row) in enumerate(outputs):
                total = _sum(coefficients[r].tolist(), parts)
                row[low:high] = row[low:high] ^ total if add else total


def _sum(coefficients: list[int], parts: list[torch.Tensor]) -> torch.Tensor:
    """``sum_j coefficients[j] * parts[j]`` by Horner's rule over the bits, as in `kernels`."""
    total = torch.zeros_like(parts[0])
    begun = False
    for bit in range(7, -1, -1):
        if begun:
            carry = (total >> 7).mul_(_REDUCTION)
            total = total.bitwise_left_shift_(1).bitwise_xor_(carry)
        for coefficient, part in zip(coefficients, parts, strict=True):
            if coefficient >> bit & 1:
                total.bitwise_xor_(part)
                begun = True
    return total
