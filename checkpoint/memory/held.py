"""What a node holds of one snapshot, and how far that has come."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from planaria.checkpoint.memory.memory import Key, Member, Span
from planaria.checkpoint.memory.meta import ImageFile, Meta, NodeFiles


class State(enum.IntEnum):
    """How far a snapshot has come on a node."""

    CAPTURING = 0  #: its ranks write their images
    SEALED = 1  #: all images of this node are complete
    PREPARED = 2  #: and its parity, its duties as an encoder and the manifest; kept from now on
    COMMITTED = 3  #: all nodes were prepared


@dataclass(eq=False)
class Image:
    """The image of one rank of this node; `file` is set once it is sealed.

    Until then its rank may write to it, which pins the snapshot: memory is not used again for
    another one while somebody who was not told yet still writes to it.
    """

    span: Span
    file: ImageFile | None = None
    lent: bool = True


@dataclass(eq=False)
class Parity:
    """One parity chunk that this node holds, with a checksum of each block that is there."""

    span: Span
    index: int  #: which of the stripe's m parities
    checksums: list[int | None]

    @property
    def complete(self) -> bool:
        """Whether all of it is there."""
        return None not in self.checksums


@dataclass(eq=False)
class Held:
    """One snapshot, as far as this node has it."""

    key: Key
    members: tuple[Member, ...]  #: who takes part, the leader first
    state: State = State.CAPTURING
    images: dict[str, Image] = field(default_factory=dict)
    parity: dict[int, Parity] = field(default_factory=dict)  #: by stripe of the group
    meta: Meta | None = None
    manifest: bytes | None = None
    announced: bool = False  #: the leader knows that this node has sealed
    encoded: bool = False  #: this node's duties as an encoder are done
    mends: Key | None = None  #: the older snapshot of which this one is a copy, over other nodes
    verified: dict[str, set[int]] = field(default_factory=dict)  #: chunks seen good, by file
    pins: int = 0
    dropped: bool = False

    @property
    def leader(self) -> str:
        """Identity of the node that decides."""
        return self.members[0].uuid

    def sealed_files(self) -> tuple[ImageFile, ...]:
        """The files that are complete, in order of name."""
        files = (image.file for image in self.images.values() if image.file is not None)
        return tuple(sorted(files, key=lambda file: file.name))

    def files_here(self) -> NodeFiles:
        """This node's image."""
        return NodeFiles(Member(""), self.sealed_files())

    def spans(self) -> list[Span]:
        """All memory it takes."""
        return [each.span for each in (*self.images.values(), *self.parity.values())]


@dataclass(frozen=True)
class Outcome:
    """How a snapshot ended on this node.

    Attributes:
        committed: Whether it was committed here.
        complete: Whether all nodes were heard to have committed.
        why: What went wrong, else "".
    """

    committed: bool
    complete: bool = False
    why: str = ""
