"""Cutting a file's data section into chunks: worked out once for a plan, used by every save.

A chunk is a fixed range of the data section, whatever tensors fall into it: small tensors are
coalesced, large ones are cut, and each chunk becomes one large write.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planaria.checkpoint.format.dtypes import StoredDtype
from planaria.checkpoint.format.safetensors import FileEntry

Run = tuple[StoredDtype, int, int]
"""Adjacent pieces of a chunk of one dtype: the dtype, the first and one past the last."""


@dataclass(frozen=True)
class ChunkLayout:
    """What one chunk is made of: pieces of entries, in order.

    Attributes:
        names: Name of each piece's tensor.
        numbers: Which entry of the file each piece belongs to, int64[n].
        starts: First byte of each piece within its entry, int64[n].
        places: First byte of each piece within the chunk, int64[n].
        sizes: Bytes of each piece, int64[n].
        runs: What of it has one dtype.
        nbytes: Length of the chunk.
    """

    names: list[str]
    numbers: np.ndarray
    starts: np.ndarray
    places: np.ndarray
    sizes: np.ndarray
    runs: list[Run]
    nbytes: int

    @cached_property
    def pieces_of(self) -> dict[str, list[int]]:
        """Name -> which pieces are its tensor's, in order."""
        found: dict[str, list[int]] = {}
        for i, name in enumerate(self.names):
            found.setdefault(name, []).append(i)
        return found

    def span(self, first: int, last: int) -> slice:
        """Bytes of the chunk that pieces [first, last) take."""
        return slice(int(self.places[first]), int(self.places[last - 1] + self.sizes[last - 1]))


def cut(entries: Sequence[FileEntry], chunk_nbytes: int) -> list[ChunkLayout]:
    """The chunks of a data section with these entries.

    Args:
        entries: In the order of the file, without holes.
        chunk_nbytes: Length of every chunk but the last.
    """
    chunks: list[ChunkLayout] = []
    pieces: list[tuple[int, int, int, int]] = []
    for number, entry in enumerate(entries):
        start = 0
        while start < entry.nbytes:
            place = (entry.start + start) % chunk_nbytes
            size = min(entry.nbytes - start, chunk_nbytes - place)
            pieces.append((number, start, place, size))
            if place + size == chunk_nbytes:
                chunks.append(_chunk(entries, pieces))
                pieces = []
            start += size
    if pieces:
        chunks.append(_chunk(entries, pieces))
    return chunks


def _chunk(
    entries: Sequence[FileEntry], pieces: Sequence[tuple[int, int, int, int]]
) -> ChunkLayout:
    numbers, starts, places, sizes = np.array(pieces, dtype=np.int64).T.copy()
    # Entries are sorted by dtype, so there are few runs.
    runs: list[Run] = []
    for i, (number, *_) in enumerate(pieces):
        dtype = entries[number].dtype
        if runs and runs[-1][0] == dtype:
            runs[-1] = (dtype, runs[-1][1], i + 1)
        else:
            runs.append((dtype, i, i + 1))
    names = [entries[number].name for number, *_ in pieces]
    return ChunkLayout(names, numbers, starts, places, sizes, runs, pieces[-1][2] + pieces[-1][3])
