"""The publisher's feed: what was published, put together from the parts of all ranks.

For a receiver at a known version there is a chain of the published deltas, or, when it is further
behind, one folded delta that leads there at once; for any other there is a full version. What a
receiver has acknowledged decides what is still kept.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median_high, median_low
from typing import Any

from planaria import telemetry
from planaria.core.deadline import Deadline
from planaria.errors import NotCommittedError
from planaria.rl_sync.layout.table import BlockTable
from planaria.rl_sync.transports.feed import Ack, Ahead, Head, Offer
from planaria.rl_sync.versions.choice import Learnt
from planaria.rl_sync.versions.draft import Drafts
from planaria.rl_sync.versions.manifest import Entry, Manifest
from planaria.rl_sync.versions.owner import Owner

#: A receiver that is further behind than this gets a folded delta.
REPLAY = 2
#: Versions that are kept for receivers that said nothing yet.
KEEP = 4
#: A full version stays readable for this long after it was offered.
LEASE_S = 300.0
_FADING = 0.8
#: A receiver that has said nothing for this long holds back no old version any more, and what it
#: measured does not count.
SILENT_S = 600.0
#: After this long it is forgotten: rollouts come and go under new names.
FORGOTTEN_S = 86400.0


@dataclass
class Worker:
    """What is known of a receiver."""

    ack: Ack
    at: float = field(default_factory=time.monotonic)
    link: float = 0.0


class VersionLog:
    """A feed of what one publisher publishes. Safe for threads."""

    def __init__(
        self, table: BlockTable, owners: Sequence[Owner], token: bytes | None, lineage: str = ""
    ) -> None:
        self._table, self._owners, self._lineage = table, list(owners), lineage
        self.token = token
        self._changed = threading.Condition()
        self._folding = threading.Lock()
        self._digests: dict[int, tuple[str, ...]] = {}
        self._made: dict[tuple[int | None, int], tuple[Manifest, bytes, list[tuple[int, int]]]] = {}
        self._leases: list[tuple[int, float]] = []  # a version that somebody reads, and until when
        self.workers: dict[str, Worker] = {}
        #: What of the next version is ready.
        self.drafts = Drafts(table, self._changed, lambda: next(reversed(self._digests), None))

    @property
    def newest(self) -> Head | None:
        """The newest version."""
        with self._changed:
            if not self._digests:
                return None
            version = next(reversed(self._digests))
            return Head(version, self._digests[version])

    def compose(
        self, base: int | None, version: int, digest: tuple[str, ...],
        parts: Sequence[tuple[list[tuple[int, str]], list[Entry]]],
    ) -> tuple[Manifest, bytes, list[tuple[int, int]]]:  # fmt: skip
        """A manifest of the owners' parts, signed, and who has each of its payloads."""
        models: list[tuple[int, str]] = []
        entries: list[Entry] = []
        at_models: list[tuple[int, int]] = []
        at_entries: list[tuple[int, int]] = []
        for number, (sizes, found) in enumerate(parts):
            shifted = [
                Entry(e.block, e.codec, e.model + len(models) if e.model >= 0 else -1, e.nbytes,
                      e.changed, e.hash)
                for e in found
            ]  # fmt: skip
            at_models += [(number, i) for i in range(len(sizes))]
            at_entries += [(number, len(sizes) + i) for i in range(len(found))]
            models += sizes
            entries += shifted
        base_digest = None if base is None else self._digests[base]
        manifest = Manifest(
            version, base, base_digest, digest, self._table.key, tuple(models), tuple(entries),
            self._lineage,
        )  # fmt: skip
        return manifest, manifest.sign(self.token), at_models + at_entries

    def add(
        self, version: int, digest: tuple[str, ...],
        made: tuple[Manifest, bytes, list[tuple[int, int]]] | None = None,
    ) -> None:  # fmt: skip
        """Makes a version the newest one, and wakes who waits for it."""
        with self._changed:
            self._digests[version] = digest
            if made is not None:
                self._made[made[0].base_version, version] = made
            self._changed.notify_all()

    def needed(self) -> list[int]:
        """Versions that somebody is at or reads; what is older may be forgotten."""
        now = time.monotonic()
        with self._changed:
            self._leases = [lease for lease in self._leases if lease[1] > now]
            at = [w.ack.version for w in self.workers.values() if now - w.at < SILENT_S]
            return [*(version for version, _ in self._leases), *at]

    def forget_all_but(self, kept: Sequence[int]) -> None:
        """Forgets versions; `kept` is what all owners still have."""
        known = set(kept)
        with self._changed:
            newest = next(reversed(self._digests))
            self._digests = {v: d for v, d in self._digests.items() if v in known or v == newest}
            self._made = {
                (b, v): m for (b, v), m in self._made.items()
                if v in self._digests and (b is None or b in self._digests)
            }  # fmt: skip

    def acknowledged(self, version: int) -> int:
        """How many receivers serve this version or a newer one."""
        with self._changed:
            return sum(w.ack.version >= version for w in self.workers.values())

    def wait_acknowledged(self, version: int, count: int, deadline: Deadline) -> bool:
        """Waits until so many receivers have acknowledged a version; False if not in time."""
        with self._changed:
            return self._changed.wait_for(
                lambda: sum(w.ack.version >= version for w in self.workers.values()) >= count,
                timeout=deadline.timeout(),
            )

    def head(self, after: int | None, deadline: Deadline, wait: float | None = None) -> Head | None:
        """See `Feed.head`."""

        def newer() -> bool:
            return bool(self._digests) and (after is None or next(reversed(self._digests)) > after)

        with self._changed:
            timeout = deadline.timeout() if wait is None else min(wait, deadline.timeout())
            self._changed.wait_for(newer, timeout=timeout)
            return self.newest if newer() else None

    def chain(self, have: tuple[int, str] | None, shard: int, deadline: Deadline) -> list[Offer]:
        """See `Feed.chain`."""
        with self._folding:
            newest = self.newest
            if newest is None or (have is not None and have[0] > newest.version):
                return []
            if have is not None and have[0] == newest.version and self._same(have, shard):
                return []
            with self._changed:
                known = list(self._digests)
            if have is not None and self._same(have, shard):
                way = known[known.index(have[0]) :]
                try:
                    if len(way) - 1 <= REPLAY:
                        pairs = list(pairwise(way))
                    else:
                        pairs = [(way[0], way[-1])]
                    return [self._delta(base, version) for base, version in pairs]
                except NotCommittedError:
                    pass  # forgotten just now
            return [self._full(newest)]

    def ahead(
        self, have: tuple[int, str], shard: int, seen: tuple[str, int] | None, deadline: Deadline,
        wait: float,
    ) -> Ahead:  # fmt: skip
        """See `Feed.ahead`."""
        return self.drafts.ahead(have, shard, seen, deadline.sub(wait))

    def table(self, key: str, deadline: Deadline) -> bytes:
        """See `Feed.table`.

        Raises:
            NotCommittedError: It is the table of an earlier layout.
        """
        if key != self._table.key:
            raise NotCommittedError("there is no block table of this key; ask for the chain again")
        return self._table.encoded

    def acknowledge(self, ack: Ack, deadline: Deadline) -> None:
        """See `Feed.acknowledge`."""
        with self._changed:
            newest = next(reversed(self._digests), ack.version)
            telemetry.count(
                "rl.worker.lag",
                newest - ack.version,
                worker=ack.worker,
                version=ack.version,
                bytes=ack.nbytes,
                link=ack.link,
                codec=ack.codec,
            )
            before = self.workers.get(ack.worker)
            # Other work makes a link look slow, never fast: a slower one is believed by and by.
            link = max(ack.link, _FADING * before.link) if before is not None else ack.link
            now = time.monotonic()
            self.workers = {n: w for n, w in self.workers.items() if now - w.at < FORGOTTEN_S}
            self.workers[ack.worker] = Worker(ack, link=link)
            done = next((lease for lease in self._leases if lease[0] <= ack.version), None)
            if done is not None:
                self._leases.remove(done)
            self._changed.notify_all()

    def close(self) -> None:
        """See `Feed.close`."""

    def status(self) -> dict[str, Any]:
        """The newest version and each receiver's last acknowledgement, as JSON data."""
        newest, now = self.newest, time.monotonic()
        with self._changed:
            rows = [
                w.ack.to_json() | {
                    "lag": newest.version - w.ack.version if newest is not None else 0,
                    "silent_seconds": now - w.at,
                }
                for _, w in sorted(self.workers.items())
            ]  # fmt: skip
        return {"version": None if newest is None else newest.version, "workers": rows}

    def learnt(self) -> Learnt:
        """What receivers have measured: of link and decoding what half of them reach."""
        with self._changed:
            now = time.monotonic()
            workers = [w for w in self.workers.values() if now - w.at < SILENT_S]
            links = [w.link for w in workers if w.link > 0]
            decoding: dict[str, list[float]] = {}
            for worker in workers:
                for codec, ratio in worker.ack.decoding.items():
                    decoding.setdefault(codec, []).append(ratio)
            here = sum(w.ack.host == socket.gethostname() for w in workers)
        return Learnt(
            median_low(links) if links else 0.0,
            {codec: median_high(ratios) for codec, ratios in decoding.items()},
            here,
        )

    def offer(self, base: int | None, version: int) -> Offer:
        """A version that was composed already."""
        return self._offered(base, version, self._made[base, version])

    def _same(self, have: tuple[int, str], shard: int) -> bool:
        known = self._digests.get(have[0])
        return known is not None and 0 <= shard < len(known) and known[shard] == have[1]

    def _delta(self, base: int, version: int) -> Offer:
        made = self._made.get((base, version))
        if made is None:
            parts = [owner.delta(base, version) for owner in self._owners]
            made = self.compose(base, version, self._digests[version], parts)
            with self._changed:
                self._made[base, version] = made
        return self._offered(base, version, made)

    def _full(self, head: Head) -> Offer:
        with self._changed:
            self._leases.append((head.version, time.monotonic() + LEASE_S))
        made = self._made.get((None, head.version))
        if made is None:
            parts = [([], owner.full(head.version)) for owner in self._owners]
            made = self.compose(None, head.version, head.digest, parts)
            with self._changed:
                self._made[None, head.version] = made
        return self._offered(None, head.version, made)

    def _offered(
        self, base: int | None, version: int,
        made: tuple[Manifest, bytes, list[tuple[int, int]]],
    ) -> Offer:  # fmt: skip
        places = made[2]

        def read(numbers: Sequence[int], deadline: Deadline) -> list[bytes]:
            if any(not 0 <= n < len(places) for n in numbers):
                raise NotCommittedError("there is no such payload; ask for the chain again")
            asked: dict[int, list[int]] = {}
            for n in numbers:
                owner, inner = places[n]
                asked.setdefault(owner, []).append(inner)
            try:
                got = {o: iter(self._owners[o].read(base, version, ns)) for o, ns in asked.items()}
            except NotCommittedError:
                with self._changed:  # who asks again gets one that is made anew
                    if self._made.get((base, version)) is made:
                        del self._made[base, version]
                raise
            return [next(got[places[n][0]]) for n in numbers]

        return Offer(made[1], read)
