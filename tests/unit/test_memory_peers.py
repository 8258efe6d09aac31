"""The same protocol over sockets: tokens, silent and lost peers, connections that were closed."""

import itertools
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from memory_nodes import HEADER, TOKEN, TcpCluster, file_of

from planaria.checkpoint.memory.memory import Key, Member, Reply, Scheme
from planaria.checkpoint.memory.peers import PeerServer, TcpPeers, parse_address
from planaria.core.byte_stream import Buffer
from planaria.core.deadline import Deadline
from planaria.core.points import armed
from planaria.errors import (
    ConfigError,
    DeadlineError,
    PlanariaError,
    SaveFailedError,
    StorageError,
    WireError,
)

KEY = Key(3, "aa")


def soon() -> Deadline:
    return Deadline(60)


@pytest.fixture
def clusters() -> Iterator[list[TcpCluster]]:
    made: list[TcpCluster] = []
    yield made
    for cluster in made:
        cluster.close()


def test_lost_nodes_are_made_up_for(clusters: list[TcpCluster]) -> None:
    for lost in itertools.combinations(range(4), 2):
        cluster = TcpCluster(4, Scheme(2), sizes=[5000, 9000, 1, 20000])
        clusters.append(cluster)
        cluster.take(Key(2, "a"))
        cluster.take(KEY)
        for i in lost:
            cluster.kill(i)
        reader = next(i for i in range(4) if i not in lost)
        newest = cluster.newest(reader)
        assert newest is not None
        assert (newest.key, set(newest.lost)) == (KEY, cluster.net.dead)
        cluster.check(reader, newest)


def test_a_node_is_replaced(clusters: list[TcpCluster]) -> None:
    cluster = TcpCluster(3, Scheme(1))
    clusters.append(cluster)
    cluster.take(KEY)
    cluster.kill(1)
    cluster.replace(1)
    newest = cluster.newest(1)
    assert newest is not None
    cluster.check(1, newest)
    cluster.take(Key(4, "bb"))
    cluster.kill(0)
    newest = cluster.newest(1)
    assert newest is not None
    assert newest.key == Key(4, "bb")
    cluster.check(1, newest)


@pytest.mark.parametrize("where", ["fetch", "encode", "store"])
def test_a_node_that_dies_in_the_exchange_ends_the_snapshot(
    where: str, clusters: list[TcpCluster]
) -> None:
    cluster = TcpCluster(4, Scheme(2), sizes=[9000] * 4, timeout_s=30)
    clusters.append(cluster)
    cluster.take(KEY)
    dying = cluster.members[1].uuid
    with armed(callbacks={f"memory.exchange.{where}": lambda _, __: kill_once(cluster)}):
        cluster.take(Key(4, "bb"), wait=False)
        with pytest.raises(SaveFailedError, match=dying):
            cluster.node(0).wait(Key(4, "bb"), soon())
    newest = cluster.newest(2)
    assert newest is not None
    assert newest.key == KEY
    cluster.check(2, newest)


def kill_once(cluster: TcpCluster) -> None:
    if not cluster.net.dead:
        cluster.kill(1)


def test_another_token_is_refused(clusters: list[TcpCluster]) -> None:
    cluster = TcpCluster(2, Scheme(1), tokens={1: b"the token of another job"})
    clusters.append(cluster)
    cluster.capture(0, KEY)
    cluster.capture(1, KEY)
    with pytest.raises(SaveFailedError, match=r"token"):
        cluster.node(1).wait(KEY, soon())
    with pytest.raises(WireError, match=f"node {cluster.members[1].uuid}.*token"):
        cluster.links[cluster.members[0].uuid].call(
            cluster.members[1].uuid, {"op": "holdings"}, (), soon()
        )
    assert cluster.node(0).recoverable(soon()) == []


@pytest.mark.parametrize("speaks", [False, True], ids=["silent", "slow"])
def test_a_peer_that_does_not_answer_is_named(speaks: bool) -> None:
    peers = TcpPeers(token=TOKEN)
    over = threading.Event()

    def answer(request: dict[str, Any], payloads: Sequence[Buffer]) -> Reply:
        over.wait(60)
        return {}, ()

    slow = PeerServer(answer, token=TOKEN)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        peers.know([Member("quiet", slow.address if speaks else f"127.0.0.1:{port}")])
        with pytest.raises(DeadlineError, match="node quiet"):
            peers.call("quiet", {"op": "holdings"}, (), Deadline(0.3))
    over.set()
    slow.close()
    peers.close()


def test_reads_do_without_a_silent_peer(
    clusters: list[TcpCluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = TcpCluster(3, Scheme(1))
    clusters.append(cluster)
    cluster.take(KEY)
    cluster.node(0)._links.timeout_s = 0.5
    quiet = cluster.members[1].uuid
    peers = cluster.links[cluster.members[0].uuid]
    call = peers.call

    def patient(uuid: str, request: Any, payloads: Any, deadline: Deadline, into: Any = ()) -> Any:
        """With one that is merely slow."""
        return call(uuid, request, payloads, deadline if uuid == quiet else soon(), into)

    monkeypatch.setattr(peers, "call", patient)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        # Its connections hang from now on.
        cluster.servers[quiet].close()
        moved = Member(quiet, f"127.0.0.1:{silent.getsockname()[1]}")
        peers.know([moved])
        newest = cluster.newest(0)
        assert newest is not None
        assert newest.lost == [quiet]
        cluster.check(0, newest)


def test_a_connection_that_was_closed_is_made_again() -> None:
    server = PeerServer(lambda request, payloads: ({"got": request["n"]}, payloads), token=TOKEN)
    peers = TcpPeers(token=TOKEN)
    peers.know([Member("a", server.address)])
    for n in range(3):
        header, payloads = peers.call("a", {"n": n}, [b"x" * n], soon())
        assert header["got"] == n
        assert bytes(payloads[0]) == b"x" * n
        for connection in list(server._acceptor._open):
            connection.close()
    server.close()
    with pytest.raises(WireError, match="node a"):
        peers.call("a", {"n": 9}, (), soon())
    peers.close()
    with pytest.raises(WireError, match="closed"):
        peers.call("a", {"n": 9}, (), soon())


def test_errors_cross_as_what_they_are() -> None:
    raised: list[PlanariaError] = []

    def answer(request: dict[str, Any], payloads: Sequence[Buffer]) -> Reply:
        raise raised[-1]

    server = PeerServer(answer, token=TOKEN)
    peers = TcpPeers(token=TOKEN)
    peers.know([Member("a", server.address)])
    for thrown, seen in [
        (SaveFailedError("x"), SaveFailedError),
        (DeadlineError("x"), DeadlineError),
        (WireError("x"), SaveFailedError),  # the connection is good
        (StorageError("x"), SaveFailedError),
    ]:
        raised.append(thrown)
        with pytest.raises(seen, match=re.compile("node a.*x")) as caught:
            peers.call("a", {}, (), soon())
        assert type(caught.value) is seen
    server.close()
    peers.close()


def test_nobody_listens_openly_without_a_token() -> None:
    with pytest.raises(ConfigError, match="token"):
        PeerServer(lambda request, payloads: ({}, ()), "0.0.0.0")


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:x", "host:-1"])
def test_bad_addresses_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        parse_address(text)


def test_addresses() -> None:
    assert parse_address("h:7") == ("h", 7)
    assert parse_address("[::1]:7") == ("::1", 7)


def test_a_large_image_crosses(clusters: list[TcpCluster]) -> None:
    cluster = TcpCluster(
        3, Scheme(1), sizes=[5 << 20] * 3, block_nbytes=1 << 20, chunk_nbytes=4 << 20
    )
    clusters.append(cluster)
    cluster.take(KEY)
    cluster.kill(2)
    newest = cluster.newest(0)
    assert newest is not None
    cluster.check(0, newest)
    got = cluster.read(cluster.node(0), KEY, file_of(2, KEY), HEADER + (1 << 20), 4321)
    wanted = cluster.images[file_of(2, KEY)][HEADER + (1 << 20) :][:4321]
    assert got.tobytes() == wanted.tobytes()


def test_a_request_without_what_it_needs_is_refused(clusters: list[TcpCluster]) -> None:
    cluster = TcpCluster(2, Scheme(1))
    clusters.append(cluster)
    cluster.take(KEY)
    peers, uuid = cluster.links[cluster.members[0].uuid], cluster.members[1].uuid
    with pytest.raises(SaveFailedError, match=f"node {uuid}.*malformed"):
        peers.call(uuid, {"op": "manifest", "key": KEY.to_json()}, (), soon())


def test_connections_to_nodes_that_are_no_members_any_more_are_closed() -> None:
    servers = {name: PeerServer(lambda _, __: ({}, ()), token=TOKEN) for name in "ab"}
    peers = TcpPeers(token=TOKEN)
    members = [Member(name, server.address) for name, server in servers.items()]
    peers.know(members)
    for name in "ab":
        peers.call(name, {}, (), soon())
    peers.know(members[1:])
    assert {name: len(unused) for name, unused in peers._unused.items()} == {"b": 1}
    within = soon()
    while servers["a"]._acceptor._open and not within.expired:
        threading.Event().wait(0.01)
    assert not servers["a"]._acceptor._open
    peers.call("a", {}, (), soon())  # it may be asked again
    for end in (*servers.values(), peers):
        end.close()


def test_a_server_goes_on_once_threads_are_to_be_had_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = PeerServer(lambda _, __: ({}, ()), token=TOKEN)
    peers = TcpPeers(token=TOKEN)
    peers.know([Member("a", server.address)])
    start = threading.Thread.start

    def none_left(thread: threading.Thread) -> None:
        if thread.name.startswith("planaria-memory-"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", none_left)
        with pytest.raises(WireError, match="node a"):
            peers.call("a", {}, (), soon())
    peers.call("a", {}, (), soon())
    server.close()
    peers.close()
