"""Copying a chunk of plain host memory and its checksum in one go, where the processor can."""

import numpy as np

from planaria.checkpoint.capture.cutting import ChunkLayout, Run
from planaria.checkpoint.format import checksum

#: What chunks are to begin at: a line of the cache.
_ALIGNMENT = 64


class CheckedCopy:
    """Copies chunks, one after the other, by one thread; only where that is `available`."""

    def __init__(self) -> None:
        from planaria.checkpoint.capture import checked_loops as loops

        self._loops = loops
        memory = np.zeros(loops.BLOCK + _ALIGNMENT, dtype=np.uint8)
        self._memory, self._block = memory, memory.ctypes.data + -memory.ctypes.data % _ALIGNMENT
        self._state = np.zeros(1, dtype=np.uint64)

    @staticmethod
    def available() -> bool:
        """Whether this processor can do it, and new checkpoints have that checksum."""
        from planaria.checkpoint.capture import checked_loops as loops

        return checksum.DEFAULT == "crc32c" and loops.available()

    @staticmethod
    def serves(target: int) -> bool:
        """Whether it can copy to this address."""
        return target % _ALIGNMENT == 0

    def copy(self, target: int, sources: np.ndarray, chunk: ChunkLayout) -> tuple[list[Run], int]:
        """Copies a chunk, past the caches: nobody is to read it soon but the disk.

        Args:
            target: Where to; `serves` holds for it.
            sources: Address that each piece of the chunk lies at, int64[n].
            chunk: What it is made of.

        Returns:
            Those of its runs in which a NaN was seen, and the checksum of what was written.
        """
        found: list[Run] = []
        self._state[0] = self._loops.NOTHING
        for run in chunk.runs:
            dtype, part = run[0], slice(run[1], run[2])
            pieces = chunk.places[part], sources[part], chunk.sizes[part]
            if dtype.nan_above is None:
                width, looked_for = 0, (0, 0, 0)
            else:
                width, looked_for = dtype.nan_width, dtype.nan_above
            if self._add(target, *pieces, width, looked_for):
                found.append(run)
        return found, int(self._loops.finish(target, chunk.nbytes, self._block, self._state))

    def warm(self) -> None:
        """Compiles (or loads) all that it may need."""
        nothing = np.zeros(0, dtype=np.int64)
        self._add(0, nothing, nothing, nothing, 0, (0, 0, 0))
        self._loops.finish(0, 0, self._block, self._state)

    def _add(
        self, target: int, places: np.ndarray, sources: np.ndarray, sizes: np.ndarray,
        width: int, looked_for: tuple[int, int, int],
    ) -> bool:  # fmt: skip
        flip, mask, limit = map(np.uint64, looked_for)
        return bool(
            self._loops.copy_looking(
                target, places, sources, sizes, width, flip, mask, limit, self._block, self._state
            )
        )
