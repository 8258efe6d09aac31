"""The backend for tensors: torch's own operations, on the CPU or on a GPU, where the rows lie."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from planaria.checkpoint.erasure.backend import HostRows, address, check
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

    def row(self, buffer: Any, what: str, *, writable: bool = False) -> torch.Tensor:
        """See `Backend.row`."""
        if not isinstance(buffer, torch.Tensor):
            array = self._host.row(buffer, what, writable=writable)
            if array.flags.writeable or not array.size:
                return torch.from_numpy(array if array.size else array.copy())
            # torch knows no read-only tensors and would warn; nothing here writes to an input, and
            # the caller holds the buffer until the call is over.
            memory = (ctypes.c_ubyte * array.size).from_address(address(array))
            return torch.frombuffer(memory, dtype=torch.uint8)
        if buffer.dtype != torch.uint8 or buffer.dim() != 1:
            raise ConfigError(f"{what} must be uint8[n], not {buffer.dtype}{list(buffer.shape)}")
        if not buffer.is_contiguous():
            raise ConfigError(f"{what} must be contiguous")
        return buffer.detach()

    def empty(self, rows: int, nbytes: int, like: torch.Tensor) -> torch.Tensor:
        """See `Backend.empty`."""
        return torch.empty(rows, nbytes, dtype=torch.uint8, device=like.device)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """See `Backend.copy`."""
        target[: len(source)].copy_(source)
        target[len(source) :] = 0

    def overlap(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """See `Backend.overlap`."""
        first, second = a.data_ptr(), b.data_ptr()
        apart = first >= second + b.numel() or second >= first + a.numel()
        return a.device == b.device and not apart

    def run(
        self, coefficients: Matrix, inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor], start: int, stop: int, *, add: bool = False,
    ) -> None:  # fmt: skip
        """See `Backend.run`; on a GPU it returns once the work is in the current stream."""
        devices = {row.device for row in (*inputs, *outputs)}
        if len(devices) > 1:
            raise ConfigError(f"rows lie on several devices: {sorted(map(str, devices))}")
        block = _BLOCK.get(outputs[0].device.type, _GPU_BLOCK)
        for low in range(start, stop, block):
            high = min(low + block, stop)
            parts = [row[low:high] for row in inputs]
            for r, row in enumerate(outputs):
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
