"""Blocks of a version to payloads, and what the manifest says of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from planaria.rl_sync.codecs.base import Job
from planaria.rl_sync.codecs.registry import all_codecs
from planaria.rl_sync.diff.scan import Bits, Changes
from planaria.rl_sync.layout.table import BlockTable
from planaria.rl_sync.versions.choice import CodecChoice
from planaria.rl_sync.versions.manifest import Entry, content_hash


@dataclass
class Encoded:
    """One rank's part of a version.

    Attributes:
        models: The models' bytes.
        entries: Its blocks; their models are counted from 0 here.
        payloads: The blocks' bytes, in the order of the entries; empty where they are made when
            asked for.
    """

    models: list[bytes] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    payloads: list[bytes] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of models and blocks."""
        return sum(map(len, self.models)) + sum(e.nbytes for e in self.entries)

    def numbered_from(self, first: int) -> list[Entry]:
        """The entries with their models counted from `first`."""
        return [e.with_model(e.model + first) if e.model >= 0 else e for e in self.entries]

    def extend(self, other: Encoded) -> None:
        """Puts another's blocks behind these."""
        self.entries += other.numbered_from(len(self.models))
        self.models += other.models
        self.payloads += other.payloads


class Encoder:
    """Encodes deltas, each block with the codec that suits it."""

    def __init__(self, table: BlockTable, codec: str = "auto") -> None:
        self._table = table
        self._codecs = all_codecs()
        self.choice = CodecChoice(self._codecs, codec)

    def encode(self, jobs: Iterable[tuple[int, Bits, Changes]]) -> Encoded:
        """Encodes blocks that changed.

        Args:
            jobs: Number of each block, its bits at the base, and what changed; blocks without
                changes are left out.
        """
        groups: dict[tuple[str, str], list[tuple[int, Job]]] = {}
        for number, base, changes in jobs:
            if changes.size:
                fmt = self._table.blocks[number].fmt
                name = self.choice.pick(fmt, base.size, changes)
                groups.setdefault((name, fmt.name), []).append((number, Job(fmt, base, changes)))
        made = Encoded()
        for (name, _), group in groups.items():
            started = time.thread_time()  # what other work on the machine takes is not the codec's
            model, payloads = self._codecs[name].encode([job for _, job in group])
            seconds = time.thread_time() - started
            nbytes = sum(job.base.nbytes for _, job in group)
            changes = sum(job.changes.size for _, job in group)
            self.choice.encoding.note(name, nbytes, changes, seconds)
            number_of_model = -1
            if model:
                number_of_model = len(made.models)
                made.models.append(model)
            for (number, job), payload in zip(group, payloads, strict=True):
                made.entries.append(
                    Entry(number, name, number_of_model, len(payload), job.changes.size,
                          content_hash(payload))
                )  # fmt: skip
                made.payloads.append(payload)
        return made


def describe_full(blocks: Mapping[int, Bits]) -> list[Entry]:
    """The entries of a full version; its payloads are the blocks' bits themselves."""
    return [
        Entry(number, "dense", -1, bits.nbytes, -1, content_hash(bits.data.cast("B")))
        for number, bits in blocks.items()
    ]
