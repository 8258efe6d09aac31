"""A feed that keeps what it has read of another one, so that many can read it here.

A relay asks its source for each step and each payload once, whoever asks here and how often, and
hands out manifests as they are: signed by the publisher, so that it cannot change what they say.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.errors import CorruptError, NotCommittedError, PlanariaError
from planaria.rl_sync.transports.feed import Ack, Ahead, Feed, Head, Offer, Piece
from planaria.rl_sync.versions.manifest import content_hash

#: Drafts of so many bases and shards are kept.
_DRAFTS = 8
FETCH = points.declare("rl.relay.fetch", "before a relay fetches payloads that it does not have")


class RelayFeed:
    """Caches a feed, up to a number of bytes."""

    def __init__(self, source: Feed, max_bytes: int = 1 << 30) -> None:
        """Wraps a feed.

        Args:
            source: Where this relay gets its versions.
            max_bytes: Payload bytes to keep; the least recently read go first.
        """
        self._source, self._max = source, max_bytes
        self._lock = threading.RLock()
        self._head: Head | None = None
        self._heads = threading.Lock()
        self._chains: OrderedDict[Any, tuple[int, list[Offer]]] = OrderedDict()
        self._payloads: OrderedDict[str, bytes] = OrderedDict()
        self._drafts: OrderedDict[Any, list[Piece]] = OrderedDict()
        self._ahead = threading.Lock()
        self._tables: dict[str, bytes] = {}
        self._bytes = 0

    def head(self, after: int | None, deadline: Deadline, wait: float | None = None) -> Head | None:
        """See `Feed.head`."""
        if after is None:
            found = self._source.head(None, deadline, wait)
            self._head = found or self._head
            return self._head
        waiting = deadline if wait is None else deadline.sub(wait)
        while True:
            known = self._head
            if known is not None and known.version > after:
                return known
            # One at a time asks the source; the others wait for what it finds.
            if self._heads.acquire(timeout=min(waiting.timeout(), 0.5)):
                try:
                    if self._head is known:
                        found = self._source.head(after, deadline, waiting.remaining())
                        if found is None:
                            return None
                        self._head = found
                finally:
                    self._heads.release()
            elif waiting.expired:
                return None

    def chain(self, have: tuple[int, str] | None, shard: int, deadline: Deadline) -> list[Offer]:
        """See `Feed.chain`."""
        with self._lock:
            newest = self._head.version if self._head is not None else -1
            kept = self._chains.get((have, shard))
            if kept is None or kept[0] < newest or not kept[1]:
                offers = [self._cached(o) for o in self._source.chain(have, shard, deadline)]
                kept = self._chains[have, shard] = newest, offers
                while len(self._chains) > 64:
                    self._chains.popitem(last=False)
            return kept[1]

    def ahead(
        self, have: tuple[int, str], shard: int, seen: tuple[str, int] | None, deadline: Deadline,
        wait: float,
    ) -> Ahead:  # fmt: skip
        """See `Feed.ahead`."""
        waiting, started = deadline.sub(wait), time.monotonic()
        while True:
            known = self._piece((have, shard), seen)
            if known is not None:
                return Ahead(known, over=False, waited=time.monotonic() - started)
            # One at a time asks the source; the others wait for what comes.
            if self._ahead.acquire(timeout=min(waiting.timeout(), 0.5)):
                try:
                    known = self._piece((have, shard), seen)
                    if known is not None:
                        return Ahead(known, over=False, waited=time.monotonic() - started)
                    got = self._source.ahead(have, shard, seen, deadline, waiting.remaining())
                    if got.piece is not None:
                        self._keep((have, shard), got.piece)
                    return got
                finally:
                    self._ahead.release()
            elif waiting.expired:
                return Ahead(None, over=False)

    def table(self, key: str, deadline: Deadline) -> bytes:
        """See `Feed.table`."""
        with self._lock:
            if key not in self._tables:
                self._tables = {key: self._source.table(key, deadline)}
            return self._tables[key]

    def acknowledge(self, ack: Ack, deadline: Deadline) -> None:
        """See `Feed.acknowledge`: it goes on to the publisher."""
        self._source.acknowledge(ack, deadline)

    def close(self) -> None:
        """See `Feed.close`."""
        self._source.close()

    def _cached(self, offer: Offer) -> Offer:
        names = payload_hashes(offer.manifest)

        def read(numbers: Sequence[int], deadline: Deadline) -> list[bytes]:
            if any(not 0 <= n < len(names) for n in numbers):
                raise NotCommittedError("there is no such payload; ask for the chain again")
            with self._lock:
                missing = [n for n in numbers if names[n] not in self._payloads]
                fetched: dict[int, bytes] = {}
                if missing:
                    points.point(FETCH)
                    try:
                        got = offer.read(missing, deadline)
                    except PlanariaError:
                        self._chains.clear()  # the offer may be stale: the next one is asked for
                        raise
                    fetched = dict(zip(missing, got, strict=True))
                    for n, data in fetched.items():
                        self._hold(names[n], data)
                result = []
                for n in numbers:
                    if n not in fetched:
                        self._payloads.move_to_end(names[n])
                    result.append(fetched[n] if n in fetched else self._payloads[names[n]])
                self._shrink()
                return result

        return Offer(offer.manifest, read)

    def _piece(self, key: Any, seen: tuple[str, int] | None) -> Piece | None:
        """What a source was asked for already, after what is known."""
        with self._lock:
            kept = self._drafts.get(key, [])
            number = seen[1] if seen is not None and kept and seen[0] == kept[0].draft else 0
            # A draft that another one has followed is not gone back to.
            fresh = seen is None or (bool(kept) and seen[0] == kept[0].draft)
            return kept[number] if fresh and 0 <= number < len(kept) else None

    def _keep(self, key: Any, piece: Piece) -> None:
        with self._lock:
            kept = self._drafts.setdefault(key, [])
            if kept and kept[0].draft != piece.draft:
                kept.clear()
            if piece.number == len(kept):
                kept.append(piece)
            self._drafts.move_to_end(key)
            while len(self._drafts) > _DRAFTS:
                self._drafts.popitem(last=False)
            for model in piece.models:
                self._hold(content_hash(model), model)
            for entry, data in zip(piece.entries, piece.payloads, strict=True):
                self._hold(entry.hash, data)
            self._shrink()

    def _hold(self, name: str, data: bytes) -> None:
        """Keeps a payload; one of other bytes than named would be handed out for ever."""
        if name not in self._payloads and content_hash(data) == name:
            self._payloads[name] = data
            self._bytes += len(data)

    def _shrink(self) -> None:
        while self._bytes > self._max and self._payloads:
            self._bytes -= len(self._payloads.popitem(last=False)[1])


def payload_hashes(manifest: bytes) -> list[str]:
    """The hashes of a manifest's payloads in order; the manifest is not verified.

    Raises:
        CorruptError: It is not a manifest.
    """
    try:
        body = json.loads(manifest)["manifest"]
        return [str(h) for _, h in body["models"]] + [str(e[-1]) for e in body["entries"]]
    except (KeyError, TypeError, ValueError, RecursionError, IndexError) as error:
        raise CorruptError(f"a weight version's manifest is malformed ({error!r})") from error
