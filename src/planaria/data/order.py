"""Which sample stands where: seeded permutations in constant memory, and balanced cuts."""

import functools
import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planaria.errors import ConfigError

ALGORITHM = "feistel-sqrt8/1"
"""Name and version of the permutation. It is part of every saved position: whoever changes an
order that has been released must raise the version."""

MAX_LENGTH = 2**62
_ROUNDS = 8
_SORTED_UP_TO = 1024

_Words = NDArray[np.uint64]


class Permutation:
    """A seeded random permutation of `range(length)` that is never written down.

    A generalised Feistel network on pairs of residues modulo `ceil(sqrt(length))`, with cycle
    walking for the few numbers that fall outside: J. Black and P. Rogaway, "Ciphers with
    Arbitrary Finite Domains", CT-RSA 2002. M. Luby and C. Rackoff (SIAM J. Computing, 1988)
    show that 4 rounds suffice against large domains; 8 are used here. Round functions are
    keyed with BLAKE2b and mixed with the finaliser of SplitMix64 (G. Steele, D. Lea and
    C. Flood, OOPSLA 2014).

    A Feistel network reaches only a part of the permutations of a very small set, so up to 1024
    elements are sorted by their hash instead, which is uniform and needs at most 8 KiB.

    Args:
        length: Number of elements, 0 to 2**62.
        seed: Seed of the run, any integer.
        epoch: Number of the pass; each has a permutation of its own.
    """

    def __init__(self, length: int, seed: int = 0, epoch: int = 0) -> None:
        if not 0 <= length <= MAX_LENGTH:
            raise ConfigError(f"a permutation of {length} elements: use 0 to 2**62")
        self._length = length
        self._side = np.uint64(math.isqrt(max(length, 1) - 1) + 1)
        digest = hashlib.blake2b(f"{ALGORITHM} {seed} {epoch}".encode(), digest_size=8 * _ROUNDS)
        self._keys = np.frombuffer(digest.digest(), dtype="<u8").astype(np.uint64)
        self._table: NDArray[np.int64] | None = None
        if length <= _SORTED_UP_TO:
            hashes = _mix(_mix(np.arange(length, dtype=np.uint64) ^ self._keys[0]) ^ self._keys[1])
            self._table = np.argsort(hashes, kind="stable").astype(np.int64)

    def __len__(self) -> int:
        return self._length

    def __call__(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Returns the elements at some positions.

        Args:
            positions: Integers in [0, length), any shape.

        Returns:
            The elements, int64, in the shape of `positions`.

        Raises:
            ConfigError: A position lies outside.
        """
        places = np.asarray(positions, dtype=np.int64)
        if places.size and not (places.min() >= 0 and places.max() < self._length):
            raise ConfigError(
                f"positions {places.min()} to {places.max()} of a permutation of "
                f"{self._length} elements: use 0 to {self._length - 1}"
            )
        if self._table is not None:
            return self._table[places]
        words = self._encrypt(places.astype(np.uint64).reshape(-1))
        while (outside := words >= self._length).any():
            words[outside] = self._encrypt(words[outside])
        return words.astype(np.int64).reshape(places.shape)

    def _encrypt(self, words: _Words) -> _Words:
        left, right = np.divmod(words, self._side)
        for key in self._keys:
            # Both terms are reduced before they are added: a sum that wrapped at 2**64 would
            # send two words to one.
            moved = left + _mix(right ^ key) % self._side
            left, right = right, np.where(moved >= self._side, moved - self._side, moved)
        return left * self._side + right


@functools.lru_cache(maxsize=8)
def permutation(length: int, seed: int, epoch: int) -> Permutation:
    """Returns the permutation of an epoch; the latest few are kept."""
    return Permutation(length, seed, epoch)


@dataclass(frozen=True)
class MapOrder:
    """The order of a map-style dataset: epochs of steps of micro-batches.

    Attributes:
        length: Number of samples.
        batch_size: Samples of a step.
        micro_batch_size: Samples of a micro-batch; divides `batch_size`.
        seed: Seed of the run.
        shuffle: Whether each epoch has a permutation of its own; else the dataset's order.
        drop_last: Whether the samples that do not fill an epoch's last step are left out.
    """

    length: int
    batch_size: int
    micro_batch_size: int
    seed: int
    shuffle: bool
    drop_last: bool

    @property
    def n_micro_batches(self) -> int:
        """Micro-batches of a step."""
        return self.batch_size // self.micro_batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch."""
        full, rest = divmod(self.length, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def place(self, step: int, micro_batch: int) -> tuple[int, range]:
        """Returns the epoch of a micro-batch and the places in the epoch that it takes.

        A short last step is spread evenly over all micro-batches: some may be empty.
        """
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        start = step_of_epoch * self.batch_size
        size, count = min(self.batch_size, self.length - start), self.n_micro_batches
        # Few samples are spread out, not heaped up in front: ranks have neighbouring micro-batches.
        return epoch, range(
            start + size * micro_batch // count, start + size * (micro_batch + 1) // count
        )

    def indices(self, step: int, micro_batch: int) -> list[int]:
        """Returns the dataset's indices of a micro-batch."""
        epoch, places = self.place(step, micro_batch)
        if not self.shuffle:
            return list(places)
        order = permutation(self.length, self.seed, epoch)
        return order(np.arange(places.start, places.stop)).tolist()

    def size(self, step: int, micro_batch: int) -> int:
        """Returns the number of samples in a micro-batch."""
        return len(self.place(step, micro_batch)[1])

    def fingerprint(self) -> dict[str, Any]:
        """Returns everything that the order depends on, JSON-able."""
        return {"kind": "map", "algorithm": ALGORITHM, **asdict(self)}


@dataclass(frozen=True)
class StreamOrder:
    """The order of an iterable dataset: one endless stream for each micro-batch of a step.

    Attributes:
        batch_size: Samples of a step.
        micro_batch_size: Samples of a micro-batch; divides `batch_size`.
        seed: Seed of the run; the order does not depend on it, random augmentation does.
    """

    batch_size: int
    micro_batch_size: int
    seed: int

    steps_per_epoch = None

    @property
    def n_micro_batches(self) -> int:
        """Micro-batches of a step."""
        return self.batch_size // self.micro_batch_size

    def size(self, step: int, micro_batch: int) -> int:
        """Returns the number of samples in a micro-batch: all are full."""
        return self.micro_batch_size

    def fingerprint(self) -> dict[str, Any]:
        """Returns everything that the order depends on, JSON-able."""
        return {"kind": "iterable", "algorithm": "streams/1", **asdict(self)}


def cut(total: int, parts: int, index: int) -> range:
    """Returns part `index` of `range(total)` cut into contiguous parts whose sizes differ by <= 1.

    The larger parts come first.
    """
    size, larger = divmod(total, parts)
    start = index * size + min(index, larger)
    return range(start, start + size + (index < larger))


def _mix(words: _Words) -> _Words:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
