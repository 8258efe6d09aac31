"""Tensors that are copied at the call of a save, all of them in one go.

What may change at any time must be copied then. What is small is copied then as well: to watch a
tensor until it was captured (whose memory it is, whether that was moved, its version) costs more
than to copy a kilobyte of it, and what was copied is nobody's to change.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from planaria.checkpoint.capture.aligned import aligned_bytes
from planaria.checkpoint.capture.kernels import copy_pieces
from planaria.checkpoint.state.entries import KnownTensor

#: A tensor of up to so many bytes is small, and so many bytes of small ones are copied at the call.
SMALL_NBYTES, ALL_SMALL_NBYTES = 2048, 16 << 20
#: A room of up to so many bytes is kept from save to save: fresh memory costs more than the copy.
_KEPT_NBYTES = 32 << 20
#: What each tensor's place is a multiple of: elements have up to 16 bytes.
_ALIGNMENT = 16


def small(rows: Iterable[int], known: Sequence[KnownTensor]) -> set[int]:
    """Those of some rows that are better copied at the call than watched."""
    found, left = set[int](), ALL_SMALL_NBYTES
    for row in rows:
        nbytes = known[row].nbytes
        if known[row].plain and nbytes <= min(SMALL_NBYTES, left):
            found.add(row)
            left -= nbytes
    return found


class EarlyCopies:
    """Copies tensors that lie on the host as plain bytes, where they have not moved.

    Args:
        rows: Their rows.
        known: What is known of the tensors, by row.

    Attributes:
        places: Row -> the first byte of its copy in a room.
    """

    def __init__(self, rows: Sequence[int], known: Sequence[KnownTensor]) -> None:
        sizes = np.array([known[row].nbytes for row in rows], dtype=np.int64)
        ends = np.cumsum(-(-sizes // _ALIGNMENT) * _ALIGNMENT)
        starts = ends - -(-sizes // _ALIGNMENT) * _ALIGNMENT
        self.places: dict[int, int] = dict(zip(rows, starts.tolist(), strict=True))
        addresses = np.array([known[row].address for row in rows], dtype=np.int64)
        self._pieces = starts, addresses, sizes
        self._nbytes = int(ends[-1]) if rows else 0
        self._rooms: list[torch.Tensor] = []

    def take(self) -> torch.Tensor:
        """The tensors as they are now, in a room of one's own, uint8[n]."""
        try:
            room = self._rooms.pop()
        except IndexError:
            room = aligned_bytes(self._nbytes)
        copy_pieces(room.data_ptr(), *self._pieces)
        return room

    def give_back(self, room: torch.Tensor) -> None:
        """Once nobody reads it any more: the next save may have the room."""
        if not self._rooms and self._nbytes <= _KEPT_NBYTES:
            self._rooms.append(room)
