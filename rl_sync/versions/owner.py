"""One trainer rank's part of every version: finds changes, encodes them, keeps the old ones."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from planaria.core import points
from planaria.errors import NotCommittedError, SyncError
from planaria.rl_sync.diff.device import DeviceScan
from planaria.rl_sync.diff.digest import Digest
from planaria.rl_sync.diff.scan import Bits, Changes, Scanner
from planaria.rl_sync.layout.positions import digest_of_block, digest_of_changes
from planaria.rl_sync.layout.rollout import SyncPlan
from planaria.rl_sync.versions.choice import Learnt
from planaria.rl_sync.versions.encoding import Encoded, Encoder, describe_full
from planaria.rl_sync.versions.history import History
from planaria.rl_sync.versions.manifest import Entry, content_hash

SCAN = points.declare("rl.publish.scan", "before a rank looks for what changed")
ENCODE = points.declare("rl.publish.encode", "before a rank encodes some of its blocks")
COMMIT = points.declare("rl.publish.commit", "before a rank's baseline moves to a version")

#: Blocks that are encoded, sent and decoded together, at most.
GROUP = 16


class Owner(Protocol):
    """A rank's blocks at all versions that it keeps, here or on another process."""

    def delta(self, base: int, version: int) -> tuple[list[tuple[int, str]], list[Entry]]:
        """Sizes and hashes of the models, and the entries, of a delta."""
        ...

    def full(self, version: int) -> list[Entry]:
        """The entries of a full version."""
        ...

    def read(self, base: int | None, version: int, numbers: Sequence[int]) -> list[bytes]:
        """Payloads of what `delta` or `full` described: models first, then blocks."""
        ...


@dataclass
class Prepared:
    """A version that a rank could move to.

    Attributes:
        version: Its number.
        base: The version before; None for the first.
        changes: By block.
        encoded: What is sent of them.
        moves: What they add to each shard's digest; for a first version the digest itself.
        scan_seconds: Looking for them.
        encode_seconds: Encoding them.
        parts: In how many parts that was given away.
    """

    version: int
    base: int | None
    changes: dict[int, Changes] = field(default_factory=dict)
    encoded: Encoded = field(default_factory=Encoded)
    moves: list[Digest] = field(default_factory=list)
    scan_seconds: float = 0.0
    encode_seconds: float = 0.0
    parts: int = 0


@dataclass
class _Found:
    """What some blocks add to a version."""

    changes: dict[int, Changes] = field(default_factory=dict)
    encoded: Encoded = field(default_factory=Encoded)
    moves: dict[int, Digest] = field(default_factory=dict)
    nbytes: int = 0
    scan_seconds: float = 0.0
    encode_seconds: float = 0.0


class LocalOwner:
    """The part of this rank. Safe for threads: one publishes, others read what was published."""

    def __init__(
        self,
        plan: SyncPlan,
        rank: int,
        live: DeviceScan,
        codec: str = "auto",
        cached_deltas: int = 8,
        cached_bytes: int = 64 << 20,
        threads: int = 1,
        parts: int = 1,
    ) -> None:
        """Starts with no version.

        Args:
            plan: Who encodes what.
            rank: This rank.
            live: Gives live bits, and scans those that are on a device.
            codec: Name of a codec, or ``auto``.
            cached_deltas: How many encoded deltas are kept anyway.
            cached_bytes: Up to so many bytes, more of them are.
            threads: Threads that scan and encode.
            parts: How many ranks have a part.
        """
        self.table = plan.table
        self.blocks = [i for i, owner in enumerate(plan.owners) if owner == rank]
        self._live, self._keep, self._threads = live, cached_deltas, threads
        self._parts, self._cached_bytes = parts, cached_bytes
        self._nbytes = sum(plan.table.blocks[i].nbytes for i in self.blocks)
        self._lock = threading.RLock()
        self.encoder = Encoder(plan.table, codec)
        self._folder = Encoder(plan.table, codec)
        self._deltas: OrderedDict[tuple[int, int], Encoded] = OrderedDict()
        self._fulls: tuple[int, list[Entry]] | None = None
        self.history = History()

    def learn(self, learnt: Learnt) -> None:
        """Takes what receivers say of the link and of themselves."""
        for encoder in (self.encoder, self._folder):
            encoder.choice.learn(learnt)

    def begin(self, version: int) -> list[Digest]:
        """Takes the live weights as the baseline of a version; returns their digest by shard."""
        blocks: dict[int, Bits] = {}
        totals = [Digest() for _ in range(self.table.shards)]
        for number in self.blocks:
            pieces = self._live.pieces(number)
            bits = blocks[number] = _joined(pieces)
            digest = digest_of_block(self.table, self.table.blocks[number], bits)
            for shard in self.table.blocks[number].audience:
                totals[shard] += digest
        with self._lock:
            self._deltas.clear()
            self._fulls = None
            self.history.begin(version, blocks)
            self._live.begin(self._nbytes)
        return totals

    def prepare(
        self,
        version: int,
        given: Callable[[Encoded], None] | None = None,
        scanned: Callable[[], None] | None = None,
    ) -> Prepared:
        """Finds what changed since the newest version and encodes it. Changes nothing itself.

        Blocks are taken a group at a time, so that what is ready can go on while others follow.

        Args:
            version: The version to be.
            given: Called with each group's part as it is ready.
            scanned: Called when the live bits are not read any more; everything is looked at first
                then, and encoded afterwards.

        Raises:
            SyncError: The version is not newer.
        """
        points.point(SCAN, step=version)
        base = self.history.version
        if base is None:
            raise SyncError("nothing was published yet; begin() comes first")
        if version <= base:
            raise SyncError(f"version {version} was published already; the newest is {base}")
        made = Prepared(version, base, moves=[Digest() for _ in range(self.table.shards)])
        self.encoder.choice.begin(self._threads, self._nbytes, self._parts)
        with ThreadPoolExecutor(self._threads, thread_name_prefix="planaria-rl-encode") as pool:
            try:
                if scanned is not None:
                    found = list(pool.map(self._changed, self._groups()))
                    scanned()
                    coded = [pool.submit(self._coded, each) for each in found]
                else:
                    coded = [
                        pool.submit(lambda g: self._coded(self._changed(g)), group)
                        for group in self._groups()
                    ]
                for each in as_completed(coded):
                    self._add(made, each.result())
                    if given is not None and each.result().encoded.entries:
                        given(each.result().encoded)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return made

    def _groups(self) -> list[list[int]]:
        """The blocks in groups: large enough for tables to weigh little, many enough to overlap."""
        size = min(max(len(self.blocks) // 16, 4), GROUP)
        return [self.blocks[i : i + size] for i in range(0, len(self.blocks), size)]

    def _changed(self, numbers: Sequence[int]) -> _Found:
        started, scanner, found = time.perf_counter(), Scanner(), _Found()
        there = self._live.scan(numbers, self.history.newest)
        for number in numbers:
            changes = there.get(number)
            if changes is None:
                changes = scanner.scan(self._live.pieces(number), self.history.newest(number))
            if changes.size:
                found.changes[number] = changes
        found.nbytes = sum(self.table.blocks[n].nbytes for n in numbers)
        found.scan_seconds = time.perf_counter() - started
        return found

    def _coded(self, found: _Found) -> _Found:
        points.point(ENCODE)
        started = time.perf_counter()
        self.encoder.choice.look(found.nbytes)
        for number, changes in found.changes.items():
            block = self.table.blocks[number]
            move = digest_of_changes(self.table, block, changes)
            for shard in block.audience:
                found.moves[shard] = found.moves.get(shard, Digest()) + move
        found.encoded = self.encoder.encode(
            (n, self.history.newest(n), c) for n, c in found.changes.items()
        )
        found.encode_seconds = time.perf_counter() - started
        return found

    def _add(self, made: Prepared, found: _Found) -> None:
        made.changes |= found.changes
        made.encoded.extend(found.encoded)
        made.parts += bool(found.encoded.entries)
        for shard, move in found.moves.items():
            made.moves[shard] += move
        made.scan_seconds += found.scan_seconds / self._threads
        made.encode_seconds += found.encode_seconds / self._threads

    def commit(self, prepared: Prepared, announce: Callable[[], None] | None = None) -> None:
        """Moves the baseline.

        Args:
            prepared: What it moves by.
            announce: Called when what is sent can be read, and nothing can fail any more; if it
                raises, nothing has moved.
        """
        points.point(COMMIT, step=prepared.version)
        with self._lock:
            assert prepared.base is not None
            self._store(prepared.base, prepared.version, prepared.encoded)
            try:
                if announce is not None:
                    announce()
            except BaseException:
                del self._deltas[prepared.base, prepared.version]
                raise
            self.history.commit(prepared.version, prepared.changes)
            self._live.commit(prepared.changes)

    def forget(self, needed: Iterable[int], keep: int, max_bytes: int) -> list[int]:
        """Lets go of versions that nobody needs, see `History.forget`; returns what is left."""
        with self._lock:
            self.history.forget(needed, keep, max_bytes)
            left = self.history.versions()
            for base, version in [k for k in self._deltas if k[0] not in left]:
                del self._deltas[base, version]
            return left

    def delta(self, base: int, version: int) -> tuple[list[tuple[int, str]], list[Entry]]:
        """See `Owner.delta`; encodes it if it was not published in this form."""
        with self._lock:
            made = self._deltas.get((base, version))
            if made is None:
                made = self._folder.encode(self._between(base, version))
                self._store(base, version, made)
        return [(len(m), content_hash(m)) for m in made.models], made.entries

    def full(self, version: int) -> list[Entry]:
        """See `Owner.full`."""
        with self._lock:
            if self._fulls is None or self._fulls[0] != version:
                entries: list[Entry] = []
                for number in self.blocks:
                    entries += describe_full({number: self.history.at(number, version)})
                self._fulls = version, entries
            return self._fulls[1]

    def read(self, base: int | None, version: int, numbers: Sequence[int]) -> list[bytes]:
        """See `Owner.read`.

        Raises:
            NotCommittedError: It is not kept any more.
        """
        with self._lock:
            if base is None:
                return [self.history.at(self.blocks[n], version).tobytes() for n in numbers]
            made = self._deltas.get((base, version))
            if made is None:
                raise NotCommittedError(
                    f"the delta from version {base} to {version} is not kept any more; ask again "
                    "for the way to the newest version"
                )
            return [[*made.models, *made.payloads][n] for n in numbers]

    def _between(self, base: int, version: int) -> Iterable[tuple[int, Bits, Changes]]:
        for number in self.blocks:
            changes = self.history.between(number, base, version)
            if changes.size:
                yield number, self.history.at(number, base), changes

    def _store(self, base: int, version: int, made: Encoded) -> None:
        self._deltas[base, version] = made
        nbytes = sum(each.nbytes for each in self._deltas.values())
        while len(self._deltas) > self._keep and nbytes > self._cached_bytes:
            nbytes -= self._deltas.popitem(last=False)[1].nbytes


def _joined(pieces: list[Bits]) -> Bits:
    return pieces[0].copy() if len(pieces) == 1 else np.concatenate(pieces)
