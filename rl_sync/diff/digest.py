"""A digest of weights that costs as much to update as there are changes.

The digest of a set of tensors is the sum, modulo 2^128, of a hash of (tensor, position, bits) over
all elements. Addition makes it independent of order and of who holds what: ranks add up theirs,
and a change of one element subtracts its old hash and adds its new one. An element's hash is two
64-bit mixes (the finaliser of SplitMix64, Steele et al. 2014, over a key of the tensor and the
position). It shows damage and a wrong base; it is no protection against a forger, which the
manifest's HMAC is for.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from planaria.rl_sync.compiled import kernel
from planaria.rl_sync.diff.scan import Bits

_MASK = (1 << 64) - 1


@kernel
def _mix(x):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@kernel
def _element(seed, at, bits):
    key = _mix(seed + at * np.uint64(0x9E3779B97F4A7C15))
    return _mix(key + bits * np.uint64(0xD6E8FEB86659FD93))


@kernel
def _dense(seed, first, bits):
    """Both sums over a run of elements with consecutive positions."""
    low = np.uint64(0)
    high = np.uint64(0)
    for i in range(bits.size):
        h = _element(seed, np.uint64(first + i), np.uint64(bits[i]))
        low += h
        high += (h ^ (h >> np.uint64(29))) * np.uint64(0xFF51AFD7ED558CCD)
    return low, high


@kernel
def _at(seed, pos, bits):
    """Both sums over elements at ``pos``."""
    low = np.uint64(0)
    high = np.uint64(0)
    for i in range(bits.size):
        h = _element(seed, np.uint64(pos[i]), np.uint64(bits[i]))
        low += h
        high += (h ^ (h >> np.uint64(29))) * np.uint64(0xFF51AFD7ED558CCD)
    return low, high


@kernel
def _moved(seed, first, pos, old, new):
    """What both sums change by when elements at ``first + pos`` go from old to new bits."""
    low = np.uint64(0)
    high = np.uint64(0)
    for i in range(pos.size):
        at = np.uint64(pos[i]) + first
        h = _element(seed, at, np.uint64(new[i]))
        g = _element(seed, at, np.uint64(old[i]))
        low += h - g
        high += (h ^ (h >> np.uint64(29))) * np.uint64(0xFF51AFD7ED558CCD)
        high -= (g ^ (g >> np.uint64(29))) * np.uint64(0xFF51AFD7ED558CCD)
    return low, high


class Digest:
    """A sum of element hashes; an immutable number of 128 bits."""

    __slots__ = ("value",)

    def __init__(self, value: int = 0) -> None:
        self.value = value

    @classmethod
    def _of(cls, low: int, high: int) -> Digest:
        return cls(int(low) | int(high) << 64)

    @classmethod
    def dense(cls, seed: np.uint64, first: int, bits: Bits) -> Digest:
        """The digest of elements at consecutive positions.

        Args:
            seed: Of the tensor, see :func:`tensor_seed`.
            first: Row-major position in the tensor of the first element.
            bits: Their bits, flat.
        """
        return cls._of(*_dense(seed, first, bits))

    @classmethod
    def at(cls, seed: np.uint64, pos: npt.NDArray[np.uint64], bits: Bits) -> Digest:
        """The digest of elements at any positions, both arrays of shape (n,)."""
        return cls._of(*_at(seed, pos, bits))

    @classmethod
    def moved(
        cls,
        seed: np.uint64,
        pos: npt.NDArray[np.unsignedinteger],
        old: Bits,
        new: Bits,
        first: int = 0,
    ) -> Digest:
        """What changes of elements add to a digest.

        Args:
            seed: Of the tensor, see :func:`tensor_seed`.
            pos: Positions, of shape (n,).
            old: Their bits before, of shape (n,).
            new: Their bits after, of shape (n,).
            first: Row-major position in the tensor of position 0.
        """
        return cls._of(*_moved(seed, np.uint64(first), pos, old, new))

    def __add__(self, other: Digest) -> Digest:
        low = (self.value + other.value) & _MASK
        high = ((self.value >> 64) + (other.value >> 64)) & _MASK
        return Digest(low | high << 64)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Digest) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)

    def __str__(self) -> str:
        return f"{self.value:032x}"

    def __repr__(self) -> str:
        return f"Digest({self})"


def tensor_seed(name: str) -> np.uint64:
    """The part of an element's key that comes from its tensor's name."""
    return np.uint64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
