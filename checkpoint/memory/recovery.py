"""Which snapshots can be read, and reading one: from here, from a peer, or from what survives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planaria.checkpoint.memory import points
from planaria.checkpoint.memory.holdings import Holdings, State
from planaria.checkpoint.memory.images import read_file
from planaria.checkpoint.memory.links import Links
from planaria.checkpoint.memory.memory import Key
from planaria.checkpoint.memory.meta import Meta, Snapshot
from planaria.core.deadline import Deadline
from planaria.core.points import point
from planaria.errors import CorruptError, NotCommittedError, PlanariaError

# While nodes are asked one after the other, a snapshot may be committed.
_ASKED_AGAIN = 5


class Recovery:
    """Reads snapshots, whoever holds them. Thread-safe."""

    def __init__(self, links: Links, holdings: Holdings) -> None:
        self._links = links
        self._holdings = holdings
        self._described: dict[Key, tuple[Meta, bytes]] = {}

    def recoverable(self, uuids: Sequence[str], deadline: Deadline) -> list[Snapshot]:
        """The snapshots that can be read, the newest first.

        A snapshot counts if a node that answers has committed it, and all but m nodes of every
        group answer and have it.
        """
        found: list[Snapshot] = []
        for _ in range(_ASKED_AGAIN):
            stated = self._states(uuids, deadline)
            found, moving = self._judge(stated, deadline)
            if not moving:
                break
        return sorted(found, key=lambda s: (s.sequence, s.key.step), reverse=True)

    def read(self, key: Key, file: str, offset: int, into: memoryview, deadline: Deadline) -> None:
        """Reads bytes of a file of a snapshot; see `SnapshotNode.read`."""
        point(points.READ, step=key.step)
        meta, _ = self.describe(key, [], deadline)
        try:
            owner = meta.owner(file)
        except KeyError:
            raise NotCommittedError(f"{key} has no file {file}") from None
        if not 0 <= offset <= offset + len(into) <= meta.files[file]:
            raise CorruptError(
                f"{file} of {key} has {meta.files[file]} bytes; {len(into)} from byte {offset} "
                "on were asked for"
            )
        if not len(into):
            return
        self._from_owner(key, owner.member.uuid, file, offset, into, deadline)

    def describe(self, key: Key, holders: Sequence[str], deadline: Deadline) -> tuple[Meta, bytes]:
        """A snapshot's meta and manifest, from here or from one of the holders.

        Raises:
            NotCommittedError: Nobody has them.
        """
        held = self._holdings.find(key)
        if held is not None and held.meta is not None and held.manifest is not None:
            return held.meta, held.manifest
        if key in self._described:
            return self._described[key]
        why = ""
        for uuid in holders:
            try:
                request = {"op": "describe", "key": key.to_json()}
                _, (meta, manifest) = self._links.call(uuid, request, deadline=deadline)
                found = Meta.from_bytes(bytes(meta)), bytes(manifest)
            except (PlanariaError, ValueError) as error:
                why = f": node {uuid}: {error}"
                continue
            while len(self._described) >= 4:
                self._described.pop(next(iter(self._described)))
            self._described[key] = found
            self._links.peers.know(found[0].members)
            return found
        raise NotCommittedError(f"nothing is known here of a snapshot of {key}{why}")

    def _from_owner(
        self,
        key: Key,
        uuid: str,
        file: str,
        offset: int,
        into: memoryview,
        deadline: Deadline,
    ) -> None:
        if uuid == self._links.uuid:
            with self._holdings.pinned(key) as held:
                read_file(self._holdings.memory, held, file, offset, into)
            return
        request = {
            "op": "read", "key": key.to_json(), "file": file, "start": offset, "nbytes": len(into)
        }  # fmt: skip
        _, payloads = self._links.call(uuid, request, deadline=deadline)
        data = memoryview(payloads[0])
        if len(data) != len(into):
            raise CorruptError(f"node {uuid} sent {len(data)} bytes of {file}, not {len(into)}")
        into[:] = data

    def _states(self, uuids: Sequence[str], deadline: Deadline) -> dict[str, dict[Key, State]]:
        """What each node that answers has, asking also those of which others know."""
        stated: dict[str, dict[Key, State]] = {}
        asked: set[str] = set()
        ask = {self._links.uuid, *uuids}
        for held in self._holdings.all():
            ask |= {member.uuid for member in held.members}
        while ask - asked:
            now, asked = sorted(ask - asked), asked | ask
            answers = self._links.ask(now, {"op": "holdings"}, deadline=deadline)
            for uuid, answer in answers.items():
                if isinstance(answer, PlanariaError):
                    continue
                header: dict[str, Any] = answer[0]
                stated[uuid] = {Key.from_json(k): State(s) for k, s in header["held"]}
                for key, state in stated[uuid].items():
                    if state >= State.PREPARED:
                        try:
                            meta, _ = self.describe(key, [uuid], deadline)
                        except NotCommittedError:
                            continue  # superseded meanwhile
                        ask |= set(meta.uuids)
        return stated

    def _judge(
        self, stated: dict[str, dict[Key, State]], deadline: Deadline
    ) -> tuple[list[Snapshot], bool]:
        """What can be read, and whether something changed while nodes were asked."""
        found: list[Snapshot] = []
        moving = False
        committed = {
            key for held in stated.values() for key, s in held.items() if s == State.COMMITTED
        }
        for key in committed:
            holders = [u for u, held in stated.items() if held.get(key, -1) >= State.PREPARED]
            moving |= any(
                held.get(key, State.COMMITTED) < State.PREPARED for held in stated.values()
            )
            try:
                meta, manifest = self.describe(key, holders, deadline)
            except NotCommittedError:
                moving = True
                continue
            lost = [uuid for uuid in meta.uuids if uuid not in holders]
            if all(
                sum(meta.uuids[i] in lost for i in group) <= losses
                for group, losses in groups_of(meta)
            ):
                found.append(Snapshot(key, manifest, meta.files, lost, meta.sequence))
        return found, moving


def groups_of(meta: Meta) -> list[tuple[list[int], int]]:
    """The groups of a snapshot's nodes, and how many of each may be lost."""
    return [(list(range(len(meta.nodes))), 0)]
