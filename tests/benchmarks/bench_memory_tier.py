"""memory_tier: what a snapshot in memory with parity costs, and how fast a lost node is read again.

    python tests/benchmarks/bench_memory_tier.py [--mb 64] [--nodes 4] [--losses 1] [--turns 5]

Logical nodes in one process, each with memory, server and connections of its own, over TCP on the
loopback interface with the job's token. CPU time is that of the whole process: of all nodes. The
parts that a snapshot's cost is compared with are run alone on the same number of bytes: a copy and
CRC-32C of every image, CRC-32C of every parity, sending over an authenticated connection from one
thread to another, and encoding. What is decoded is compared with what was captured.
"""

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from limits import Memory, read_raw, write_raw
from numpy.typing import NDArray
from timing import Goal, Turns, clock, in_turn, machine, publish_tables, rows_of

from planaria.checkpoint.erasure import make_codec
from planaria.checkpoint.format.checksum import checksum
from planaria.checkpoint.memory.memory import Key, Member, Reply, Scheme, Span
from planaria.checkpoint.memory.node import SnapshotNode
from planaria.checkpoint.memory.peers import PeerServer, TcpPeers
from planaria.checkpoint.memory.survival import Recovery, erasure, replication
from planaria.core import rpc, wire
from planaria.core.byte_stream import Buffer
from planaria.core.deadline import Deadline

TOKEN = b"the token of a benchmark"
HEADER = 4096
CHUNK = 4 << 20
BLOCK = 1 << 20
READERS = 2
Bytes = NDArray[np.uint8]


class Heap:
    """Memory on the heap whose spans are used again, so that their pages have been touched."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used: dict[int, Bytes] = {}
        self._free: list[Bytes] = []
        self._next = 0

    def allocate(self, nbytes: int) -> Span:
        with self._lock:
            fits = [i for i, each in enumerate(self._free) if len(each) == nbytes]
            array = self._free.pop(fits[0]) if fits else np.ones(nbytes, np.uint8)
            self._next += 4096
            self._used[self._next] = array
            return Span(self._next, nbytes)

    def free(self, span: Span) -> None:
        with self._lock:
            self._free.append(self._used.pop(span.offset))

    def view(self, span: Span) -> Bytes:
        with self._lock:
            return self._used[span.offset]


class Counted(TcpPeers):
    """Counts the payload that a node has sent and asked for."""

    def __init__(self) -> None:
        super().__init__(token=TOKEN)
        self.out, self.back = 0, 0
        self._count = threading.Lock()

    def call(
        self,
        uuid: str,
        request: dict[str, Any],
        payloads: Sequence[Buffer],
        deadline: Deadline,
        into: Sequence[memoryview] = (),
    ) -> Reply:
        header, got = super().call(uuid, request, payloads, deadline, into)
        with self._count:
            self.out += sum(memoryview(each).nbytes for each in payloads)
            self.back += sum(memoryview(each).nbytes for each in got)
        return header, got


class Job:
    """Nodes of one rank each, and what their ranks capture."""

    def __init__(self, nodes: int, losses: int, nbytes: int) -> None:
        rng = np.random.default_rng(0)
        self.images = [rng.integers(0, 256, nbytes, np.uint8) for _ in range(nodes)]
        self.memories = [Heap() for _ in range(nodes)]
        self.peers = [Counted() for _ in range(nodes)]
        self.nodes = [
            SnapshotNode(f"node{i}", self.memories[i], self.peers[i], timeout_s=300)
            for i in range(nodes)
        ]
        self.servers = [
            PeerServer(node.serve, token=TOKEN, answering=node.answering) for node in self.nodes
        ]
        members = [Member(f"node{i}", s.address) for i, s in enumerate(self.servers)]
        for node in self.nodes:
            node.configure(members, Scheme(losses, max(nodes, losses + 1)), 1)
        self.step = 0
        self.key = Key(0, "")

    def change(self) -> None:
        """Every chunk differs from the one before."""
        for image in self.images:
            image[::1024] += 1

    def snapshot(self) -> None:
        """One snapshot, from the copy to the commit."""
        self.step += 1
        self.key = Key(self.step, f"{self.step:032x}")
        for i, image in enumerate(self.images):
            name = self.file(i)
            view = self.memories[i].view(self.nodes[i].begin(self.key, name, len(image)))
            view[:HEADER] = image[:HEADER]
            sums = []
            for at in range(HEADER, len(image), CHUNK):
                view[at : at + CHUNK] = image[at : at + CHUNK]
                sums.append(checksum(view[at : at + CHUNK]))
            self.nodes[i].seal(self.key, name, sums, CHUNK, HEADER)
        self.nodes[0].describe(self.key, b"{}")
        self.nodes[0].wait(self.key, Deadline(300))

    def file(self, i: int) -> str:
        return f"rank-{i:05d}-{self.key.attempt}.safetensors"

    def lose(self, i: int) -> None:
        """A node is gone; the others notice at the next call."""
        self.servers[i].close()
        self.peers[i].close()
        assert self.nodes[(i + 1) % len(self.nodes)].recoverable(Deadline(60))

    def read(self, reader: int, i: int, out: Bytes) -> None:
        """As a restore reads: the header, then whole chunks, several at a time."""
        ends = [0, *range(HEADER, len(out), 4 * CHUNK), len(out)]

        def part(start: int, stop: int) -> None:
            self.nodes[reader].read(
                self.key, self.file(i), start, out[start:stop].data, Deadline(300)
            )

        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(part, ends, ends[1:]))

    def close(self) -> None:
        for end in (*self.nodes, *self.servers, *self.peers):
            end.close()


def cpu(call: Any) -> float:
    """CPU seconds of all threads of this process."""
    started = time.process_time()
    call()
    return time.process_time() - started


class Alone:
    """The parts of a snapshot, each by itself."""

    def __init__(self, job: Job, losses: int) -> None:
        self._job, self._m = job, losses
        self._nodes, nbytes = len(job.images), len(job.images[0])
        self._k = self._nodes - losses
        self._chunk = -(-nbytes // (self._k * 4096)) * 4096
        self._target = np.ones(nbytes, np.uint8)
        self._codec = make_codec(self._k, losses)
        self._parity = np.ones((losses, self._chunk), np.uint8)

    def capture(self) -> None:
        for image in self._job.images:
            for at in range(0, len(image), CHUNK):
                self._target[at : at + CHUNK] = image[at : at + CHUNK]

    def checksums(self) -> None:
        for image in self._job.images:
            for at in range(0, len(image), CHUNK):
                checksum(image[at : at + CHUNK])
            for _ in range(self._m):
                for at in range(0, self._chunk, BLOCK):
                    checksum(self._parity[0][at : at + BLOCK])

    def encode(self) -> None:
        rows = [image[: self._chunk] for image in self._job.images[: self._k]]
        for _ in range(self._nodes):  # stripes
            for at in range(0, self._chunk, BLOCK):
                part = [row[at : at + BLOCK] for row in rows]
                self._codec.encode(part, [p[at : at + BLOCK] for p in self._parity])

    def send(self) -> None:
        """All that crosses the network, over one connection in pieces of 2 MiB."""
        left = self._nodes * (self._k + self._m - 1) * self._chunk
        pieces: list[Bytes] = []
        while left > 0:
            for image in self._job.images:
                for at in range(0, len(image), 2 * BLOCK):
                    pieces.append(image[at : min(at + 2 * BLOCK, at + max(left, 0))])
                    left -= len(pieces[-1])
        pieces = [piece for piece in pieces if len(piece)]
        room = np.ones(2 * BLOCK, np.uint8).data
        with wire.listen(token=TOKEN, limits=rpc.LIMITS) as listener:
            host, port = listener.address

            def receive() -> None:
                with listener.accept(Deadline(60)) as connection:
                    for _ in pieces:
                        connection.recv(Deadline(300), [room])

            thread = threading.Thread(target=receive)
            thread.start()
            with wire.connect(
                host, port, token=TOKEN, deadline=Deadline(60), limits=rpc.LIMITS
            ) as connection:
                for piece in pieces:
                    connection.send({}, [piece.data], deadline=Deadline(300))
                thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mb", type=int, default=64, help="size of a node's image")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--losses", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    started = machine()
    nbytes = HEADER + (args.mb << 20)
    job = Job(args.nodes, args.losses, nbytes)
    cost = costs(job, args)
    parts = ["capture", "checksums", "send", "encode"]
    total = [float(sum(values)) for values in zip(*(cost.values[p] for p in parts), strict=True)]
    cost.values["sum of the parts"] = total
    traffic = traffic_of(job, args)
    room = memory_of(job, args)
    reads, work = recovery(job, args, nbytes)
    job.close()
    gb = nbytes / 1e9

    def speed(_: str, median: float) -> dict[str, Any]:
        return {"GB/s": gb / median}

    ratio = cost.ratio("planaria", "sum of the parts")["median"]
    publish_tables(
        "memory_tier",
        [
            (f"CPU seconds of all {args.nodes} nodes for a snapshot of {args.mb} MiB each, "
             f"m = {args.losses} (measured)",
             rows_of(cost, "sum of the parts")),
            ("Payload per node and snapshot, MB (measured)", traffic),
            ("Memory of a node, for each byte of its image (measured)", room),
            ("One lost node of 1,000 restored over 100 Gbit/s, 64 GB a node (simulated)",
             model_of()),
            (f"Image of one lost node of {args.nodes} (measured)",
             rows_of(reads, "planaria", more=speed)),
            ("The same, CPU time of all nodes (measured)", rows_of(work, "planaria", more=speed)),
        ],
        vars(args),
        goals=[
            Goal("CPU time of a snapshot over the sum of its parts", ratio, 1.3, 1.1, True),
            Goal("payload of the exchange over the bound", traffic[0]["over the bound"], 1.01,
                 1.0, True),
            Goal("speed of recovery over a cold read",
                 reads.ratio("cold read from disk", "planaria")["median"], 1.0),
            *(Goal(f"memory to survive any {row['survives any']} of {args.nodes}, images a node",
                   row["measured"], round(1.001 * row["computed"], 3), None, True)
              for row in room if row["by"] == "parity"),
        ],
        started=started,
    )  # fmt: skip


def costs(job: Job, args: argparse.Namespace) -> Turns:
    """CPU seconds of a snapshot, and of its parts, in turn."""
    alone = Alone(job, args.losses)

    def changed() -> float:
        job.change()
        return cpu(job.snapshot)

    return in_turn(
        {
            "planaria": changed,
            "capture": lambda: cpu(alone.capture),
            "checksums": lambda: cpu(alone.checksums),
            "send": lambda: cpu(alone.send),
            "encode": lambda: cpu(alone.encode),
            "planaria, nothing changed": lambda: cpu(job.snapshot),
        },
        args.turns,
    )


def traffic_of(job: Job, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What crosses the network in a snapshot, beside the least that is possible."""
    n, m, k = args.nodes, args.losses, args.nodes - args.losses
    chunk = -(-len(job.images[0]) // (k * 4096)) * 4096
    bound = (k + m - 1) * chunk
    rows = []
    for what, change in (("all changed", True), ("nothing changed", False)):
        before = sum(p.out + p.back for p in job.peers)
        if change:
            job.change()
        job.snapshot()
        sent = (sum(p.out + p.back for p in job.peers) - before) / n
        rows.append({
            "snapshot": what, "sent": sent / 1e6, "bound": bound / 1e6,
            "over the bound": sent / bound,
        })  # fmt: skip
    return rows


def memory_of(job: Job, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Memory that is held: ours, and as many copies of each image as survive the same losses."""
    rows = []
    for m in sorted({1, 2, args.losses}):
        if m >= args.nodes:
            continue
        nbytes, there = len(job.images[0]), job
        if m != args.losses:
            there = Job(args.nodes, m, nbytes)
            there.snapshot()
        ours = [sum(map(len, memory._used.values())) for memory in there.memories]
        copies: list[dict[str, Bytes]] = [{} for _ in job.images]
        for i, image in enumerate(job.images):
            for j in range(m + 1):
                copies[(i + j) % len(copies)][f"{i}"] = image.copy()
        replicas = [sum(map(len, each.values())) for each in copies]
        if there is not job:
            there.close()
        for by, held, computed in (
            ("parity", ours, 1 + m / (args.nodes - m)),
            ("copies", replicas, 1 + m),
        ):
            measured = max(held) / nbytes
            rows.append({"survives any": m, "by": by, "measured": measured, "computed": computed})
    return rows


def model_of() -> list[dict[str, Any]]:
    """What `planaria plan memory` computes; one reader, as a node that was replaced is."""
    schemes = [erasure(1000, m, 16) for m in (1, 2)] + [replication(1000, copies=c) for c in (2, 3)]
    rows = []
    for scheme in schemes:
        found = Recovery(scheme, image_nbytes=64e9, link=12.5e9)
        rows.append({
            "scheme": scheme.name, "memory": scheme.memory, "sent a snapshot": scheme.network,
            "one node reads, s": found.one_reads, "all nodes read, s": found.all_read,
        })  # fmt: skip
    return rows


def recovery(job: Job, args: argparse.Namespace, nbytes: int) -> tuple[Turns, Turns]:
    """Seconds to read the image of a lost node, beside a read from disk past the cache."""
    out = np.ones(nbytes, np.uint8)
    lost, reader = 1, 0
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        path = Path(folder) / "image"
        memory = Memory(nbytes)
        memory.view[:nbytes] = job.images[lost].data
        write_raw(path, memory)
        job.lose(lost)

        def read(i: int) -> None:
            job.read(reader, i, out)

        def checked(i: int, measure: Callable[[Callable[[], None]], float]) -> float:
            out[:] = 0
            seconds = measure(lambda: read(i))
            assert np.array_equal(out, job.images[i])
            return seconds

        def variants(measure: Callable[[Callable[[], None]], float]) -> dict[str, Any]:
            return {
                "planaria": lambda: checked(lost, measure),
                "cold read from disk": lambda: measure(lambda: read_raw(path, memory)),
                "from a node that is there": lambda: checked(2, measure),
                "from this node's memory": lambda: checked(reader, measure),
            }

        return in_turn(variants(clock), args.turns), in_turn(variants(cpu), args.turns)


if __name__ == "__main__":
    main()
