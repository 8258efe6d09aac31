"""Reading state of any shape and place as the bytes of a row-major array."""

import ctypes
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Protocol

import torch

from planaria.checkpoint.capture.kernels import copy_bytes
from planaria.checkpoint.format.checksum import checksum
from planaria.core.box import row_major_blocks
from planaria.errors import TornCaptureError

_HOST = torch.device("cpu")


class Source:
    """The live data behind one file entry.

    Args:
        data: Detached tensor; any strides, any device.

    Attributes:
        address: Where its bytes lie one after the other on the host; None if they do not.
        nbytes: How many they are.
        device: Where they lie.
    """

    __slots__ = ("_base", "_data", "_memory", "address", "device", "nbytes")

    def __init__(self, data: torch.Tensor) -> None:
        # Straight from memory where that is possible: no torch call, no GIL.
        self.address = data.data_ptr() if is_plain(data) else None
        self.nbytes = data.numel() * data.element_size()
        self.device = data.device
        self._data, self._memory, self._base = data, data, data.data_ptr()

    @classmethod
    def plain(
        cls,
        memory: torch.Tensor | torch.UntypedStorage,
        address: int,
        nbytes: int,
        base: int | None = None,
    ) -> "Source":
        """The same for data that is known to lie on the host as plain bytes.

        Args:
            memory: Keeps it alive.
            address: First byte.
            nbytes: How many.
            base: Where `memory` itself begins; where the data does by default.
        """
        source = cls.__new__(cls)
        source.address, source.nbytes, source.device = address, nbytes, _HOST
        source._data = memory if isinstance(memory, torch.Tensor) else None
        source._memory, source._base = memory, address if base is None else base
        return source

    def copy_to(self, buffer: torch.Tensor, at: int, start: int, stop: int) -> None:
        """Copies bytes [start, stop) of the row-major data to `buffer` from byte `at` on.

        `buffer` is uint8, on the host or on the source's device; the range is whole elements. From
        a device the copy is queued on the current stream.
        """
        if self.address is not None:
            copy_bytes(buffer.data_ptr() + at, self.address + start, stop - start)
            return
        data = self._data
        assert data is not None  # only plain data may come without
        size = data.element_size()
        window = buffer[at : at + stop - start].view(data.dtype)
        done = 0
        for block in row_major_blocks(tuple(data.shape), start // size, stop // size):
            part = data[block.slices()] if block.extent else data
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
        return self.address is None or not self.moved

    def check_in_place(self, name: str) -> None:
        """Raises TornCaptureError if its memory was freed or moved: reading it ends the process."""
        if not self.in_place:
            raise gone(name)

    @property
    def version(self) -> int:
        """A cheap sign of a change: torch's version counter."""
        data = self._data
        return data._version if data is not None and not data.is_inference() else -1

    @property
    def moved(self) -> bool:
        """Whether its memory is elsewhere now."""
        return self._memory.data_ptr() != self._base


class Watched(Protocol):
    """Sources that are captured lazily, and cheap signs of a change of any of them."""

    @property
    def names(self) -> Sequence[str]:
        """Their names."""
        ...

    @property
    def ends(self) -> Sequence[int]:
        """The sum of their bytes up to each of them."""
        ...

    def source(self, name: str) -> Source:
        """The source of this name."""
        ...

    def signs(self) -> list[int]:
        """What changes with most changes of the data: a number for each name."""
        ...

    def moved(self) -> Sequence[str]:
        """Names of those whose memory is not where it was."""
        ...


class Sources:
    """Sources by name.

    Args:
        of: The sources.
    """

    def __init__(self, of: Mapping[str, Source]) -> None:
        self._of = of
        self.names = list(of)
        self.ends = list(accumulate(source.nbytes for source in of.values()))

    def source(self, name: str) -> Source:
        """See `Watched.source`."""
        return self._of[name]

    def signs(self) -> list[int]:
        """See `Watched.signs`."""
        return [source.version for source in self._of.values()]

    def moved(self) -> list[str]:
        """See `Watched.moved`."""
        return [name for name, source in self._of.items() if source.moved]


def is_plain(data: torch.Tensor) -> bool:
    """Whether the bytes of a row-major array are what lies in host memory."""
    return data.is_contiguous() and data.is_cpu and not data.is_conj() and not data.is_neg()


def gone(name: str) -> TornCaptureError:
    """The error for memory that was given back too early."""
    return TornCaptureError(
        f"the memory of {name} was freed or moved while it was being captured; call "
        "ckpt.before_update() first"
    )
