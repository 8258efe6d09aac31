"""Reading a snapshot: from this node, from the node that has it, or decoded from what survives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from planaria.checkpoint.memory import points
from planaria.checkpoint.memory.decoding import Avoided, Decoding
from planaria.checkpoint.memory.holdings import Holdings
from planaria.checkpoint.memory.images import mismatch, view_file
from planaria.checkpoint.memory.links import Links
from planaria.checkpoint.memory.memory import Key
from planaria.checkpoint.memory.meta import Group, ImageFile, Meta
from planaria.checkpoint.memory.scratch import Scratch
from planaria.core.deadline import Deadline
from planaria.core.points import point
from planaria.errors import CorruptError, DeadlineError, NotCommittedError, PlanariaError, WireError

#: Finds the description of a snapshot.
Describe = Callable[[Key, Deadline], Meta]


class Reading:
    """Reads files of snapshots. Thread-safe."""

    def __init__(self, links: Links, holdings: Holdings, describe: Describe) -> None:
        self._links = links
        self._holdings = holdings
        self._describe = describe
        self.avoided = Avoided()
        self._scratch = Scratch()

    def read(self, key: Key, file: str, offset: int, into: memoryview, deadline: Deadline) -> None:
        """Reads bytes of a file; see `SnapshotNode.read`."""
        point(points.READ, step=key.step)
        now = self._holdings.now(key)
        try:
            self._read(now, file, offset, into, deadline)
        except PlanariaError:
            moved = self._holdings.moved(now, deadline)
            if moved is None:
                raise
            self._read(moved, file, offset, into, deadline)

    def _read(self, key: Key, file: str, offset: int, into: memoryview, deadline: Deadline) -> None:
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
            if self.avoided.holds(owner):
                raise WireError(f"node {owner} could not be reached just before")
            self._from_owner(key, owner, file, offset, into, deadline)
        except PlanariaError as error:
            group = meta.group_of(owner)
            if group.stripes.m == 0:
                if not self.avoided.holds(owner):
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
            _, payloads = self._links.call(uuid, request, deadline=part, into=[into])
        except (WireError, DeadlineError):
            self.avoided.add(uuid)
            raise
        data = memoryview(payloads[0])
        if len(data) != len(into):
            raise CorruptError(f"node {uuid} sent {len(data)} bytes of {file}, not {len(into)}")
        if payloads[0] is not into and data.obj is not into.obj:
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
        wanted = group.stripes.locate(group.number(owner), node.offset(file) + first, stop - first)
        # What comes out is compared anyway. Only if that is wrong must it be known which part is.
        for check in (False, True):
            decoding = Decoding(
                self._links, self._holdings, self.avoided, meta, group, owner, self._scratch
            )
            decoding.decode(wanted, target, lost, deadline, check=check)
            wrong = _first_mismatch(info, chunks, first, target)
            if wrong is None:
                break
        else:
            raise CorruptError(
                f"bytes {wrong[0]} to {wrong[1]} of {info.name} of {meta.key}: what was decoded is "
                "not what was sealed; an image was changed before its parity was formed"
            )
        if not whole:
            into[:] = target[offset - first : offset - first + len(into)]

    def forget_failures(self) -> None:
        """Gives nodes that could not be reached another chance."""
        self.avoided.clear()


def _first_mismatch(
    info: ImageFile, chunks: range, first: int, data: memoryview
) -> tuple[int, int] | None:
    """The first chunk that is not what was sealed: its first byte and end in the file."""
    for chunk in chunks:
        start, stop = info.chunk_range(chunk)
        if mismatch(info, chunk, np.frombuffer(data[start - first : stop - first], np.uint8)):
            return start, stop
    return None
