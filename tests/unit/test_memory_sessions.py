"""What a rank leaves in its snapshot process when it dies, or gives up, while it waits there."""

import contextlib
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_jobs import eventually

from planaria.checkpoint.format.checksum import checksum
from planaria.checkpoint.memory import client as client_module
from planaria.checkpoint.memory.arena import Arena
from planaria.checkpoint.memory.client import NodeClient
from planaria.checkpoint.memory.courtesy import PAGE_NBYTES, Pace, Words
from planaria.checkpoint.memory.memory import Key, Scheme, Span
from planaria.checkpoint.memory.node import SnapshotNode
from planaria.checkpoint.memory.peers import TcpPeers
from planaria.checkpoint.memory.persisting import Persisting
from planaria.checkpoint.memory.prefault import Prefault
from planaria.checkpoint.memory.runtime import Place
from planaria.checkpoint.memory.server import Server
from planaria.checkpoint.memory.sessions import Sessions
from planaria.core.deadline import Deadline
from planaria.errors import PlanariaError, WireError

TOKEN = b"the token of this test's job"
NBYTES = 8192
FIRST, SECOND, THIRD = Key(1, "aa"), Key(2, "bb"), Key(3, "cc")


class Served:
    """A node's server in this process; calls of its node can be held up."""

    def __init__(self, folder: Path) -> None:
        self.place = Place(folder / "job" / "node")
        self.place.make()
        self.arena = Arena(1 << 20)
        words = self.arena.allocate(PAGE_NBYTES)
        self.peers = TcpPeers(token=TOKEN)
        self.node = SnapshotNode("n", self.arena, self.peers, timeout_s=30.0)
        self.prefault = Prefault(self.arena)
        about = {"uuid": "n", "member": ["n", "", ""], "pid": 1, "node": "n"}
        self.server = Server(
            self.node, self.arena, Persisting("n", self.node, self.peers, 30.0), TOKEN, about,
            lambda: None, self.prefault, words, Pace(words=Words(self.arena.view(words))),
        )  # fmt: skip
        self.server.listen(self.place.bind()[0])
        self.clients: list[NodeClient] = []

    def open(self) -> NodeClient:
        self.clients.append(
            NodeClient(self.place, TOKEN, f"rank {len(self.clients)}", Deadline(60))
        )
        return self.clients[-1]

    def hold_up(self, monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[Any, Any]:
        """Calls of a method of the node do not return before the second event is set."""
        done, go_on = threading.Event(), threading.Event()
        method = getattr(self.node, name)

        def slow(*args: Any, **options: Any) -> Any:
            result = method(*args, **options)
            done.set()
            assert go_on.wait(60)
            return result

        monkeypatch.setattr(self.node, name, slow)
        return done, go_on

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.server.close()
        self.node.close()
        self.peers.close()
        self.prefault.close()
        self.arena.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    tmp_path.chmod(0o700)
    made = Served(tmp_path)
    yield made
    made.close()


def in_background(work: Callable[[], object]) -> threading.Thread:
    def run() -> None:
        with pytest.raises(PlanariaError):
            work()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def take(node: NodeClient, key: Key) -> None:
    image = node.begin(key, "a", NBYTES, Deadline(30))
    image[:] = 7
    node.seal(key, "a", [checksum(image[4096:])], 4096, 4096)
    node.describe(key, b"manifest", Deadline(30))
    node.wait(key, Deadline(30))


@pytest.mark.parametrize("what", ["begin", "hold", "read"])
def test_a_rank_that_dies_while_it_waits_leaves_nothing(
    served: Served, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    rank, other = served.open(), served.open()
    rank.configure([rank.member], Scheme(0), 1)
    take(other, FIRST)
    used = other.status()["used"]
    asks: dict[str, Callable[[], object]] = {
        "begin": lambda: rank.begin(SECOND, "a", NBYTES, Deadline(60), hold=True),
        "hold": lambda: rank.hold(FIRST),
        "read": lambda: rank.fetch(FIRST, "a", 0, np.empty(10, np.uint8).data, Deadline(60)),
    }
    with monkeypatch.context() as patched:
        done, go_on = served.hold_up(patched, what)
        asking = in_background(asks[what])
        assert done.wait(60)
        rank.close()  # as its death does
        asking.join()
        eventually(lambda: len(other.status()["ranks"]) == 1, "its end noticed")
        go_on.set()
    eventually(lambda: other.status()["used"] == used, "its memory free again")
    take(other, THIRD)
    eventually(lambda: other.status()["used"] == used, "the memory of the one before free again")


def test_a_rank_that_gives_up_waiting_does_not_keep_what_comes_late(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_GRACE_S", 0.0)
    rank = served.open()
    rank.configure([rank.member], Scheme(0), 1)
    with monkeypatch.context() as patched:
        done, go_on = served.hold_up(patched, "begin")
        asking = in_background(lambda: rank.begin(FIRST, "a", NBYTES, Deadline(0.5), hold=True))
        assert done.wait(60)
        asking.join()
        go_on.set()
    eventually(lambda: rank.status()["used"] == 0, "its memory free again")
    take(rank, SECOND)


def test_a_connection_that_comes_after_the_end_of_its_session_opens_none() -> None:
    """A session that nobody closes would keep the process for ever."""

    nobody: Any = None  # is not asked for anything
    sessions = Sessions(nobody, nobody, Words(np.zeros(PAGE_NBYTES, np.uint8)))
    first = sessions.open("a", "rank 0", main=True)
    assert sessions.open("a", "rank 0", main=False) is first
    assert first.given(first.scratch, Span(0, 1))
    assert first.taken(first.scratch, Span(0, 1))
    assert not first.taken(first.scratch, Span(0, 1))
    sessions.close("a")
    with pytest.raises(WireError, match="rank 0 is over"):
        sessions.open("a", "rank 0", main=False)
    assert sessions.names == []
    assert not first.given(first.held, FIRST)


def test_it_goes_on_accepting_after_it_was_out_of_descriptors_or_threads(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.open()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # So that the next call that makes one fails: this process is both sides.
    waiting = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
    spare = []
    try:
        with contextlib.suppress(OSError):
            while True:
                spare.append(os.open("/dev/null", os.O_RDONLY))
        for sock in waiting[:1]:
            sock.connect(str(served.place.path / "socket"))
        threading.Event().wait(0.2)
    finally:
        for fd in spare:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert served.open().uuid == "n"
    start = threading.Thread.start

    def none_left(thread: threading.Thread) -> None:
        if thread.name == "planaria-rank":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", none_left)
        with pytest.raises(WireError):
            served.open()
    assert served.open().uuid == "n"
    for sock in waiting:
        sock.close()


def test_a_request_that_makes_no_sense_ends_nothing(served: Served) -> None:
    rank = served.open()
    with pytest.raises(WireError, match="malformed"):
        rank._request({"op": "describe", "key": [1, "aa"]})
    with pytest.raises(WireError, match="malformed"):
        rank._request({"op": "fetch", "key": [1, "aa"], "file": "a", "offset": 0,
                       "nbytes": 1 << 70, "timeout": 1.0})  # fmt: skip
    assert rank.status()["ranks"] == ["rank 0"]
