"""Decodes a version's blocks while the version is still being made.

Nothing is believed of what is read so: a block's changes are used only where the signed manifest
that comes later names the same bytes, by hash, on the same base, and they then count in its digest
like any others. What does not fit is read and decoded again in the ordinary way.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.errors import CorruptError, PlanariaError
from planaria.rl_sync.codecs.registry import decoder
from planaria.rl_sync.diff.digest import Digest
from planaria.rl_sync.diff.scan import Changes
from planaria.rl_sync.layout.positions import digest_of_changes
from planaria.rl_sync.layout.target import RolloutTensors
from planaria.rl_sync.transports.feed import Feed, Piece
from planaria.rl_sync.versions.manifest import Entry, Manifest, content_hash, too_large
from planaria.rl_sync.versions.speeds import DECODING, Speeds

DECODE = points.declare("rl.ahead.block", "before a block of a version in the making is decoded")
#: The longest model; its tables take less.
MAX_MODEL = 64 << 10
_WAIT_S = 5.0


@dataclass(frozen=True)
class Decoded:
    """A block's changes, the bytes that they came in, and what they add to the digest."""

    entry: Entry
    model: str
    changes: Changes
    move: Digest


@dataclass
class ReadAhead:
    """What was decoded of a version before it was published.

    Attributes:
        base: Version and digest of the weights that it was decoded on.
        table: Key of the block table.
        blocks: By number.
        nbytes: Bytes that came.
        seconds: Reading them, without waiting for them to be made.
        speeds: Notes how long decoding takes.
    """

    base: tuple[int, str]
    table: str
    blocks: dict[int, Decoded] = field(default_factory=dict)
    nbytes: int = 0
    seconds: float = 0.0
    speeds: Speeds = field(default_factory=lambda: Speeds(DECODING))

    def fitting(self, manifest: Manifest, shard: int) -> Mapping[int, Decoded]:
        """The blocks that a manifest names with the same bytes, on the same base."""
        if manifest.base_digest is None or manifest.table != self.table:
            return {}
        if (manifest.base_version, manifest.base_digest[shard]) != self.base:
            return {}
        found: dict[int, Decoded] = {}
        for entry in manifest.entries:
            known = self.blocks.get(entry.block)
            model = manifest.models[entry.model][1] if entry.model >= 0 else ""
            if known is not None and _same(known, entry, model):
                found[entry.block] = known
        return found

    def take(self, piece: Piece, tensors: RolloutTensors) -> None:
        """Decodes a piece.

        Raises:
            CorruptError: It cannot be one of such weights, or does not decode.
        """
        self.nbytes += piece.nbytes
        hashes = [content_hash(model) for model in piece.models]
        if any(len(model) > MAX_MODEL for model in piece.models):
            raise CorruptError("a version in the making has a too large model")
        mine = set(tensors.blocks)
        for entry, data in zip(piece.entries, piece.payloads, strict=True):
            if entry.block not in mine or entry.block in self.blocks:
                raise CorruptError("a version in the making has a block that is not expected")
            block = tensors.table.blocks[entry.block]
            fits = len(data) == entry.nbytes and not too_large(entry, block.elements)
            if not fits or content_hash(data) != entry.hash:
                raise CorruptError("a version in the making has a block of other bytes than named")
            points.point(DECODE)
            model = piece.models[entry.model] if entry.model >= 0 else b""
            base = tensors.read(block)
            started = time.thread_time()
            changes = decoder(entry.codec).decode(data, block.fmt, base, entry.changed, model)
            seconds = time.thread_time() - started
            self.speeds.note(entry.codec, base.nbytes, entry.changed, seconds)
            move = digest_of_changes(tensors.table, block, changes)
            of = hashes[entry.model] if entry.model >= 0 else ""
            self.blocks[entry.block] = Decoded(entry, of, changes, move)


def read_ahead(
    feed: Feed,
    tensors: RolloutTensors,
    have: tuple[int, str],
    deadline: Deadline,
    speeds: Speeds | None = None,
) -> ReadAhead:
    """Reads and decodes what there is of the next version until it is there or given up.

    The next piece is on its way while one is decoded. Failures are not the caller's: what was not
    decoded here is read with the version.
    """
    found = ReadAhead(have, tensors.table.key, speeds=speeds or Speeds(DECODING))
    seen: tuple[str, int] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="planaria-rl-ahead") as pool:
        try:
            asked = pool.submit(_ask, feed, have, tensors.shard, seen, deadline, found)
            broken = False
            while not deadline.expired:
                piece, over = asked.result()
                if over:
                    break
                if piece is not None:
                    if seen is not None and seen[0] != piece.draft:  # another attempt
                        found.blocks.clear()
                        broken = False
                    seen = piece.draft, piece.number + 1
                asked = pool.submit(_ask, feed, have, tensors.shard, seen, deadline, found)
                if piece is not None and not broken:
                    try:
                        found.take(piece, tensors)
                    except PlanariaError:
                        broken = True  # whatever it is, the ordinary way finds out
        except PlanariaError:
            pass  # a connection that was lost, say; the ordinary way makes a new one
    return found


def _ask(
    feed: Feed,
    have: tuple[int, str],
    shard: int,
    seen: tuple[str, int] | None,
    deadline: Deadline,
    found: ReadAhead,
) -> tuple[Piece | None, bool]:
    started = deadline.remaining()
    got = feed.ahead(have, shard, seen, deadline, _WAIT_S)
    if got.piece is not None:
        found.seconds += max(started - deadline.remaining() - got.waited, 0.0)
    return got.piece, got.over


def _same(known: Decoded, entry: Entry, model: str) -> bool:
    return known.model == model and known.entry.with_model(entry.model) == entry
