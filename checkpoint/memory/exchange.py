"""Forming parity: each node encodes one stripe of its group, from blocks that it asks for.

The first parity node of a stripe is its encoder. It asks the k nodes that hold the stripe's data
for a batch of blocks while it encodes the batch before, keeps its own parity, and sends the other
m - 1 on. So each chunk of data leaves its node once, each parity but the encoder's own crosses the
network once. Blocks that have not changed since the snapshot before are neither sent nor encoded:
their parity is copied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from planaria.checkpoint.erasure import make_codec
from planaria.checkpoint.format.checksum import checksum
from planaria.checkpoint.memory import points
from planaria.checkpoint.memory.courtesy import yields
from planaria.checkpoint.memory.held import Held, Parity
from planaria.checkpoint.memory.holdings import Holdings
from planaria.checkpoint.memory.links import Links, answer_of
from planaria.checkpoint.memory.memory import Key, Reply
from planaria.checkpoint.memory.meta import Group, Meta
from planaria.checkpoint.memory.scratch import Scratch
from planaria.core.points import point
from planaria.errors import PlanariaError, SaveFailedError

if TYPE_CHECKING:
    from planaria.checkpoint.erasure import Codec

# So much is asked of a node at once, and of all nodes ahead of the encoder: the larger, the fewer
# times threads wait for each other.
_BATCH_NBYTES = 8 << 20
_AHEAD_NBYTES = 64 << 20


class Exchange:
    """Forms the parity of this node's stripe."""

    def __init__(self, links: Links, holdings: Holdings) -> None:
        self._links = links
        self._holdings = holdings
        self.scratch = Scratch()
        #: Of the last exchange: blocks that were encoded, and blocks that were copied.
        self.encoded_blocks, self.copied_blocks = 0, 0

    def run(self, held: Held, base: Key | None) -> None:
        """Makes room for this node's parity, forms that of its stripe, and sees it stored.

        Args:
            held: The snapshot; all nodes have sealed it.
            base: The snapshot before, from which unchanged parity may be taken.

        Raises:
            PlanariaError: It could not be done; says at which node.
        """
        meta = held.meta
        assert meta is not None  # the exchange begins with it
        group = meta.group_of(self._links.uuid)
        if group.stripes.m == 0:
            return
        me = group.number(self._links.uuid)
        self._allocate(held, meta, group, me)
        _Stripe(self, self._links, self._holdings, held, meta, group, me).encode(base)

    def _allocate(self, held: Held, meta: Meta, group: Group, me: int) -> None:
        nbytes = group.stripes.chunk_nbytes
        blocks = -(-nbytes // meta.block_nbytes)
        made: dict[int, Parity] = {}
        try:
            for index, stripe in enumerate(group.stripes.parity_stripes(me)):
                span = self._holdings.allocate(
                    nbytes, self._links.deadline(), f"parity of {held.key}"
                )
                made[stripe] = Parity(span, index, [None] * blocks)
        finally:
            with self._holdings.changed:
                if held.dropped or len(made) < group.stripes.m:
                    for parity in made.values():
                        self._holdings.memory.free(parity.span)
                else:
                    held.parity = made
                self._holdings.changed.notify_all()
        if held.dropped:
            raise SaveFailedError(f"{held.key} was given up")


class _Stripe:
    """The stripe that a node encodes: the one with its own number."""

    def __init__(
        self,
        exchange: Exchange,
        links: Links,
        holdings: Holdings,
        held: Held,
        meta: Meta,
        group: Group,
        number: int,
    ) -> None:
        self._exchange, self._links, self._holdings = exchange, links, holdings
        self._held, self._meta, self._number = held, meta, number
        uuids = group.part_uuids(number)
        self._k = group.stripes.k
        self._sources, self._others = uuids[: self._k], uuids[self._k + 1 :]
        self._nbytes = group.stripes.chunk_nbytes
        self._block_nbytes = meta.block_nbytes
        self._blocks = -(-self._nbytes // meta.block_nbytes)
        self._codec: Codec = make_codec(self._k, group.stripes.m)
        self._deadline = links.deadline()
        self._storing: deque[Future[Reply]] = deque()
        self._scratch = exchange.scratch
        self._rooms: dict[tuple[int, str], NDArray[np.uint8]] = {}

    def encode(self, base: Key | None) -> None:
        """Forms and stores all of the stripe's parity."""
        todo = set(range(self._blocks))
        if base is not None:
            todo = self._keep(base, sorted(todo - self._changed(base)))
        self._exchange.encoded_blocks = len(todo)
        self._exchange.copied_blocks = self._blocks - len(todo)
        most = min(_BATCH_NBYTES, _AHEAD_NBYTES // (2 * self._k))
        batches = _batches(sorted(todo), max(1, most // self._block_nbytes))
        coming: deque[tuple[range, list[Future[Reply]]]] = deque()
        for batch in batches:
            coming.append((batch, self._fetch(batch)))
            if len(coming) > 1:
                self._encode_batch(*coming.popleft())
        while coming:
            self._encode_batch(*coming.popleft())
        while self._storing:
            answer_of(self._storing.popleft())

    def _changed(self, base: Key) -> set[int]:
        """Blocks of which a node's data is not the same as in `base`, or not known to be."""
        request = self._request("compare", base=base.to_json())
        answers = self._links.ask(self._sources, request, deadline=self._deadline)
        changed: set[int] = set()
        for uuid in self._sources:
            answer = answers[uuid]
            if isinstance(answer, PlanariaError):
                raise SaveFailedError(f"node {uuid}: {answer}") from answer
            for first, stop in answer[0]["changed"]:
                changed.update(range(int(first), int(stop)))
        return changed

    def _keep(self, base: Key, blocks: list[int]) -> set[int]:
        """Has parity of `base` copied on all nodes that hold it; returns what is yet to encode."""
        request = self._request("keep", base=base.to_json(), blocks=_runs(blocks))
        holders = [self._links.uuid, *self._others]
        answers = self._links.ask(holders, request, deadline=self._deadline)
        kept = set(blocks)
        for uuid in holders:
            answer = answers[uuid]
            if isinstance(answer, PlanariaError):
                raise SaveFailedError(f"node {uuid}: {answer}") from answer
            kept.intersection_update(
                block for first, stop in answer[0]["kept"] for block in range(int(first), int(stop))
            )
        return set(range(self._blocks)) - kept

    def _fetch(self, batch: range) -> list[Future[Reply]]:
        point(points.FETCH, step=self._held.key.step)
        self._links.pace.give_way(self._deadline)  # it would come in beside a collective's
        start, stop = self._extent(batch)
        request = self._request(
            "fetch", start=start, stop=stop, paced=True, yields=yields(self._deadline)
        )
        coming = []
        for uuid in self._sources:
            room = self._scratch.take(stop - start)
            self._rooms[batch.start, uuid] = room
            coming.append(
                self._links.submit(uuid, request, deadline=self._deadline, into=[room.data])
            )
        return coming

    def _encode_batch(self, batch: range, coming: list[Future[Reply]]) -> None:
        rows = [answer_of(future)[1][0] for future in coming]
        start, stop = self._extent(batch)
        point(points.ENCODE, step=self._held.key.step)
        with self._holdings.pinned(self._held.key) as held:
            parity = held.parity[self._number]
            own = self._holdings.memory.view(parity.span)[start:stop]
            # New buffers for the other nodes: a store that is tried again must find them unchanged.
            others = [np.empty(stop - start, np.uint8) for _ in self._others]
            self._codec.encode(rows, [own, *others])
            for uuid in self._sources:
                self._scratch.give(self._rooms.pop((batch.start, uuid)))
            sums = self._sums(own)
            with self._holdings.changed:
                parity.checksums[batch.start : batch.stop] = sums
        for uuid, part in zip(self._others, others, strict=True):
            self._store(uuid, batch, part)

    def _store(self, uuid: str, batch: range, part: Any) -> None:
        point(points.STORE, step=self._held.key.step)
        request = self._request("store", first=batch.start, checksums=self._sums(part))
        self._storing.append(
            self._links.submit(uuid, request, [part.data], deadline=self._deadline, paced=True)
        )
        while len(self._storing) > 2 * len(self._others):
            answer_of(self._storing.popleft())

    def _sums(self, part: Any) -> list[int]:
        step = self._block_nbytes
        return [checksum(part[i : i + step]) for i in range(0, len(part), step)]

    def _extent(self, batch: range) -> tuple[int, int]:
        step = self._block_nbytes
        return batch.start * step, min(batch.stop * step, self._nbytes)

    def _request(self, op: str, **more: Any) -> dict[str, Any]:
        return {"op": op, "key": self._held.key.to_json(), "stripe": self._number, **more}


def _batches(blocks: Sequence[int], most: int) -> Iterator[range]:
    """Blocks as ranges of at most `most`."""
    for first, stop in _runs(blocks):
        for start in range(first, stop, most):
            yield range(start, min(start + most, stop))


def _runs(blocks: Sequence[int]) -> list[list[int]]:
    """Ascending numbers as [first, end) pairs."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and runs[-1][1] == block:
            runs[-1][1] = block + 1
        else:
            runs.append([block, block + 1])
    return runs
