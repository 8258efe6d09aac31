"""Reading a snapshot: from this node, from the node that has it, or decoded from what survives."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np

from planaria.checkpoint.erasure import make_codec
from planaria.checkpoint.memory import points
from planaria.checkpoint.memory.holdings import Holdings
from planaria.checkpoint.memory.images import mismatch, view_file
from planaria.checkpoint.memory.links import Links, answer_of
from planaria.checkpoint.memory.memory import Key, Reply
from planaria.checkpoint.memory.meta import Group, ImageFile, Meta
from planaria.checkpoint.memory.placement import Part
from planaria.core.deadline import Deadline
from planaria.core.points import point
from planaria.errors import CorruptError, DeadlineError, NotCommittedError, PlanariaError, WireError

#: Finds the description of a snapshot.
Describe = Callable[[Key, Deadline], Meta]

# What is decoded at once, while the parts of what comes next are on their way.
_PIECE_NBYTES = 4 << 20
# A node that could not be reached is not asked first again for so long.
_AVOIDED_S = 10.0


class Reading:
    """Reads files of snapshots. Thread-safe."""

    def __init__(self, links: Links, holdings: Holdings, describe: Describe) -> None:
        self._links = links
        self._holdings = holdings
        self._describe = describe
        self._avoided: dict[str, float] = {}
        self._lock = threading.Lock()

    def read(self, key: Key, file: str, offset: int, into: memoryview, deadline: Deadline) -> None:
        """Reads bytes of a file; see `SnapshotNode.read`."""
        point(points.READ, step=key.step)
        meta = self._describe(key, deadline)
        nbytes = meta.files.get(file)
        if nbytes is None:
            raise NotCommittedError(f"{key} has no file {file}")
        if not 0 <= offset <= offset + len(into) <= nbytes:
            raise CorruptError(
                f"{file} of {key} has {nbytes} bytes; {len(into)} from byte {offset} on were "
                "asked for"
            )
        if not len(into):
            return
        owner = meta.owner(file).member.uuid
        try:
            if self._avoids(owner):
                raise WireError(f"node {owner} could not be reached just before")
            self._from_owner(key, owner, file, offset, into, deadline)
        except PlanariaError as error:
            group = meta.group_of(owner)
            if group.stripes.m == 0:
                if not self._avoids(owner):
                    raise
                self._from_owner(key, owner, file, offset, into, deadline)
                return
            self._from_parts(meta, group, owner, file, offset, into, deadline, error)

    def _from_owner(
        self, key: Key, uuid: str, file: str, offset: int, into: memoryview, deadline: Deadline
    ) -> None:
        """Reads from the node whose image the file is in."""
        if uuid == self._links.uuid:
            with self._holdings.pinned(key) as held:
                memory, stop = self._holdings.memory, offset + len(into)
                into[:] = view_file(memory, held, file, offset, stop).data
            return
        request = {
            "op": "read", "key": key.to_json(), "file": file, "start": offset, "nbytes": len(into)
        }  # fmt: skip
        try:
            # A node that is silent must leave time to do without it.
            part = deadline.sub(min(self._links.timeout_s, deadline.remaining() / 3))
            _, payloads = self._links.call(uuid, request, deadline=part)
        except (WireError, DeadlineError):
            self._avoid(uuid)
            raise
        data = memoryview(payloads[0])
        if len(data) != len(into):
            raise CorruptError(f"node {uuid} sent {len(data)} bytes of {file}, not {len(into)}")
        into[:] = data

    def _from_parts(
        self,
        meta: Meta,
        group: Group,
        owner: str,
        file: str,
        offset: int,
        into: memoryview,
        deadline: Deadline,
        lost: PlanariaError,
    ) -> None:
        """Decodes what the owner does not give, whole checksummed chunks at a time."""
        node = meta.owner(file)
        info = next(each for each in node.files if each.name == file)
        chunks = info.chunks(offset, offset + len(into))
        first, stop = info.chunk_range(chunks[0])[0], info.chunk_range(chunks[-1])[1]
        whole = first == offset and stop == offset + len(into)
        target = into if whole else memoryview(bytearray(stop - first))
        at, decoded = node.offset(file) + first, 0
        wanted = group.stripes.locate(group.number(owner), at, stop - first)
        pieces = [piece for part in wanted for piece in _cut(part)]
        coming = _Parts(self, meta, group, owner, lost, deadline)
        ahead: list[Callable[[memoryview], None]] = []
        for piece in pieces[:2]:
            ahead.append(coming.ask(piece))
        for i, piece in enumerate(pieces):
            finish = ahead.pop(0)
            if i + 2 < len(pieces):
                ahead.append(coming.ask(pieces[i + 2]))
            finish(target[decoded : decoded + piece.nbytes])
            decoded += piece.nbytes
        self._check(meta.key, info, chunks, first, target)
        if not whole:
            into[:] = target[offset - first : offset - first + len(into)]

    def _check(
        self, key: Key, info: ImageFile, chunks: range, first: int, data: memoryview
    ) -> None:
        for chunk in chunks:
            start, stop = info.chunk_range(chunk)
            if mismatch(info, chunk, np.frombuffer(data[start - first : stop - first], np.uint8)):
                raise CorruptError(
                    f"bytes {start} to {stop} of {info.name} of {key}: what was decoded is not "
                    "what was sealed; an image was changed before its parity was formed"
                )

    def forget_failures(self) -> None:
        """Gives nodes that could not be reached another chance."""
        with self._lock:
            self._avoided.clear()

    def _avoids(self, uuid: str) -> bool:
        with self._lock:
            since = self._avoided.get(uuid)
            return since is not None and time.monotonic() - since < _AVOIDED_S

    def _avoid(self, uuid: str) -> None:
        with self._lock:
            self._avoided[uuid] = time.monotonic()


class _Parts:
    """Asks for the other parts of a stripe; one that fails is made up for by another."""

    def __init__(
        self,
        reading: Reading,
        meta: Meta,
        group: Group,
        owner: str,
        lost: PlanariaError,
        deadline: Deadline,
    ) -> None:
        self._reading, self._links = reading, reading._links
        self._meta, self._group, self._owner = meta, group, owner
        self._lost = lost
        self._deadline = deadline
        self._codec = make_codec(group.stripes.k, group.stripes.m)

    def ask(self, piece: Part) -> Callable[[memoryview], None]:
        """Asks for as many parts as are needed; what it returns waits for them and decodes."""
        uuids = self._group.part_uuids(piece.stripe)
        missing = uuids.index(self._owner)
        others = [i for i in range(len(uuids)) if i != missing]
        # This node's own first, data before parity, those that did not answer last.
        others.sort(
            key=lambda i: (self._reading._avoids(uuids[i]), uuids[i] != self._links.uuid, i)
        )
        coming = {i: self._fetch(uuids[i], piece) for i in others[: self._codec.k]}
        return partial(self._finish, piece, uuids, missing, others[self._codec.k :], coming)

    def _fetch(self, uuid: str, piece: Part) -> Future[Reply]:
        request = {
            "op": "fetch",
            "key": self._meta.key.to_json(),
            "stripe": piece.stripe,
            "start": piece.start,
            "stop": piece.start + piece.nbytes,
        }
        # A node that is silent must leave time to ask another one.
        share = self._deadline.remaining() / (2 + self._group.stripes.m)
        part = self._deadline.sub(min(self._links.timeout_s, share))
        return self._links.submit(uuid, request, deadline=part)

    def _finish(
        self,
        piece: Part,
        uuids: list[str],
        missing: int,
        spare: list[int],
        coming: dict[int, Future[Reply]],
        into: memoryview,
    ) -> None:
        rows: dict[int, Any] = {}
        wrong = [str(self._lost)]
        while coming:
            index, future = next(iter(coming.items()))
            del coming[index]
            try:
                (rows[index],) = answer_of(future)[1]
            except PlanariaError as error:
                wrong.append(f"node {uuids[index]}: {error}")
                if isinstance(error, WireError | DeadlineError):
                    self._reading._avoid(uuids[index])
                if spare:
                    another = spare.pop(0)
                    coming[another] = self._fetch(uuids[another], piece)
        if len(rows) < self._codec.k:
            raise CorruptError(
                f"{self._meta.key}: bytes {piece.start} to {piece.start + piece.nbytes} of stripe "
                f"{piece.stripe} cannot be decoded: {len(rows)} of the {self._codec.k} parts "
                f"needed are left ({'; '.join(wrong)}); take the newest checkpoint on disk"
            )
        self._codec.rebuild(rows, {missing: into})


def _cut(part: Part) -> list[Part]:
    return [
        Part(part.stripe, at, min(_PIECE_NBYTES, part.start + part.nbytes - at))
        for at in range(part.start, part.start + part.nbytes, _PIECE_NBYTES)
    ]
