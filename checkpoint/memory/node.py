"""One node of the memory tier: what its ranks and its peers ask of it. No sockets, no processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from planaria.checkpoint.memory import points
from planaria.checkpoint.memory.follower import Follower, Membership
from planaria.checkpoint.memory.holdings import Held, Holdings, State
from planaria.checkpoint.memory.images import make_file, read_file
from planaria.checkpoint.memory.leader import Leader
from planaria.checkpoint.memory.links import Links, failures
from planaria.checkpoint.memory.memory import Key, Member, Memory, Peers, Reply, Scheme, Span
from planaria.checkpoint.memory.meta import Meta, Snapshot
from planaria.checkpoint.memory.recovery import Recovery
from planaria.core.byte_stream import Buffer
from planaria.core.deadline import Deadline
from planaria.core.pacing import TokenBucket
from planaria.core.points import point
from planaria.errors import (
    ConfigError,
    NotCommittedError,
    NotSupportedError,
    SaveFailedError,
    WireError,
)

#: Parity is exchanged and checksummed in blocks of this size.
BLOCK_NBYTES = 1 << 20
# What a peer may ask for at once.
_MOST_NBYTES = 1 << 28


class SnapshotNode:
    """Holds the snapshots of one node, and protects them together with its peers. Thread-safe."""

    def __init__(
        self,
        uuid: str,
        memory: Memory,
        peers: Peers,
        *,
        timeout_s: float,
        pace: TokenBucket | None = None,
        block_nbytes: int = BLOCK_NBYTES,
    ) -> None:
        """Makes a node that holds nothing.

        Args:
            uuid: Its identity; new with each start of its process.
            memory: Where images and parity go.
            peers: How other nodes are reached; they reach this one by `serve`.
            timeout_s: Budget of each phase of the protocol, and of a wait for memory.
            pace: What this node sends for the exchange of parity is kept below this rate.
            block_nbytes: See `BLOCK_NBYTES`; the leader's counts. Tests make it small.
        """
        self.uuid = uuid
        self._memory = memory
        self._pace = pace
        self._links = Links(uuid, peers, self.serve, timeout_s)
        self._holdings = Holdings(memory)
        self._leader = Leader(self._links, self._holdings, block_nbytes)
        self._follower = Follower(self._links, self._holdings, self._encode)
        self._recovery = Recovery(self._links, self._holdings)
        self._pins: dict[Key, list[Held]] = {}

    def configure(self, members: Sequence[Member], scheme: Scheme, local_files: int) -> None:
        """Says who is in the job: at its start, and after each change, before the next `begin`.

        All nodes must be told the same. What is on its way and needs ranks that were there before
        fails; what needs them no more goes on by itself.

        Args:
            members: All nodes in order, this one among them; the first leads.
            scheme: How snapshots are protected.
            local_files: So many images make a snapshot of this node: its ranks.

        Raises:
            ConfigError: The members make no sense.
        """
        uuids = [member.uuid for member in members]
        if self.uuid not in uuids or len(set(uuids)) != len(uuids):
            raise ConfigError(f"node {self.uuid} must be one of the members {uuids}, once")
        if local_files < 1:
            raise ConfigError(f"a node has at least one rank, not {local_files}")
        self._links.peers.know(members)
        before = self._follower.membership
        now = Membership(tuple(members), scheme, local_files)
        self._follower.membership = now
        for held in self._holdings.unfinished():
            changed = now.uuids != before.uuids and held.state < State.PREPARED
            if changed or held.state == State.CAPTURING or held.manifest is None:
                why = "the members changed" if changed else "its ranks were started anew"
                self._holdings.fail(held.key, f"node {self.uuid}: {why}", State.SEALED)
                self._links.spawn("give-up", self._follower.give_up, held.key, why)

    def begin(self, key: Key, file: str, nbytes: int) -> Span:
        """Finds room for a rank's image; waits until the one before the last is not needed.

        The span is lent to the rank until `seal` or `leave`.

        Args:
            key: The snapshot.
            file: The image's file name, which no other rank uses.
            nbytes: The image's length.

        Raises:
            ConfigError: The node is not configured, or the file was begun already.
            SaveFailedError: The snapshot has failed already.
            MemoryBudgetError: There is no room.
            DeadlineError: An earlier snapshot was not over in time.
        """
        point(points.CAPTURE, step=key.step)
        deadline = self._links.deadline()
        members = self._configured().members
        self._follower.make_room(key, deadline)
        span = self._holdings.allocate(nbytes, deadline, f"{file} of {key}")
        return self._holdings.image(key, members, file, nbytes, span)

    def seal(
        self, key: Key, file: str, checksums: Sequence[int], chunk_nbytes: int, data_start: int
    ) -> None:
        """Says that an image is complete; the last of this node sets the exchange going.

        Args:
            key: The snapshot.
            file: As it was begun.
            checksums: CRC-32C of each chunk after the header.
            chunk_nbytes: Length of a chunk.
            data_start: Length of the header.

        Raises:
            SaveFailedError: The snapshot has failed meanwhile.
            NotCommittedError: The image was not begun.
            WireError: The checksums do not fit its length.
        """
        try:
            with self._holdings.changed:
                held = self._holdings.entry(key, self._configured().members)
                image = held.images.get(file)
                if image is None:
                    raise NotCommittedError(f"{file} of {key} was not begun at node {self.uuid}")
                if image.file is not None:
                    return
                view = self._memory.view(image.span)
                image.file = make_file(file, view, list(checksums), chunk_nbytes, data_start)
                last = len(held.sealed_files()) == self._configured().local_files
                if last:
                    held.state = State.SEALED
        finally:
            self._holdings.end_lending(key, file)
        if last:
            self._follower.announce(held)

    def leave(self, key: Key, file: str) -> None:
        """Says that the rank of an image will not write to it any more; harmless twice.

        An image that was not sealed will never be: the snapshot fails.
        """
        held = self._holdings.find(key)
        image = held.images.get(file) if held is not None else None
        self._holdings.end_lending(key, file)
        if image is not None and image.file is None:
            self.abort(key, f"the rank of {file} has gone")

    def describe(self, key: Key, manifest: bytes) -> None:
        """Gives the manifest to all nodes; from the node of rank 0.

        Raises:
            SaveFailedError: The snapshot has failed, or a node cannot be told; it fails then.
        """
        request = {"op": "manifest", "key": key.to_json()}
        answers = self._links.ask(
            self._configured().uuids, request, [manifest], deadline=self._links.deadline()
        )
        wrong = failures(answers)
        if wrong:
            self._follower.give_up(key, wrong)
            raise SaveFailedError(f"snapshot of {key}: {wrong}")

    def abort(self, key: Key, why: str) -> None:
        """Has a snapshot fail on all nodes, unless it is decided already: see `wait`."""
        self._follower.give_up(key, why)

    def wait(self, key: Key, deadline: Deadline) -> None:
        """Waits until a snapshot is committed on all nodes.

        Raises:
            SaveFailedError: It was not committed, or it is not known whether it was; says why.
            NotCommittedError: Nothing is known of it.
            DeadlineError: Neither in time; the error says how far it has come.
        """
        self._follower.wait(key, deadline)

    def hold(self, key: Key) -> None:
        """Keeps this node's memory of a snapshot as it is until `let_go`.

        Raises:
            NotCommittedError: It is not held here.
        """
        with self._holdings.changed:
            self._pins.setdefault(key, []).append(self._holdings.pin(key))

    def let_go(self, key: Key) -> None:
        """Ends one `hold`; harmless if there is none."""
        with self._holdings.changed:
            if self._pins.get(key):
                self._holdings.unpin(self._pins[key].pop())
            if not self._pins.get(key):
                self._pins.pop(key, None)

    def recoverable(self, deadline: Deadline) -> list[Snapshot]:
        """The snapshots that can be read from here with the peers that answer, newest first.

        Raises:
            DeadlineError: The budget had expired before.
        """
        deadline.check("snapshots to be looked for")
        return self._recovery.recoverable(self._follower.membership.uuids, deadline)

    def read(self, key: Key, file: str, offset: int, into: memoryview, deadline: Deadline) -> None:
        """Reads bytes of a file of a snapshot: from here, from its node, or from what survives.

        Raises:
            NotCommittedError: It is not there, or not any more.
            CorruptError: More of it is lost or changed than parity makes up for.
            DeadlineError: Not in time; the error names the node.
        """
        self._recovery.read(key, file, offset, into, deadline)

    def local_span(self, key: Key, file: str) -> Span | None:
        """Where a sealed image of this node lies; None if this node does not hold it."""
        with self._holdings.changed:
            held = self._holdings.find(key) or self._holdings.orphan(key)
            image = held.images.get(file) if held is not None else None
            return image.span if image is not None and image.file is not None else None

    def close(self) -> None:
        """Ends all waits, and forgets everything."""
        self._links.close()
        self._holdings.clear()

    def serve(self, request: dict[str, Any], payloads: Sequence[Buffer]) -> Reply:
        """Answers a request of a peer.

        Raises:
            PlanariaError: What went wrong.
            KeyError, TypeError, ValueError: The request is malformed.
        """
        op = request["op"]
        if op == "holdings":
            held = self._holdings.all()
            return {"held": [[h.key.to_json(), int(h.state)] for h in held]}, ()
        answer = _OPERATIONS.get(op)
        if answer is None:
            raise WireError(f"unknown request {op!r}")
        return answer(self, Key.from_json(request["key"]), request, payloads)

    def _serve_sealed(self, key: Key, request: dict[str, Any], _: Sequence[Buffer]) -> Reply:
        now = self._configured()
        self._leader.sealed(key, now.members, now.scheme, request)
        return {}, ()

    def _serve_prepared(self, key: Key, request: dict[str, Any], _: Sequence[Buffer]) -> Reply:
        self._leader.prepared(key, str(request["node"]))
        return {}, ()

    def _serve_failed(self, key: Key, request: dict[str, Any], _: Sequence[Buffer]) -> Reply:
        now = self._configured()
        node, why = str(request["node"]), str(request["why"])
        self._leader.failed(key, now.members, now.scheme, node, why)
        return {}, ()

    def _serve_manifest(self, key: Key, _: dict[str, Any], payloads: Sequence[Buffer]) -> Reply:
        self._follower.have_manifest(key, bytes(payloads[0]))
        return {}, ()

    def _serve_exchange(
        self, key: Key, request: dict[str, Any], payloads: Sequence[Buffer]
    ) -> Reply:
        base = None if request["base"] is None else Key.from_json(request["base"])
        self._follower.exchange(key, Meta.from_bytes(bytes(payloads[0])), base)
        return {}, ()

    def _serve_commit(self, key: Key, request: dict[str, Any], _: Sequence[Buffer]) -> Reply:
        self._follower.commit(key, str(request["node"]))
        return {}, ()

    def _serve_complete(self, key: Key, request: dict[str, Any], _: Sequence[Buffer]) -> Reply:
        self._holdings.complete(key, str(request["why"]))
        return {}, ()

    def _serve_abort(self, key: Key, request: dict[str, Any], _: Sequence[Buffer]) -> Reply:
        self._follower.heed_abort(key, str(request["node"]), str(request["why"]))
        return {}, ()

    def _serve_outcome(self, key: Key, _: dict[str, Any], __: Sequence[Buffer]) -> Reply:
        outcome = self._holdings.outcome(key)
        if outcome is None:
            known = self._leader.running(key) or self._holdings.find(key) is not None
            state, why = ("open" if known else "unknown"), ""
        else:
            state = "complete" if outcome.complete else "committed"
            state, why = (state if outcome.committed else "failed"), outcome.why
        return {"state": state, "why": why, "members": self._follower.membership.uuids}, ()

    def _serve_describe(self, key: Key, _: dict[str, Any], __: Sequence[Buffer]) -> Reply:
        held = self._holdings.get(key)
        if held.meta is None or held.manifest is None:
            raise NotCommittedError(f"{key} is not prepared at node {self.uuid}")
        return {}, [held.meta.to_bytes(), held.manifest]

    def _serve_read(self, key: Key, request: dict[str, Any], _: Sequence[Buffer]) -> Reply:
        start, nbytes = int(request["start"]), int(request["nbytes"])
        if not 0 <= nbytes <= _MOST_NBYTES:
            raise WireError(f"{nbytes} bytes were asked for at once")
        out = np.empty(nbytes, np.uint8)
        with self._holdings.pinned(key) as held:
            read_file(self._memory, held, str(request["file"]), start, out.data)
        return {}, [out.data]

    def _configured(self) -> Membership:
        membership = self._follower.membership
        if not membership.members:
            raise ConfigError(f"node {self.uuid} was not configured yet")
        return membership

    def _encode(self, held: Held, base: Key | None) -> None:
        if held.meta is not None and held.meta.scheme.losses and len(held.meta.nodes) > 1:
            raise NotSupportedError("parity is not built yet")


_OPERATIONS = {
    name.removeprefix("_serve_"): method
    for name, method in vars(SnapshotNode).items()
    if name.startswith("_serve_")
}
