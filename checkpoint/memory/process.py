"""The snapshot process: ``python -m planaria.checkpoint.memory.process FOLDER OPTIONS``.

It holds the snapshots of one node of one job, and outlives its ranks: it leads a session of its
own and is nobody's child. It ends when all of its ranks have said that the job ends, when nobody
has been connected for some time, or when it is told to. torch is not loaded here.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import resource
import secrets
import signal
import socket
import sys
import threading
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from planaria.checkpoint.memory.log import say
from planaria.errors import PlanariaError

_LOOK_EVERY_S = 0.5
_CLOSE_S = 10.0
_FRESH_S = 3600.0
# A restore ends with a snapshot, where a node was lost: that comes first.
_MEND_AFTER_S = 3.0


@dataclass(frozen=True)
class Options:
    """How a snapshot process is to be.

    Attributes:
        job: What the job is known by.
        node: The node's label.
        budget: Bytes of its memory.
        failure_domain: What fails together with the node.
        host: Where it listens for other nodes.
        idle_s: After how many seconds without any rank it ends.
        timeout_s: Budget of each phase of the protocol.
        persist_s: How long it may take to write a checkpoint.
        rate: Bytes a second that it sends to other nodes for parity; None for no limit.
        prefault: So many bytes of its memory are brought into being at its start.
        nice: By how much its threads give way to those of the ranks, 0 to 19.
        root: Where the job's checkpoints lie, for people.
    """

    job: str
    node: str
    budget: int
    failure_domain: str = ""
    host: str = "127.0.0.1"
    idle_s: float = 600.0
    timeout_s: float = 60.0
    persist_s: float = 1800.0
    rate: float | None = None
    prefault: int = 0
    nice: int = 0
    root: str = ""

    def to_json(self) -> str:
        """The options as one argument."""
        return json.dumps(asdict(self))


def main(argv: list[str]) -> int:
    """Starts the process in the background; returns once it serves, or could not begin to.

    What it is called with last is the number of a pipe that gets its word of that.
    """
    folder, options, report = Path(argv[0]), Options(**json.loads(argv[1])), int(argv[2])
    # Nobody's child: it must be reaped by nobody who may be gone, or be told of nobody's death.
    if os.fork():
        return 0
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # a leader has connections to all nodes
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1)  # what its threads are at goes to the log
    with os.fdopen(report, "w") as word:

        def tell(text: str) -> None:
            with contextlib.suppress(OSError):
                word.write(text + "\n")
                word.flush()
                word.close()

        try:
            serve(folder, options, lambda: tell("serves"))
        except PlanariaError as error:
            say(f"{type(error).__name__}: {error}")
            tell(f"{type(error).__name__}: {error}")
            return 1
        except BaseException as error:
            traceback.print_exc()
            tell(f"PlanariaError: {error!r}")
            raise
    return 0


def serve(folder: Path, options: Options, ready: Any) -> None:
    """Serves until the end.

    Args:
        folder: The node's place.
        options: See `Options`.
        ready: Called once ranks can connect.

    Raises:
        ConfigError: There is no such memory, or address.
    """
    from planaria.checkpoint.memory.arena import Arena
    from planaria.checkpoint.memory.courtesy import PAGE_NBYTES, Pace, Words
    from planaria.checkpoint.memory.memory import Member
    from planaria.checkpoint.memory.node import SnapshotNode
    from planaria.checkpoint.memory.peers import PeerServer, TcpPeers
    from planaria.checkpoint.memory.persisting import Persisting
    from planaria.checkpoint.memory.prefault import Prefault
    from planaria.checkpoint.memory.runtime import Info, Place
    from planaria.checkpoint.memory.server import Server
    from planaria.core.deadline import Deadline
    from planaria.core.pacing import TokenBucket
    from planaria.core.procs import identity
    from planaria.core.token import load_token

    # Training's own threads, also those of its collectives, come first where cores are short.
    with contextlib.suppress(OSError):
        os.nice(options.nice)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    token = load_token()
    assert token is not None  # whoever starts it passes it on
    place = Place(folder)
    uuid = f"{_readable(options.node)}.{secrets.token_hex(4)}"
    arena = Arena(options.budget + PAGE_NBYTES)
    words = arena.allocate(PAGE_NBYTES)  # new memory is all zeros
    prefault = Prefault(arena)
    prefault.want(options.prefault and options.prefault + PAGE_NBYTES)
    peers = TcpPeers(token=token)
    rate = options.rate
    bucket = None if rate is None else TokenBucket(rate, max(1 << 20, rate / 10))
    pace = Pace(bucket, Words(arena.view(words)))
    node = SnapshotNode(uuid, arena, peers, timeout_s=options.timeout_s, pace=pace,
                        mend_after_s=_MEND_AFTER_S)  # fmt: skip
    persisting = Persisting(uuid, node, peers, options.persist_s)
    peer_server = PeerServer(
        persisting.serve, options.host, 0, token=token, answering=node.answering
    )
    address = f"{_reachable(options.host)}:{peer_server.address.rpartition(':')[2]}"
    member = Member(uuid, address, options.failure_domain)
    about = {"uuid": uuid, "member": member.to_json(), "pid": os.getpid(), "node": options.node}
    server = Server(node, arena, persisting, token, about, ended.set, prefault, words, pace)
    info = Info(identity(), uuid, options.node, options.job, address, options.budget, options.root)
    sock, inode = place.bind()
    server.listen(sock)
    place.write_info(info)
    say(f"node {uuid} serves {options.root or options.job} as process {os.getpid()}")
    ready()
    why, fresh = "told to end", Deadline(_FRESH_S)
    try:
        while not ended.wait(_LOOK_EVERY_S):
            if fresh.expired:
                place.keep_fresh()
                fresh = Deadline(_FRESH_S)
            if server.sessions.done.is_set():
                why = "all ranks have parted"
                break
            if server.sessions.alone_s > options.idle_s:
                why = f"no rank was connected for {options.idle_s:g} s"
                break
            here = place.info()
            if here is None or here.uuid != uuid:
                # Cleared up by somebody, or another's by now: nobody new can find us.
                if server.sessions.alone_s > 0:
                    why = f"{folder} is not its place any more"
                    break
            elif not place.is_bound(inode):  # its name alone was removed
                sock, inode = place.bind()
                server.listen(sock)
    finally:
        say(f"node {uuid} ends: {why}")
        with contextlib.suppress(PlanariaError):  # what was promised to the ranks comes first
            persisting.settle(Deadline(options.persist_s))
        server.close()
        peer_server.close()
        peers.close()
        node.close()
        prefault.close()
        with contextlib.suppress(PlanariaError), place.locked(Deadline(_CLOSE_S)):
            here = place.info()
            if here is not None and here.uuid == uuid:
                place.clear()


def _readable(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", label)[:32] or "node"


def _reachable(host: str) -> str:
    """What others call an address that was bound."""
    if host in ("", "0.0.0.0", "::"):
        return socket.gethostbyname(socket.gethostname())
    return host


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
