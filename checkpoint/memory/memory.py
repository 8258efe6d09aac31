"""The words that all of the memory tier speaks: spans of memory, keys, members, schemes."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from planaria.core.byte_stream import Buffer
from planaria.core.deadline import Deadline
from planaria.errors import ConfigError, WireError

#: Spans, and files in a node's image, start at multiples of it.
ALIGNMENT = 4096

#: What a request is answered with: a header that JSON can hold, and buffers.
Reply = tuple[dict[str, Any], Sequence[Buffer]]


def aligned(nbytes: int) -> int:
    """The next multiple of the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a node's memory.

    Attributes:
        offset: Its first byte, a multiple of 4096.
        nbytes: Its length as asked for.
    """

    offset: int
    nbytes: int


class Memory(Protocol):
    """Memory that spans are cut from. Thread-safe."""

    def allocate(self, nbytes: int) -> Span:
        """Takes a span out; what it holds is left from earlier.

        Raises:
            MemoryBudgetError: There is no room.
        """
        ...

    def free(self, span: Span) -> None:
        """Gives a span back, once."""
        ...

    def view(self, span: Span) -> NDArray[np.uint8]:
        """The span's bytes: uint8, writable, of length ``span.nbytes``."""
        ...


@dataclass(frozen=True, slots=True)
class Key:
    """Which snapshot: its step, and the random id of the attempt to take it."""

    step: int
    attempt: str

    def to_json(self) -> list[Any]:
        """The key as JSON data."""
        return [self.step, self.attempt]

    @classmethod
    def from_json(cls, data: Any) -> Key:
        """Inverse of `to_json`.

        Raises:
            WireError: It is no key.
        """
        match data:
            case [int(step), str(attempt)] if step >= 0:
                return cls(step, attempt)
        raise WireError(f"{data!r} is no key of a snapshot")

    @property
    def original(self) -> Key:
        """What this one is a copy of, over other nodes and with the same bytes; mostly itself."""
        return Key(self.step, self.attempt.partition("+")[0])

    def copy(self) -> Key:
        """A new key for a copy of the snapshot."""
        return Key(self.step, f"{self.original.attempt}+{secrets.token_hex(4)}")

    def __str__(self) -> str:
        return f"step {self.step} (attempt {self.attempt[:8]})"


@dataclass(frozen=True, slots=True)
class Member:
    """One node of a job.

    Attributes:
        uuid: Its identity; a process that starts anew is another node.
        address: Where it listens, ``host:port``.
        failure_domain: What fails together with it, such as its rack; "" if nothing is known.
    """

    uuid: str
    address: str = ""
    failure_domain: str = ""

    def to_json(self) -> list[str]:
        """The member as JSON data."""
        return [self.uuid, self.address, self.failure_domain]

    @classmethod
    def from_json(cls, data: Any) -> Member:
        """Inverse of `to_json`.

        Raises:
            WireError: It is no member.
        """
        match data:
            case [str(uuid), str(address), str(domain)]:
                return cls(uuid, address, domain)
        raise WireError(f"{data!r} is no member")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How snapshots are protected.

    Attributes:
        losses: So many nodes of a group may be lost at once, m; 0 for no parity.
        group_size: Nodes a group, at most.
    """

    losses: int = 1
    group_size: int = 16

    def __post_init__(self) -> None:
        if self.losses < 0 or self.group_size < 1:
            raise ConfigError(f"{self}: losses must be >= 0, and group_size >= 1")
        if self.group_size > 255:
            raise ConfigError(f"{self}: a group has at most 255 nodes")
        if self.losses >= self.group_size:
            raise ConfigError(f"{self}: losses must be smaller than the groups")


class Peers(Protocol):
    """How a node reaches others. Thread-safe; any number of calls at a time."""

    def know(self, members: Sequence[Member]) -> None:
        """Learns where nodes are; a node that is known already may have moved."""
        ...

    def call(
        self,
        uuid: str,
        request: dict[str, Any],
        payloads: Sequence[Buffer],
        deadline: Deadline,
        into: Sequence[memoryview[Any]] = (),
    ) -> Reply:
        """Has a node answer a request. It may be asked twice where a connection was lost.

        Args:
            uuid: The node.
            request: What JSON can hold.
            payloads: Go with it.
            deadline: When to give up.
            into: Where the answer's payloads may be put, in their order, if they fit; nothing is
                written there any more once the call has ended.

        Raises:
            PlanariaError: What went wrong there, with the node's name.
            WireError: The node cannot be reached, or the connection to it was lost.
            DeadlineError: No answer in time; the error names the node.
        """
        ...
