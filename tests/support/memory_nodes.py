"""Snapshot nodes in one process: memory on the heap, and a network that tests can cut."""

import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planaria.checkpoint.format.checksum import checksum
from planaria.checkpoint.memory.memory import Key, Member, Reply, Scheme, Span, aligned
from planaria.checkpoint.memory.meta import Snapshot
from planaria.checkpoint.memory.node import SnapshotNode
from planaria.checkpoint.memory.peers import PeerServer, TcpPeers
from planaria.core.byte_stream import Buffer
from planaria.core.deadline import Deadline
from planaria.core.rpc import crossed
from planaria.errors import (
    DeadlineError,
    MemoryBudgetError,
    PlanariaError,
    SaveFailedError,
    WireError,
)

HEADER = 4096


class HeapMemory:
    """`Memory` on the heap, with a budget; freed spans are filled with rubbish."""

    def __init__(self, budget: int = 1 << 40) -> None:
        self._budget = budget
        self._lock = threading.Lock()
        self._spans: dict[Span, NDArray[np.uint8]] = {}
        self._next = 0

    @property
    def used(self) -> int:
        with self._lock:
            return sum(aligned(span.nbytes) for span in self._spans)

    def allocate(self, nbytes: int) -> Span:
        used = self.used
        with self._lock:
            if used + aligned(nbytes) > self._budget:
                raise MemoryBudgetError(f"no room for {nbytes} bytes in {self._budget}")
            span = Span(self._next, nbytes)
            self._next += aligned(max(nbytes, 1))
            self._spans[span] = np.full(nbytes, 0xAA, np.uint8)
            return span

    def free(self, span: Span) -> None:
        with self._lock:
            self._spans.pop(span).fill(0xDD)

    def view(self, span: Span) -> NDArray[np.uint8]:
        with self._lock:
            return self._spans[span]


class Net:
    """Nodes that call each other's `serve` directly. Dead nodes neither ask nor answer."""

    def __init__(self) -> None:
        self.nodes: dict[str, SnapshotNode] = {}
        self.dead: set[str] = set()
        self.cut: Callable[[str, str], bool] = lambda a, b: False
        self.silent: set[str] = set()
        self.sent: dict[tuple[str, str], int] = {}
        self._here = threading.local()
        self._lock = threading.Lock()

    def peers(self, uuid: str) -> "NetPeers":
        return NetPeers(self, uuid)

    def running_on(self) -> str | None:
        """Which node's code this thread runs now."""
        stack = getattr(self._here, "stack", None)
        if stack:
            return stack[-1]
        name = threading.current_thread().name
        if name.startswith("planaria-memory-"):
            return name.removeprefix("planaria-memory-").partition("-")[0]
        return None

    def on(self, uuid: str, work: Callable[[], Any]) -> Any:
        """Runs something as a node's code."""
        stack = self._here.__dict__.setdefault("stack", [])
        stack.append(uuid)
        try:
            return work()
        finally:
            stack.pop()

    def carry(
        self, a: str, b: str, request: dict[str, Any], payloads: Sequence[Buffer], budget: float
    ) -> Reply:
        self._check(a, b, budget)
        if b not in self.nodes:
            raise WireError(f"node {b} is not there")
        try:
            header, got = self.on(b, lambda: self.nodes[b].serve(request, payloads))
        except PlanariaError as error:
            self._check(a, b, budget)
            # As over a socket: of some kinds it is only known that something went wrong.
            kind = type(error).__name__
            raise crossed(kind, f"node {b}: {error}", SaveFailedError) from error
        self._check(a, b, budget)  # it may have died meanwhile: the answer is lost
        with self._lock:
            for pair, sent in (((a, b), payloads), ((b, a), got)):
                self.sent[pair] = self.sent.get(pair, 0) + sum(memoryview(p).nbytes for p in sent)
        return header, [bytes(memoryview(p).cast("B")) for p in got]

    def _check(self, a: str, b: str, budget: float) -> None:
        if a in self.dead or b in self.dead:
            raise WireError(f"node {b} cannot be reached")
        if a in self.silent or b in self.silent or self.cut(a, b):
            raise DeadlineError(f"node {b} did not answer within {budget:g} s")


class NetPeers:
    """One node's side of the network."""

    def __init__(self, net: Net, uuid: str) -> None:
        self._net, self._uuid = net, uuid

    def know(self, members: Sequence[Member]) -> None:
        pass

    def call(
        self,
        uuid: str,
        request: dict[str, Any],
        payloads: Sequence[Buffer],
        deadline: Deadline,
        into: Sequence[memoryview] = (),
    ) -> Reply:
        header, got = self._net.carry(self._uuid, uuid, request, payloads, deadline.remaining())
        placed = list(got)
        for i, (room, payload) in enumerate(zip(into, got, strict=False)):
            data = memoryview(payload).cast("B") if len(payload) else memoryview(b"")
            if len(data) <= len(room):
                room[: len(data)] = data
                placed[i] = room[: len(data)]
        return header, placed


def image_of(node: int, step: int, nbytes: int, rank: int = 0) -> NDArray[np.uint8]:
    """The bytes of a rank's image at a step: a header, and random data."""
    seed = int.from_bytes(hashlib.sha256(f"{node}/{rank}/{step}".encode()).digest()[:8], "big")
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, HEADER + nbytes, np.uint8)


def file_of(node: int, key: Key, rank: int = 0) -> str:
    return f"rank-{16 * node + rank:05d}-{key.attempt}.safetensors"


def manifest_of(key: Key) -> bytes:
    return f"manifest of {key.step} {key.attempt}".encode()


def chunk_checksums(image: NDArray[np.uint8], chunk: int) -> list[int]:
    return [checksum(image[i : i + chunk]) for i in range(HEADER, len(image), chunk)]


class Cluster:
    """Some nodes, and the snapshots that their ranks take.

    `sizes[i]` is the number of data bytes of each rank's image on node i.
    """

    def __init__(
        self,
        n: int,
        scheme: Scheme | None = None,
        *,
        sizes: Sequence[int] | None = None,
        ranks: int = 1,
        timeout_s: float = 20.0,
        block_nbytes: int = 1024,
        chunk_nbytes: int = 1600,
        budget: int = 1 << 40,
        domains: Sequence[str] = (),
    ) -> None:
        self.net = Net()
        self.scheme = scheme or Scheme(0)
        self.sizes = list(sizes or [3000] * n)
        self.ranks = ranks
        self.chunk_nbytes = chunk_nbytes
        self._options: dict[str, Any] = {"timeout_s": timeout_s, "block_nbytes": block_nbytes}
        self._budget = budget
        self._born = 0
        self.domains = list(domains) or [""] * n
        self.memories: dict[str, HeapMemory] = {}
        self.images: dict[str, NDArray[np.uint8]] = {}
        self.members: list[Member] = []
        for i in range(n):
            self.members.append(self.start(i))
        self.configure()

    def start(self, i: int) -> Member:
        """Starts a node, empty, under an identity that no other one had."""
        uuid = f"n{i}x{self._born}"
        self._born += 1
        self.memories[uuid] = HeapMemory(self._budget)
        self.net.nodes[uuid] = SnapshotNode(
            uuid, self.memories[uuid], self.net.peers(uuid), **self._options
        )
        self.net.nodes[uuid]._links.ask_after_s = 0.01
        return Member(uuid, "", self.domains[i])

    def node(self, i: int) -> SnapshotNode:
        return self.net.nodes[self.members[i].uuid]

    def configure(self) -> None:
        for member in self.members:
            if member.uuid not in self.net.dead:
                self.net.nodes[member.uuid].configure(self.members, self.scheme, self.ranks)

    def replace(self, i: int, *, tell: bool = True) -> None:
        """A node is gone for good, another one has taken its place; all are told."""
        self.net.dead.add(self.members[i].uuid)
        self.members[i] = self.start(i)
        if tell:
            self.configure()

    def alive(self) -> list[int]:
        """The numbers of the members that are there."""
        return [i for i, m in enumerate(self.members) if m.uuid not in self.net.dead]

    def give_up(self, i: int, key: Key, why: str) -> None:
        """A node's ranks notice that something went wrong."""
        node = self.node(i)

        def work() -> None:
            for rank in range(self.ranks):
                node.leave(key, file_of(i, key, rank))
            node.abort(key, why)

        self.net.on(node.uuid, work)

    def capture(self, i: int, key: Key, content: int | None = None) -> None:
        """The ranks of a node capture and seal."""
        for rank in range(self.ranks):
            image = image_of(i, key.step if content is None else content, self.sizes[i], rank)
            self.images[file_of(i, key, rank)] = image
        self._seal(i, key)

    def take_images(self, key: Key, images: dict[str, NDArray[np.uint8]], like: Key) -> None:
        """A whole snapshot: the images of another one, but for some."""
        for i in range(len(self.members)):
            for rank in range(self.ranks):
                self.images[file_of(i, key, rank)] = self.images[file_of(i, like, rank)]
        self.images.update(images)
        for i in range(len(self.members)):
            self._seal(i, key)
        self._finish(key)

    def _seal(self, i: int, key: Key) -> None:
        node = self.node(i)
        for rank in range(self.ranks):
            name = file_of(i, key, rank)
            image = self.images[name]

            def work(name: str = name, image: NDArray[np.uint8] = image) -> None:
                span = node.begin(key, name, len(image))
                self.memories[node.uuid].view(span)[:] = image
                sums = chunk_checksums(image, self.chunk_nbytes)
                node.seal(key, name, sums, self.chunk_nbytes, HEADER)

            self.net.on(node.uuid, work)

    def take(self, key: Key, content: int | None = None, *, wait: bool = True) -> None:
        """A whole snapshot; returns when all nodes know that it is committed."""
        for i in range(len(self.members)):
            self.capture(i, key, content)
        self._finish(key, wait)

    def _finish(self, key: Key, wait: bool = True) -> None:
        self.net.on(self.node(0).uuid, lambda: self.node(0).describe(key, manifest_of(key)))
        if wait:
            for i in range(len(self.members)):
                self.node(i).wait(key, Deadline(60))

    def newest(self, reader: int | SnapshotNode) -> Snapshot | None:
        node = self.node(reader) if isinstance(reader, int) else reader
        found = node.recoverable(Deadline(60))
        return found[0] if found else None

    def check(self, reader: int | SnapshotNode, snapshot: Snapshot) -> None:
        """Reads all of a snapshot, and compares."""
        node = self.node(reader) if isinstance(reader, int) else reader
        assert snapshot.manifest == manifest_of(snapshot.key)
        for name, nbytes in snapshot.files.items():
            assert np.array_equal(self.read(node, snapshot.key, name, 0, nbytes), self.images[name])

    def read(
        self, node: SnapshotNode, key: Key, name: str, start: int, nbytes: int
    ) -> NDArray[np.uint8]:
        out = np.empty(nbytes, np.uint8)
        node.read(key, name, start, out.data, Deadline(60))
        return out

    def close(self) -> None:
        for node in self.net.nodes.values():
            node.close()


TOKEN = b"the token of this test's job"


class TcpCluster(Cluster):
    """The same over sockets on the loopback interface."""

    def __init__(self, n: int, scheme: Scheme | None = None, **options: Any) -> None:
        self.tokens: dict[int, bytes] = options.pop("tokens", {})
        self.servers: dict[str, PeerServer] = {}
        self.links: dict[str, TcpPeers] = {}
        super().__init__(n, scheme, **options)

    def start(self, i: int) -> Member:
        uuid = f"n{i}x{self._born}"
        self._born += 1
        token = self.tokens.get(i, TOKEN)
        self.memories[uuid] = HeapMemory(self._budget)
        self.links[uuid] = TcpPeers(token=token)
        node = SnapshotNode(uuid, self.memories[uuid], self.links[uuid], **self._options)
        self.net.nodes[uuid] = node
        self.servers[uuid] = PeerServer(node.serve, token=token, answering=node.answering)
        return Member(uuid, self.servers[uuid].address, self.domains[i])

    def kill(self, i: int) -> None:
        """A node's process ends: whoever is connected to it notices."""
        uuid = self.members[i].uuid
        self.net.dead.add(uuid)
        self.servers[uuid].close()
        self.links[uuid].close()

    def close(self) -> None:
        for node in self.net.nodes.values():
            node.close()
        for end in (*self.servers.values(), *self.links.values()):
            end.close()
