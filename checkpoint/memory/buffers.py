"""An image in shared memory as the buffers that a capture fills: it needs no further copy."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from planaria.checkpoint.capture.pool import Buffer
from planaria.core.deadline import Deadline
from planaria.errors import StateError


class ImageBuffers:
    """The chunks of one image, handed out from front to back, each once.

    Args:
        image: The image, uint8[nbytes].
        data_start: Where its data section begins.
        buffer_nbytes: Length of a chunk.
    """

    #: Nothing is gained by waiting for one of them.
    limit = 2

    def __init__(self, image: NDArray[np.uint8], data_start: int, buffer_nbytes: int) -> None:
        self._image, self._next = image, data_start
        self.buffer_nbytes = buffer_nbytes

    def acquire(self, deadline: Deadline) -> Buffer:
        """The next chunk.

        Raises:
            StateError: All of the image has been handed out.
        """
        start, self._next = self._next, self._next + self.buffer_nbytes
        part = self._image[start : self._next]
        if not part.size:
            raise StateError(f"an image of {self._image.size} bytes has no byte {start}")
        return Buffer(torch.from_numpy(part))

    def release(self, buffer: Buffer, generation: int) -> None:
        """Nothing: the image stays as it is."""

    def check(self, buffer: Buffer, generation: int) -> None:
        """Nothing: no part of an image is handed out twice."""
