"""From one version to another, wholly or not at all.

A chain of versions is decoded against the weights without touching them: later steps see the
earlier ones in a scratch copy of the block at hand. Only when every payload had its hash, every
block decoded, and the digests of all versions came out as signed, are the new bits written; each
block's old bits are kept until all are written, and go back if anything fails in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

from planaria.core import points
from planaria.errors import CorruptError
from planaria.rl_sync.codecs.base import as_array
from planaria.rl_sync.codecs.registry import decoder
from planaria.rl_sync.diff.digest import Digest
from planaria.rl_sync.diff.scan import Changes, Scanner, scatter
from planaria.rl_sync.layout.positions import digest_of_block, digest_of_changes
from planaria.rl_sync.layout.target import RolloutTensors
from planaria.rl_sync.versions.ahead import MAX_MODEL, Decoded, ReadAhead
from planaria.rl_sync.versions.manifest import Manifest, content_hash, too_large
from planaria.rl_sync.versions.speeds import DECODING, Speeds

APPLY = points.declare("rl.apply.block", "before the new bits of each block are written")
APPLIED = points.declare("rl.apply.end", "all blocks are written, before the version counts")
STAGE = points.declare("rl.stage.block", "before each block of a version is decoded")

#: In how many parts a version is read, about.
PARTS = 4

Read = Callable[[Sequence[int]], list[bytes]]
"""Reads payloads of a version by their numbers in `Manifest.items`."""


@dataclass
class Step:
    """A version to go to, and where its payloads are."""

    manifest: Manifest
    read: Read


@dataclass
class Staged:
    """Changes that are decoded and checked, and not yet made.

    Attributes:
        version: Where they lead.
        digest: This shard's digest there.
        changes: By block.
        codecs: Bytes by codec.
        nbytes: Bytes of all payloads that were read.
        full: Whether they begin with a full version.
        applied: Whether they were made.
        torn: Whether they were made in part, and could not be taken back.
    """

    version: int
    digest: Digest
    changes: dict[int, Changes] = field(default_factory=dict)
    codecs: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0
    full: bool = False
    applied: bool = False
    torn: bool = False

    @property
    def changed(self) -> int:
        """Elements that change."""
        return sum(c.size for c in self.changes.values())


def check_chain(
    steps: Sequence[Step], version: int | None, digest: Digest | None, tensors: RolloutTensors
) -> None:
    """Looks whether versions follow each other and the one that is served, before any is read.

    Raises:
        CorruptError: They do not, or ask for more than such weights can need.
    """
    at, is_digest = version, None if digest is None else str(digest)
    table, shard = tensors.table, tensors.shard
    for step in steps:
        m = step.manifest
        if len(m.digest) != table.shards or m.table != table.key:
            raise CorruptError(f"version {m.version} is made of other blocks than its table says")
        if not m.full and (m.base_version != at or m.base_digest is None):
            raise CorruptError(
                f"version {m.version} applies to version {m.base_version}, and version {at} is here"
            )
        if m.base_digest is not None and m.base_digest[shard] != is_digest:
            raise CorruptError(
                f"version {m.version} applies to other weights of version {at} than the ones here; "
                "a full version is needed"
            )
        if m.full and {e.block for e in m.entries} != set(range(len(table.blocks))):
            raise CorruptError(f"version {m.version} should be a full one and lacks blocks")
        for e in m.entries:
            if e.block >= len(table.blocks):
                raise CorruptError(f"version {m.version} has a block that its table lacks")
            block = table.blocks[e.block]
            if too_large(e, block.elements):
                raise CorruptError(
                    f"version {m.version} asks for {e.nbytes} bytes for a block of {block.elements}"
                )
        if sum(size for size, _ in m.models) > MAX_MODEL * (len(m.entries) + 1):
            raise CorruptError(f"version {m.version} asks for too large models")
        at, is_digest = m.version, m.digest[shard]


def stage(
    steps: Sequence[Step],
    tensors: RolloutTensors,
    digest: Digest | None,
    batch_bytes: int | None = None,
    ahead: ReadAhead | None = None,
    speeds: Speeds | None = None,
) -> Staged:
    """Decodes a chain that `check_chain` has found in order; touches no weight.

    The next batch of payloads is read while one is decoded.

    Args:
        steps: Versions, each applying to the one before; the first to what the model holds.
        tensors: The model.
        digest: Its digest now; None if the first version is a full one.
        batch_bytes: How much to read at once, about; by default a quarter, within limits.
        ahead: What was decoded before the version was published.
        speeds: Notes how long decoding takes.

    Raises:
        CorruptError: Bytes are not what a manifest says, do not decode, or lead elsewhere.
    """
    if any(step.manifest.full for step in steps[1:]):
        raise CorruptError("a chain may begin with a full version, and has none later")
    ready: Mapping[int, Decoded] = {}
    if ahead is not None and len(steps) == 1:
        ready = ahead.fitting(steps[0].manifest, tensors.shard)
    with closing(_read_ahead(steps, _batches(steps, tensors, batch_bytes, ready))) as batches:
        return _decoded(steps, tensors, digest, batches, ready, speeds or Speeds(DECODING))


def _decoded(
    steps: Sequence[Step],
    tensors: RolloutTensors,
    digest: Digest | None,
    batches: Iterator[tuple[_Batch, list[dict[int, bytes]]]],
    ready: Mapping[int, Decoded],
    speeds: Speeds,
) -> Staged:
    last = steps[-1].manifest
    staged = Staged(last.version, Digest(), full=steps[0].manifest.full)
    totals = [Digest() if s.manifest.full else None for s in steps]
    moves = [Digest() for _ in steps]
    for number, known in ready.items():
        staged.changes[number] = known.changes
        moves[0] += known.move
        codec = known.entry.codec
        staged.codecs[codec] = staged.codecs.get(codec, 0) + known.entry.nbytes
    scanner = Scanner()
    for group, payloads in batches:
        for got in payloads:
            staged.nbytes += sum(map(len, got.values()))
        for number in group.blocks:
            points.point(STAGE, step=last.version)
            block = tensors.table.blocks[number]
            before = tensors.read(block)
            now = before
            for k, step in enumerate(steps):
                m = step.manifest
                place = group.entry[k].get(number)
                if place is None:
                    continue
                e = m.entries[place]
                data = payloads[k][len(m.models) + place]
                staged.codecs[e.codec] = staged.codecs.get(e.codec, 0) + e.nbytes
                if m.full:
                    live = as_array(data, f"<u{block.fmt.width}")
                    if live.size != block.elements:
                        raise CorruptError(f"block {number} of version {m.version} is cut short")
                    totals[k] = _sum(totals[k]) + digest_of_block(tensors.table, block, live)
                    now = live
                    continue
                model = payloads[k][e.model] if e.model >= 0 else b""
                started = time.thread_time()
                changes = decoder(e.codec).decode(data, block.fmt, now, e.changed, model)
                speeds.note(e.codec, now.nbytes, e.changed, time.thread_time() - started)
                moves[k] += digest_of_changes(tensors.table, block, changes)
                if len(steps) == 1:
                    staged.changes[number] = changes
                else:
                    now = now.copy() if now is before or not now.flags.writeable else now
                    scatter(now, changes.pos, changes.new)
            if now is not before:
                staged.changes[number] = scanner.scan([now], before)
    at = digest
    for k, step in enumerate(steps):
        at = (_sum(totals[k]) if step.manifest.full else _sum(at)) + moves[k]
        if str(at) != step.manifest.digest[tensors.shard]:
            raise CorruptError(
                f"the weights that version {step.manifest.version} leads to are not the trainer's: "
                "their digest differs; nothing was changed"
            )
    staged.digest = _sum(at)
    return staged


def apply(staged: Staged, tensors: RolloutTensors) -> None:
    """Makes staged changes; if anything fails, all that were made are taken back.

    Raises:
        Exception: What failed; the weights are then bit for bit what they were.
    """
    done: list[int] = []
    try:
        for number, changes in staged.changes.items():
            done.append(number)  # first: a block that is half written is taken back, too
            points.point(APPLY, step=staged.version)
            tensors.write(tensors.table.blocks[number], changes, mirror=staged.full)
        points.point(APPLIED, step=staged.version)
        staged.applied = True
    except BaseException:
        staged.torn, staged.applied = True, False
        undo(staged, tensors, done)
        staged.torn = False
        raise


def undo(staged: Staged, tensors: RolloutTensors, blocks: Sequence[int]) -> None:
    """Puts the old bits of blocks back."""
    for number in reversed(blocks):
        block = tensors.table.blocks[number]
        tensors.write(block, staged.changes[number], undo=True, mirror=staged.full)


def full_digest(tensors: RolloutTensors) -> Digest | None:
    """The digest of the weights as they are, from every element: the audit.

    None if tensors that should be equal, since they are tied on the trainer, are not.
    """
    total = Digest()
    for number in tensors.blocks:
        block = tensors.table.blocks[number]
        if not tensors.mirrored(block):
            return None
        total += digest_of_block(tensors.table, block, tensors.read(block))
    return total


@dataclass
class _Batch:
    """Blocks that are decoded with one read a version."""

    blocks: list[int]
    wanted: list[list[int]]
    entry: list[dict[int, int]]


def _batches(
    steps: Sequence[Step], tensors: RolloutTensors, limit: int | None, ready: Mapping[int, Decoded]
) -> list[_Batch]:
    mine = set(tensors.blocks) - set(ready)
    if limit is None:
        # Few round trips, and most of the decoding beside the reading.
        total = sum(s.manifest.nbytes for s in steps)
        limit = min(max(total // PARTS + 1, 256 << 10), 16 << 20)
    entry = [
        {e.block: i for i, e in enumerate(s.manifest.entries) if e.block in mine} for s in steps
    ]
    touched = sorted(set().union(*entry))
    batches: list[_Batch] = []
    room = 0
    for number in touched:
        size = sum(
            s.manifest.entries[places[number]].nbytes
            for s, places in zip(steps, entry, strict=True)
            if number in places
        )
        if not batches or size > room:
            batches.append(_Batch([], [], entry))
            room = limit
        batches[-1].blocks.append(number)
        room -= size
    for batch in batches:
        batch.wanted = [step.manifest.needed(batch.blocks) for step in steps]
    return batches


def _read_ahead(
    steps: Sequence[Step], batches: Sequence[_Batch]
) -> Generator[tuple[_Batch, list[dict[int, bytes]]], None, None]:
    """Each batch with its payloads, a dict a step, while those of the next are on their way."""

    def read(batch: _Batch) -> list[dict[int, bytes]]:
        return [_read(s, numbers) for s, numbers in zip(steps, batch.wanted, strict=True)]

    with ThreadPoolExecutor(1, thread_name_prefix="planaria-rl-read") as pool:
        reading: list[Future[list[dict[int, bytes]]]] = [pool.submit(read, b) for b in batches[:1]]
        for number, batch in enumerate(batches):
            payloads = reading.pop().result()
            reading += [pool.submit(read, b) for b in batches[number + 1 : number + 2]]
            yield batch, payloads


def _read(step: Step, numbers: Sequence[int]) -> dict[int, bytes]:
    """Payloads by number, each of the size and hash that the manifest says."""
    if not numbers:
        return {}
    items = step.manifest.items()
    got = step.read(numbers)
    if len(got) != len(numbers):
        raise CorruptError(f"{len(got)} of {len(numbers)} payloads came")
    for number, data in zip(numbers, got, strict=True):
        size, wanted = items[number]
        if len(data) != size or content_hash(data) != wanted:
            raise CorruptError(
                f"a payload of version {step.manifest.version} is not what its manifest says "
                f"({len(data)} bytes of {size}); it is fetched again with the next update"
            )
    return dict(zip(numbers, got, strict=True))


def _sum(value: Digest | None) -> Digest:
    if value is None:
        raise CorruptError("a delta has no base; a full version is needed")
    return value
