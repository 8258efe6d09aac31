"""A node's parts of stripes, as its peers ask for them: data of its image, parity that it holds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from planaria.checkpoint.format.checksum import checksum
from planaria.checkpoint.memory.held import Held, Parity, State
from planaria.checkpoint.memory.holdings import Holdings
from planaria.checkpoint.memory.images import view_image, view_parity
from planaria.checkpoint.memory.links import Links
from planaria.checkpoint.memory.memory import Key
from planaria.checkpoint.memory.meta import Group, Meta
from planaria.core.byte_stream import Buffer
from planaria.errors import CorruptError, NotCommittedError, SaveFailedError, WireError

Runs = list[list[int]]  # [first, end) of blocks, ascending


class Parts:
    """Answers what peers ask about the parts of stripes that this node holds. Thread-safe."""

    def __init__(self, links: Links, holdings: Holdings) -> None:
        self._links = links
        self._holdings = holdings

    def fetch(
        self, key: Key, stripe: int, start: int, stop: int, paced: bool, check: bool = True
    ) -> Buffer:
        """Bytes of this node's part; shorter where its image ends, zeros follow.

        Args:
            key: The snapshot.
            stripe: The stripe, in this node's group.
            start: First byte in the part.
            stop: End.
            paced: Whether this is for the exchange, in which a chunk that was found good once is
                good.
            check: Whether to compare them with their checksums. Who does not have it done compares
                what is decoded from them.

        Raises:
            NotCommittedError: It is not held here.
            CorruptError: It is not what it was.
        """
        with self._holdings.pinned(key) as held:
            meta, group, me = self._placed(held)
            if not 0 <= start <= stop <= group.stripes.chunk_nbytes:
                raise WireError(f"bytes {start} to {stop} of a part were asked for")
            parity = held.parity.get(stripe)
            if parity is not None:
                block = meta.block_nbytes
                found = view_parity(self._holdings.memory, held, parity, block, start, stop, check)
            else:
                at, length = self._extent(group, me, stripe)
                start, stop = min(start, length), min(stop, length)
                good = held.verified if paced else None
                memory = self._holdings.memory
                found = view_image(memory, held, at + start, at + stop, good, check)
            if not self._holdings.refer(held):
                found = found.copy()
        return found.data

    def store(self, key: Key, stripe: int, first: int, checksums: list[int], data: Buffer) -> None:
        """Takes in blocks of parity that another node has formed.

        Raises:
            NotCommittedError: The snapshot is not held here.
            SaveFailedError: There is no such parity at this node.
            CorruptError: The blocks do not have these checksums.
        """
        arrived = np.frombuffer(data, np.uint8)
        with self._holdings.pinned(key) as held:
            parity = self._room(held, stripe)
            meta, _, _ = self._placed(held)
            step = meta.block_nbytes
            view = self._holdings.memory.view(parity.span)
            target = view[first * step : first * step + len(arrived)]
            if (
                first < 0
                or len(target) != len(arrived)
                or len(checksums) != -(-len(target) // step)
            ):
                raise WireError(f"{len(arrived)} bytes do not fit into a parity at block {first}")
            there = parity.checksums[first : first + len(checksums)]
            if there == checksums:
                return  # it came twice
            if held.state != State.SEALED:
                raise SaveFailedError(f"the parity of {key} is complete at {self._links.uuid}")
            target[:] = arrived
            for i, expected in enumerate(checksums):
                if checksum(target[i * step : (i + 1) * step]) != expected:
                    raise CorruptError(f"block {first + i} of a parity of {key} came changed")
            with self._holdings.changed:
                parity.checksums[first : first + len(checksums)] = checksums

    def compare(self, key: Key, base: Key, stripe: int) -> Runs:
        """Blocks of this node's data that are not the same in both snapshots.

        All of them where they cannot be compared: `base` is not held, or lies otherwise.
        """
        with self._holdings.pinned(key) as held:
            meta, group, me = self._placed(held)
            at, length = self._extent(group, me, stripe)
            step = meta.block_nbytes
            blocks = -(-group.stripes.chunk_nbytes // step)
            try:
                with self._holdings.pinned(base) as old:
                    if not _comparable(held, old):
                        return [[0, blocks]]
                    return _runs(
                        lambda b: (
                            not self._same(
                                held, old, at + b * step, at + min((b + 1) * step, length)
                            )
                        ),
                        blocks,
                    )
            except NotCommittedError:
                return [[0, blocks]]

    def keep(self, key: Key, base: Key, stripe: int, blocks: Runs) -> Runs:
        """Copies blocks of parity from `base`; returns which of them were there, and good."""
        with self._holdings.pinned(key) as held:
            parity = self._room(held, stripe)
            step = self._placed(held)[0].block_nbytes
            try:
                with self._holdings.pinned(base) as old:
                    before = old.parity.get(stripe)
                    if before is None or not _comparable(held, old):
                        return []
                    return [
                        [block, block + 1]
                        for first, stop in blocks
                        for block in range(first, stop)
                        if self._copied(before, parity, block, step)
                    ]
            except NotCommittedError:
                return []

    def _copied(self, before: Parity, parity: Parity, block: int, step: int) -> bool:
        if parity.checksums[block] is not None:
            return parity.checksums[block] == before.checksums[block]  # asked twice
        memory = self._holdings.memory
        source = memory.view(before.span)[block * step : (block + 1) * step]
        target = memory.view(parity.span)[block * step : (block + 1) * step]
        target[:] = source
        if checksum(target) != before.checksums[block]:
            return False  # it was changed in memory, and is formed anew
        with self._holdings.changed:
            parity.checksums[block] = before.checksums[block]
        return True

    def _room(self, held: Held, stripe: int) -> Parity:
        """The parity chunk for a stripe; the encoder may come before this node was told."""
        deadline = self._links.deadline()
        with self._holdings.changed:
            while stripe not in held.parity:
                if held.dropped or held.state != State.SEALED:
                    raise SaveFailedError(f"{held.key} is over at node {self._links.uuid}")
                if held.parity:
                    raise WireError(f"node {self._links.uuid} holds no parity of stripe {stripe}")
                self._holdings.wait_changed(deadline, f"room for parity of {held.key}")
            return held.parity[stripe]

    def _placed(self, held: Held) -> tuple[Meta, Group, int]:
        """The snapshot's meta, this node's group, and its number there."""
        deadline = self._links.deadline()
        with self._holdings.changed:
            while held.meta is None:
                if held.dropped:
                    raise SaveFailedError(f"{held.key} is over at node {self._links.uuid}")
                self._holdings.wait_changed(deadline, f"the nodes that take part in {held.key}")
        group = held.meta.group_of(self._links.uuid)
        return held.meta, group, group.number(self._links.uuid)

    def _extent(self, group: Group, me: int, stripe: int) -> tuple[int, int]:
        """Where this node's chunk in a stripe begins in its image, and its length without zeros."""
        stripes = group.stripes
        if stripe not in stripes.data_stripes(me):
            raise NotCommittedError(
                f"node {self._links.uuid} holds nothing of stripe {stripe} of its group"
            )
        return stripes.data_offset(me, stripe), stripes.data_nbytes(me, stripe)

    def _same(self, new: Held, old: Held, start: int, stop: int) -> bool:
        """Whether bytes of the image are equal in two snapshots that lie alike."""
        memory = self._holdings.memory
        mine = new.files_here()
        before = dict(zip((f.name for f in mine.files), old.sealed_files(), strict=True))
        for file, first, last, _ in mine.pieces(start, stop):
            other = before[file.name]
            chunks = file.chunks(first, last)
            if any(file.checksums[c] != other.checksums[c] for c in chunks):
                return False
            # Equal checksums are no proof: one pair in 4 billion of unequal chunks has them.
            a = memory.view(new.images[file.name].span)[first:last]
            b = memory.view(old.images[other.name].span)[first:last]
            if not np.array_equal(a, b):
                return False
        return True


def _comparable(new: Held, old: Held) -> bool:
    """Whether every byte and every parity of two snapshots lies alike."""
    return (
        old.state == State.COMMITTED
        and new.meta is not None
        and old.meta is not None
        and new.meta.shape() == old.meta.shape()
    )


def _runs(wanted: Callable[[int], bool], blocks: int) -> Runs:
    runs: Runs = []
    for block in filter(wanted, range(blocks)):
        if runs and runs[-1][1] == block:
            runs[-1][1] = block + 1
        else:
            runs.append([block, block + 1])
    return runs
