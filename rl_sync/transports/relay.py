"""A feed that keeps what it has read of another one, so that many can read it here.

A relay asks its source for each step and each payload once, whoever asks here and how often, and
hands out manifests as they are: signed by the publisher, so that it cannot change what they say.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.errors import PlanariaError
from planaria.rl_sync.transports.feed import Ack, Feed, Head, Offer

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
        self._payloads: OrderedDict[tuple[bytes, int], bytes] = OrderedDict()
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
        name = offer.manifest[9:73]  # the manifest's own HMAC

        def read(numbers: Sequence[int], deadline: Deadline) -> list[bytes]:
            with self._lock:
                missing = [n for n in numbers if (name, n) not in self._payloads]
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
                        self._payloads[name, n] = data
                        self._bytes += len(data)
                result = []
                for n in numbers:
                    if n not in fetched:
                        self._payloads.move_to_end((name, n))
                    result.append(self._payloads[name, n])
                while self._bytes > self._max and self._payloads:
                    self._bytes -= len(self._payloads.popitem(last=False)[1])
                return result

        return Offer(offer.manifest, read)
