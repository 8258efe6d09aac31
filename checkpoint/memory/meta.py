"""What is replicated on all nodes of a snapshot: who took part, with which files.

A node's image is its files in order of name, each at a multiple of 4096; the gaps count as zeros.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from planaria.checkpoint.format import checksum
from planaria.checkpoint.memory.memory import Key, Member, Scheme, aligned
from planaria.checkpoint.memory.placement import Stripes, make_groups
from planaria.errors import WireError

_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, RecursionError)


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One rank's image.

    Attributes:
        name: Its file name.
        nbytes: Its length.
        data_start: Length of its header.
        chunk_nbytes: Bytes a checksummed chunk after the header; the last may be shorter.
        checksums: Of the header first, then of each chunk.
    """

    name: str
    nbytes: int
    data_start: int
    chunk_nbytes: int
    checksums: tuple[int, ...]

    def chunks(self, start: int, stop: int) -> range:
        """The numbers of the checksums that cover bytes ``[start, stop)``; 0 is the header's."""
        if stop <= start:
            return range(0)
        return range(self._chunk_of(start), self._chunk_of(stop - 1) + 1)

    def chunk_range(self, chunk: int) -> tuple[int, int]:
        """First byte and end of what a checksum covers."""
        if chunk == 0:
            return 0, self.data_start
        start = self.data_start + (chunk - 1) * self.chunk_nbytes
        return start, min(start + self.chunk_nbytes, self.nbytes)

    def shape(self) -> tuple[int, int, int]:
        """Where its bytes and chunks lie, without what they hold."""
        return self.nbytes, self.data_start, self.chunk_nbytes

    def to_json(self) -> list[Any]:
        """The file as JSON data."""
        return [self.name, *self.shape(), checksum.pack(list(self.checksums))]

    @classmethod
    def from_json(cls, data: Any) -> ImageFile:
        """Inverse of `to_json`.

        Raises:
            WireError: It makes no sense.
        """
        try:
            name, nbytes, start, chunk, packed = data
            made = cls(name, nbytes, start, chunk, tuple(checksum.unpack(packed)))
            made.check()
        except _MALFORMED as error:
            raise WireError(f"a malformed file of a snapshot: {error!r}") from None
        return made

    def check(self) -> None:
        """Goes on if the numbers fit together.

        Raises:
            WireError: They do not.
        """
        if (
            not isinstance(self.name, str)
            or not 0 < self.data_start <= self.nbytes
            or self.chunk_nbytes < 1
            or len(self.checksums) != 1 + -(-(self.nbytes - self.data_start) // self.chunk_nbytes)
        ):
            raise WireError(
                f"{self.name!r} of {self.nbytes} bytes, {self.data_start} of them header, cannot "
                f"have {len(self.checksums)} checksums of {self.chunk_nbytes} bytes"
            )

    def _chunk_of(self, at: int) -> int:
        return 0 if at < self.data_start else 1 + (at - self.data_start) // self.chunk_nbytes


@dataclass(frozen=True, slots=True)
class NodeFiles:
    """A node and the files of its image, in order of name."""

    member: Member
    files: tuple[ImageFile, ...]

    @property
    def nbytes(self) -> int:
        """Length of the node's image."""
        return sum(aligned(file.nbytes) for file in self.files)

    def offset(self, name: str) -> int:
        """First byte of a file in the image.

        Raises:
            KeyError: There is no such file.
        """
        at = 0
        for file in self.files:
            if file.name == name:
                return at
            at += aligned(file.nbytes)
        raise KeyError(name)

    def pieces(self, start: int, stop: int) -> list[tuple[ImageFile, int, int, int]]:
        """The parts of files in bytes ``[start, stop)`` of the image.

        Returns:
            File, first byte and end in the file, and first byte in the image, in order.
        """
        found, at = [], 0
        for file in self.files:
            first, last = max(start, at), min(stop, at + file.nbytes)
            if first < last:
                found.append((file, first - at, last - at, first))
            at += aligned(file.nbytes)
        return found


@dataclass(frozen=True)
class Group:
    """Nodes that hold the parts of each other's stripes.

    Attributes:
        uuids: The nodes, in the order in which `stripes` counts them.
        stripes: Where the parts lie.
    """

    uuids: tuple[str, ...]
    stripes: Stripes

    def number(self, uuid: str) -> int:
        """The number of a node in the group."""
        return self.uuids.index(uuid)

    def part_uuids(self, stripe: int) -> list[str]:
        """The node of each part of a stripe, as the erasure code counts them."""
        return [self.uuids[i] for i in self.stripes.part_nodes(stripe)]


@dataclass(frozen=True)
class Meta:
    """A snapshot without its bytes.

    Attributes:
        key: Which one.
        sequence: Grows from snapshot to snapshot, whatever their steps: a run may be rewound.
        scheme: How it is protected.
        nodes: Who took part, in order; the first is the leader.
        block_nbytes: Parity is exchanged and checksummed in blocks of this size.
    """

    key: Key
    sequence: int
    scheme: Scheme
    nodes: tuple[NodeFiles, ...]
    block_nbytes: int
    _where: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        where = {file.name: i for i, node in enumerate(self.nodes) for file in node.files}
        object.__setattr__(self, "_where", where)

    @property
    def uuids(self) -> list[str]:
        """The nodes' identities, in order."""
        return [node.member.uuid for node in self.nodes]

    @property
    def members(self) -> list[Member]:
        """The nodes, in order."""
        return [node.member for node in self.nodes]

    @property
    def files(self) -> dict[str, int]:
        """The length of each file, by name."""
        return {file.name: file.nbytes for node in self.nodes for file in node.files}

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups of nodes that protect each other."""
        domains = [member.failure_domain for member in self.members]
        found = make_groups(domains, self.scheme.group_size, self.scheme.losses)
        return tuple(self._group(numbers) for numbers in found)

    def group_of(self, uuid: str) -> Group:
        """The group that a node is in.

        Raises:
            KeyError: It is in none.
        """
        for group in self.groups:
            if uuid in group.uuids:
                return group
        raise KeyError(uuid)

    def _group(self, numbers: list[int]) -> Group:
        nodes = [self.nodes[i] for i in numbers]
        losses = min(self.scheme.losses, len(nodes) - 1)
        stripes = Stripes(len(nodes), losses, [node.nbytes for node in nodes])
        return Group(tuple(node.member.uuid for node in nodes), stripes)

    def owner(self, file: str) -> NodeFiles:
        """The node whose image holds a file.

        Raises:
            KeyError: No node does.
        """
        return self.nodes[self._where[file]]

    def shape(self) -> Any:
        """What decides where each byte and each parity lies; equal where they lie alike."""
        return (
            self.scheme,
            self.block_nbytes,
            self.members,
            [[file.shape() for file in node.files] for node in self.nodes],
        )

    def to_bytes(self) -> bytes:
        """The snapshot's meta as JSON text."""
        data = {
            "key": self.key.to_json(),
            "sequence": self.sequence,
            "losses": self.scheme.losses,
            "group_size": self.scheme.group_size,
            "block_nbytes": self.block_nbytes,
            "nodes": [
                [node.member.to_json(), [file.to_json() for file in node.files]]
                for node in self.nodes
            ],
        }
        return json.dumps(data, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, text: bytes | bytearray | memoryview) -> Meta:
        """Inverse of `to_bytes`.

        Raises:
            WireError: It is malformed.
        """
        try:
            data = json.loads(bytes(text))
            return cls(
                Key.from_json(data["key"]),
                int(data["sequence"]),
                Scheme(int(data["losses"]), int(data["group_size"])),
                tuple(
                    NodeFiles(Member.from_json(member), files_from_json(files))
                    for member, files in data["nodes"]
                ),
                int(data["block_nbytes"]),
            )
        except _MALFORMED as error:
            raise WireError(f"a malformed description of a snapshot: {error!r}") from None


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that can be read.

    Attributes:
        key: Which one.
        manifest: What was given to `SnapshotNode.describe`.
        files: Length of each file, by name.
        lost: Identities of the nodes of which nothing is to be had.
        sequence: Grows from snapshot to snapshot.
    """

    key: Key
    manifest: bytes
    files: dict[str, int]
    lost: list[str]
    sequence: int


def files_from_json(data: Sequence[Any]) -> tuple[ImageFile, ...]:
    """The files of one node, in order of name.

    Raises:
        WireError: They are malformed.
    """
    files = tuple(sorted((ImageFile.from_json(each) for each in data), key=lambda f: f.name))
    if len({file.name for file in files}) != len(files):
        raise WireError("two files of a node have the same name")
    return files
