"""What a node that is lost held, decoded from the parts that its group still has.

Parts come in pieces, several of them on their way at a time from all nodes that are asked, while
the piece before is decoded. This node's own part is taken where it lies.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planaria.checkpoint.erasure import make_codec
from planaria.checkpoint.memory.holdings import Holdings
from planaria.checkpoint.memory.links import Links, answer_of
from planaria.checkpoint.memory.memory import Reply
from planaria.checkpoint.memory.meta import Group, Meta
from planaria.checkpoint.memory.placement import Part
from planaria.checkpoint.memory.scratch import Scratch
from planaria.core.deadline import Deadline
from planaria.errors import CorruptError, DeadlineError, NotCommittedError, PlanariaError, WireError

# What is decoded at once: small enough to stay in the processor's caches.
_PIECE_NBYTES = 2 << 20
# Pieces on their way while one is decoded.
_AHEAD = 2
# A node that could not be reached is not asked first again for so long.
_AVOIDED_S = 10.0


class Avoided:
    """Nodes that could not be reached just before. Thread-safe."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, uuid: str) -> None:
        """Notes that a node could not be reached."""
        with self._lock:
            self._since[uuid] = time.monotonic()

    def holds(self, uuid: str) -> bool:
        """Whether a node could not be reached a short while ago."""
        with self._lock:
            since = self._since.get(uuid)
            return since is not None and time.monotonic() - since < _AVOIDED_S

    def clear(self) -> None:
        """Gives all of them another chance."""
        with self._lock:
            self._since.clear()


@dataclass
class _Asked:
    """A piece on its way: which parts were asked for, and of which more can be."""

    piece: Part
    uuids: list[str]
    missing: int
    spare: list[int]
    coming: dict[int, Future[Reply]] = field(default_factory=dict)
    rooms: dict[int, NDArray[np.uint8]] = field(default_factory=dict)


class Decoding:
    """Decodes bytes of one node's image; a part that fails is made up for by another."""

    def __init__(
        self,
        links: Links,
        holdings: Holdings,
        avoided: Avoided,
        meta: Meta,
        group: Group,
        owner: str,
        scratch: Scratch,
    ) -> None:
        self._links, self._holdings, self._avoided = links, holdings, avoided
        self._meta, self._group, self._owner = meta, group, owner
        self._codec = make_codec(group.stripes.k, group.stripes.m)
        self._scratch = scratch

    def decode(
        self,
        wanted: Sequence[Part],
        target: memoryview[Any],
        lost: PlanariaError,
        deadline: Deadline,
        *,
        check: bool,
    ) -> None:
        """Decodes parts of chunks, one after the other, into `target`.

        Args:
            wanted: The parts.
            target: As long as they are together.
            lost: Why the owner does not give them.
            deadline: When to give up.
            check: Whether those who send compare what they send with its checksums; if not, the
                caller must compare what comes out.

        Raises:
            CorruptError: Too few parts are left; says why.
        """
        pieces = deque(piece for part in wanted for piece in _cut(part))
        asked: deque[_Asked] = deque()
        at = 0
        with contextlib.ExitStack() as pinned:
            with contextlib.suppress(NotCommittedError):  # this node need not have any part
                pinned.enter_context(self._holdings.pinned(self._meta.key))
            try:
                while pieces or asked:
                    while pieces and len(asked) <= _AHEAD:
                        asked.append(self._ask(pieces.popleft(), deadline, check))
                    now = asked[0]
                    self._finish(now, target[at : at + now.piece.nbytes], lost, deadline, check)
                    asked.popleft()
                    at += now.piece.nbytes
            finally:  # what is still under way must not use memory that is not pinned any more
                for each in asked:
                    for future in each.coming.values():
                        with contextlib.suppress(PlanariaError):
                            answer_of(future)

    def _ask(self, piece: Part, deadline: Deadline, check: bool) -> _Asked:
        """Asks for as many parts as are needed."""
        uuids = self._group.part_uuids(piece.stripe)
        missing = uuids.index(self._owner)
        others = [i for i in range(len(uuids)) if i != missing]
        # This node's own first, data before parity, those that did not answer last.
        others.sort(key=lambda i: (self._avoided.holds(uuids[i]), uuids[i] != self._links.uuid, i))
        asked = _Asked(piece, uuids, missing, others[self._codec.k :])
        for i in others[: self._codec.k]:
            self._fetch(asked, i, deadline, check)
        return asked

    def _fetch(self, asked: _Asked, index: int, deadline: Deadline, check: bool) -> None:
        uuid, piece = asked.uuids[index], asked.piece
        request = {
            "op": "fetch",
            "key": self._meta.key.to_json(),
            "stripe": piece.stripe,
            "start": piece.start,
            "stop": piece.start + piece.nbytes,
            "check": check,
        }
        # A node that is silent must leave time to ask another one.
        share = deadline.remaining() / (2 + self._group.stripes.m)
        part = deadline.sub(min(self._links.timeout_s, share))
        if uuid == self._links.uuid:
            asked.coming[index] = self._links.run(lambda: self._own(request, part))
            return
        room = asked.rooms[index] = self._scratch.take(piece.nbytes)
        asked.coming[index] = self._links.submit(uuid, request, deadline=part, into=[room.data])

    def _own(self, request: dict[str, Any], deadline: Deadline) -> Reply:
        with self._holdings.answering():  # it is pinned until all is decoded, so as it lies
            return self._links.call(self._links.uuid, request, deadline=deadline)

    def _finish(
        self,
        asked: _Asked,
        into: memoryview[Any],
        lost: PlanariaError,
        deadline: Deadline,
        check: bool,
    ) -> None:
        """Waits for the parts and decodes; asks others for what fails."""
        rows: dict[int, Any] = {}
        wrong = [str(lost)]
        while asked.coming:
            index, future = next(iter(asked.coming.items()))
            try:
                (rows[index],) = answer_of(future)[1]
            except PlanariaError as error:
                wrong.append(f"node {asked.uuids[index]}: {error}")
                if isinstance(error, WireError | DeadlineError):
                    self._avoided.add(asked.uuids[index])
                if asked.spare:
                    self._fetch(asked, asked.spare.pop(0), deadline, check)
            finally:
                del asked.coming[index]
        piece = asked.piece
        if len(rows) < self._codec.k:
            raise CorruptError(
                f"{self._meta.key}: bytes {piece.start} to {piece.start + piece.nbytes} of stripe "
                f"{piece.stripe} cannot be decoded: {len(rows)} of the {self._codec.k} parts "
                f"needed are left ({'; '.join(wrong)}); take the newest checkpoint on disk"
            )
        self._codec.rebuild(rows, {asked.missing: into})
        for index in rows:
            self._scratch.give(asked.rooms.get(index))


def _cut(part: Part) -> list[Part]:
    return [
        Part(part.stripe, at, min(_PIECE_NBYTES, part.start + part.nbytes - at))
        for at in range(part.start, part.start + part.nbytes, _PIECE_NBYTES)
    ]
