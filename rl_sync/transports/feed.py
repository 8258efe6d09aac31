"""The one interface of all transports, as a receiver sees it.

A *feed* gives the versions of one publisher. The publisher's own log is one, a connection to it is
one, a relay that caches another feed is one, and so is a folder: whatever can read from one can
read from all, and a server can serve any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

from planaria.core.deadline import Deadline
from planaria.errors import WireError
from planaria.rl_sync.versions.manifest import Entry


@dataclass(frozen=True)
class Head:
    """The newest version: its number and its digest by shard."""

    version: int
    digest: tuple[str, ...]


@dataclass(frozen=True)
class Offer:
    """A version that can be read.

    Attributes:
        manifest: Signed, see `Manifest`.
        read: Reads payloads by their numbers in the manifest, within a deadline.
    """

    manifest: bytes
    read: Callable[[Sequence[int], Deadline], list[bytes]]


@dataclass(frozen=True)
class Ack:
    """What a receiver says of itself once it serves a version.

    Attributes:
        worker: Its name.
        shard: Which shard of the rollout it is.
        version: The version it serves.
        digest: That version's digest of its shard.
        nbytes: Payload bytes of the last update.
        seconds: How long that took.
        link: Bytes a second at which payloads came; 0 where too few came to tell.
        codec: The codec that most of the bytes were in.
        host: The host it runs on.
        decoding: By codec, how its times compare with `versions.speeds.DECODING`.
    """

    worker: str
    shard: int
    version: int
    digest: str
    nbytes: int = 0
    seconds: float = 0.0
    link: float = 0.0
    codec: str = ""
    host: str = ""
    decoding: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Any) -> Ack:
        """From JSON data.

        Raises:
            WireError: It is not an acknowledgement.
        """
        try:
            made = cls(**raw)
            kinds = (str, int, int, str, int, (int, float), (int, float), str, str, dict)
            fine = all(isinstance(v, k) for v, k in zip(asdict(made).values(), kinds, strict=True))
            fine = fine and len(made.decoding) <= 64
            fine = fine and all(isinstance(v, (int, float)) for v in made.decoding.values())
        except (TypeError, RecursionError):
            fine, made = False, None
        if not fine or made is None or len(made.worker) > 200:
            raise WireError(f"not an acknowledgement: {str(raw)[:100]}")
        return made


@dataclass(frozen=True)
class Piece:
    """Some blocks of a version that is still being made.

    Attributes:
        draft: Name of the attempt to make it.
        number: Which piece of it this is, from 0.
        models: Models that its blocks are decoded with.
        entries: Its blocks, as the manifest will name them; their models are counted from 0 here.
        payloads: The blocks' bytes, in the order of the entries.
    """

    draft: str
    number: int
    models: tuple[bytes, ...]
    entries: tuple[Entry, ...]
    payloads: tuple[bytes, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of models and blocks."""
        return sum(map(len, self.models)) + sum(map(len, self.payloads))

    def to_message(self) -> tuple[dict[str, Any], list[bytes]]:
        """As a message's header and payloads."""
        header = {
            "draft": self.draft, "number": self.number, "models": len(self.models),
            "entries": [e.to_json() for e in self.entries],
        }  # fmt: skip
        return header, [*self.models, *self.payloads]

    @classmethod
    def from_message(cls, header: dict[str, Any], payloads: Sequence[bytes | bytearray]) -> Piece:
        """From a message.

        Raises:
            WireError: It is not a piece.
        """
        try:
            draft, number, models = str(header["draft"]), int(header["number"]), header["models"]
            entries = tuple(map(Entry.from_json, header["entries"]))
            data = tuple(map(bytes, payloads))
            fine = 0 <= models <= len(data) == models + len(entries)
            if not fine or any(e.model >= models for e in entries):
                raise ValueError("other payloads than it says")
        except (KeyError, TypeError, ValueError) as error:
            raise WireError(f"not a piece of a version: {error!r}") from error
        return cls(draft, number, data[:models], entries, data[models:])


class Ahead(NamedTuple):
    """What there is of a version that is being made.

    Attributes:
        piece: The next piece; None if there is none now.
        over: None comes: the version is there, was given up, or has another base.
        waited: Seconds that the piece was waited for, of those that the call took.
    """

    piece: Piece | None
    over: bool
    waited: float = 0.0


class Feed(Protocol):
    """The versions of one publisher. Methods may be called from several threads."""

    def head(self, after: int | None, deadline: Deadline, wait: float | None = None) -> Head | None:
        """The newest version.

        Args:
            after: Wait for one that is newer than this; None takes any.
            deadline: When to give up.
            wait: Seconds to wait for one; all that the deadline leaves if None.

        Returns:
            It, or None if there was none in time.
        """
        ...

    def chain(self, have: tuple[int, str] | None, shard: int, deadline: Deadline) -> list[Offer]:
        """How to get to the newest version.

        Args:
            have: Version and digest of what is served; None where that is nothing.
            shard: The receiver's shard.
            deadline: When to give up.

        Returns:
            Versions to apply in turn: deltas, or a full one (and deltas after it); nothing if
            there is nothing newer.
        """
        ...

    def ahead(
        self, have: tuple[int, str], shard: int, seen: tuple[str, int] | None, deadline: Deadline,
        wait: float,
    ) -> Ahead:  # fmt: skip
        """The next piece of the version that is being made, for one who waits for it.

        Args:
            have: Version and digest of what is served.
            shard: The receiver's shard.
            seen: Name of the draft, and how many of its pieces are known; None at first.
            deadline: When to give up.
            wait: Seconds to wait for a piece.
        """
        ...

    def table(self, key: str, deadline: Deadline) -> bytes:
        """A block table by its key."""
        ...

    def acknowledge(self, ack: Ack, deadline: Deadline) -> None:
        """Says that a receiver serves a version now."""
        ...

    def close(self) -> None:
        """Ends it."""
        ...
