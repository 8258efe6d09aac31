"""Reading state of any shape and place as the bytes of a row-major array."""

import ctypes

import torch

from planaria.checkpoint.capture.kernels import copy_bytes
from planaria.checkpoint.format.checksum import checksum
from planaria.core.box import row_major_blocks
from planaria.errors import TornCaptureError


class Source:
    """The live data behind one file entry.

    Args:
        data: Detached tensor; any strides, any device.

    Attributes:
        address: Where its bytes lie one after the other on the host; None if they do not.
        nbytes: How many they are.
    """

    __slots__ = ("address", "data", "nbytes")

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data
        self.nbytes = data.numel() * data.element_size()
        # Straight from memory where that is possible: no torch call, no GIL.
        self.address = data.data_ptr() if is_plain(data) else None

    @classmethod
    def plain(cls, data: torch.Tensor, address: int, nbytes: int) -> "Source":
        """The same for data that is known to lie on the host as plain bytes."""
        source = cls.__new__(cls)
        source.data, source.address, source.nbytes = data, address, nbytes
        return source

    def copy_to(self, buffer: torch.Tensor, at: int, start: int, stop: int) -> None:
        """Copies bytes [start, stop) of the row-major data to `buffer` from byte `at` on.

        `buffer` is uint8, on the host or on the source's device; the range is whole elements. From
        a device the copy is queued on the current stream.
        """
        if self.address is not None:
            copy_bytes(buffer.data_ptr() + at, self.address + start, stop - start)
            return
        size = self.data.element_size()
        window = buffer[at : at + stop - start].view(self.data.dtype)
        done = 0
        for block in row_major_blocks(tuple(self.data.shape), start // size, stop // size):
            part = self.data[block.slices()] if block.extent else self.data
            window[done : done + block.volume].view(part.shape).copy_(part, non_blocking=True)
            done += block.volume

    def checksum(self, start: int, stop: int) -> int:
        """The checksum of bytes [start, stop) of host memory as they are now."""
        if self.address is not None:
            return checksum((ctypes.c_ubyte * (stop - start)).from_address(self.address + start))
        buffer = torch.empty(stop - start, dtype=torch.uint8)
        self.copy_to(buffer, 0, start, stop)
        return checksum(buffer.numpy())

    @property
    def in_place(self) -> bool:
        """Whether its memory is where it was: what was freed or moved must not be read."""
        return self.address is None or self.data.data_ptr() == self.address

    def check_in_place(self, name: str) -> None:
        """Raises TornCaptureError if its memory was freed or moved: reading it ends the process."""
        if not self.in_place:
            raise TornCaptureError(
                f"the memory of {name} was freed or moved while it was being captured; call "
                "ckpt.before_update() first"
            )

    def version(self) -> tuple[int, int]:
        """Cheap signs of a change: torch's version counter and the address of the data."""
        version = -1 if self.data.is_inference() else self.data._version
        return version, self.data.data_ptr()


def is_plain(data: torch.Tensor) -> bool:
    """Whether the bytes of a row-major array are what lies in host memory."""
    return data.is_contiguous() and data.is_cpu and not data.is_conj() and not data.is_neg()
