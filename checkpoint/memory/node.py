"""One node of the memory tier: what its ranks and its peers ask of it. No sockets, no processes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from planaria.checkpoint.memory import points
from planaria.checkpoint.memory.courtesy import Pace
from planaria.checkpoint.memory.exchange import Exchange
from planaria.checkpoint.memory.follower import Follower, Membership
from planaria.checkpoint.memory.held import Held, State
from planaria.checkpoint.memory.holdings import Holdings
from planaria.checkpoint.memory.images import make_file
from planaria.checkpoint.memory.leader import Leader
from planaria.checkpoint.memory.links import Links, failures
from planaria.checkpoint.memory.memory import Key, Member, Memory, Peers, Reply, Scheme, Span
from planaria.checkpoint.memory.mending import Mending
from planaria.checkpoint.memory.meta import Snapshot
from planaria.checkpoint.memory.reading import Reading
from planaria.checkpoint.memory.recovery import Recovery
from planaria.checkpoint.memory.service import Service
from planaria.core.byte_stream import Buffer
from planaria.core.deadline import Deadline
from planaria.core.points import point
from planaria.errors import (
    ConfigError,
    NotCommittedError,
    SaveFailedError,
)

#: Parity is exchanged and checksummed in blocks of this size.
BLOCK_NBYTES = 1 << 20


class SnapshotNode:
    """Holds the snapshots of one node, and protects them together with its peers. Thread-safe."""

    def __init__(
        self,
        uuid: str,
        memory: Memory,
        peers: Peers,
        *,
        timeout_s: float,
        pace: Pace | None = None,
        block_nbytes: int = BLOCK_NBYTES,
        mend_after_s: float | None = None,
    ) -> None:
        """Makes a node that holds nothing.

        Args:
            uuid: Its identity; new with each start of its process.
            memory: Where images and parity go.
            peers: How other nodes are reached; they reach this one by `serve`.
            timeout_s: Budget of each phase of the protocol, and of a wait for memory.
            pace: When this node may send what it sends for the exchange of parity.
            block_nbytes: See `BLOCK_NBYTES`; the leader's counts. Tests make it small.
            mend_after_s: So long after a change of members the newest snapshot is made whole again;
                None to leave it to the next one.
        """
        self.uuid = uuid
        self._memory = memory
        self._links = Links(uuid, peers, self.serve, timeout_s, pace)
        self._holdings = Holdings(memory)
        self.exchange = Exchange(self._links, self._holdings)
        self._follower = Follower(self._links, self._holdings, self.exchange.run)
        leader = Leader(self._links, self._holdings, block_nbytes)
        self._recovery = Recovery(self._links, self._holdings)
        self._reading = Reading(self._links, self._holdings, self._recovery.meta)
        self.mending = Mending(
            self._links, self._holdings, self._follower, self._recovery, self._reading, mend_after_s
        )
        self._service = Service(self._links, self._holdings, leader, self._follower, self.mending)
        self._pins: dict[Key, list[Held]] = {}

    def configure(self, members: Sequence[Member], scheme: Scheme, local_files: int) -> None:
        """Says who is in the job: at its start, and after each change, before the next `begin`.

        All nodes must be told the same; told again, a node does nothing. What is on its way when
        the members change fails, unless this node has done all it must for it.

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
        before, now = self._follower.membership, Membership(tuple(members), scheme, local_files)
        if now == before:
            return
        self._follower.membership = now
        for held in self._holdings.unfinished():
            if held.state < State.PREPARED:
                why = "the members of the job have changed"
                self._holdings.fail(held.key, f"node {self.uuid}: {why}", State.SEALED)
                self._links.spawn("give-up", self._follower.give_up, held.key, why)
        self.mending.members_changed()

    def begin(self, key: Key, file: str, nbytes: int, deadline: Deadline | None = None) -> Span:
        """Finds room for a rank's image; waits until the one before the last is not needed.

        The span is lent to the rank until `seal` or `leave`.

        Args:
            key: The snapshot.
            file: The image's file name, which no other rank uses.
            nbytes: The image's length.
            deadline: When to give up; by default the timeout of the node.

        Raises:
            ConfigError: The node is not configured, or the file was begun already.
            SaveFailedError: The snapshot has failed already.
            MemoryBudgetError: There is no room.
            DeadlineError: An earlier snapshot was not over in time.
        """
        point(points.CAPTURE, step=key.step)
        deadline = deadline or self._links.deadline()
        members = self._configured().members
        while True:
            self._follower.make_room(key, deadline)
            span = self._holdings.allocate(nbytes, deadline, f"{file} of {key}")
            with self._holdings.changed:
                if not self._holdings.unfinished(but=key):
                    return self._holdings.image(key, members, file, nbytes, span)
                self._memory.free(span)  # while it waited for memory another one has begun

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
        """Has a snapshot fail on all nodes; one that has its manifest goes on without its ranks."""
        held = self._holdings.find(key)
        if held is None or held.manifest is None:
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
            held = self._holdings.pin(self._holdings.now(key))
            self._pins.setdefault(key, []).append(held)

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
        self._reading.forget_failures()
        return self._recovery.recoverable(self._follower.membership.uuids, deadline)

    def read(self, key: Key, file: str, offset: int, into: memoryview, deadline: Deadline) -> None:
        """Reads bytes of a file of a snapshot: from here, from its node, or from what survives.

        Raises:
            NotCommittedError: It is not there, or not any more.
            CorruptError: More of it is lost or changed than parity makes up for.
            DeadlineError: Not in time; the error names the node.
        """
        self._reading.read(key, file, offset, into, deadline)

    def local_span(self, key: Key, file: str) -> Span | None:
        """Where a sealed image of this node lies; None if this node does not hold it."""
        with self._holdings.changed:
            held = self._held_or_orphan(key)
            image = held.images.get(file) if held is not None else None
            return image.span if image is not None and image.file is not None else None

    def _held_or_orphan(self, key: Key) -> Held | None:
        held = self._holdings.find(key) or self._holdings.orphan(key)
        return held or self._holdings.find(self._holdings.now(key))

    def close(self) -> None:
        """Ends all waits, and forgets everything."""
        self._links.close()
        self._holdings.clear()

    def answering(self) -> AbstractContextManager[None]:
        """A block around `serve` and the sending of its answer: see `PeerServer`."""
        return self._holdings.answering()

    def serve(self, request: dict[str, Any], payloads: Sequence[Buffer]) -> Reply:
        """Answers a request of a peer; see `Service.serve`."""
        return self._service.serve(request, payloads)

    def _configured(self) -> Membership:
        return self._follower.configured()
