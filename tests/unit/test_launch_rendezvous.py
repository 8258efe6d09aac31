"""Nodes meet, and only those that may."""

import copy
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from planaria.core.deadline import Deadline
from planaria.errors import CollectiveError, ConfigError, DeadlineError
from planaria.launch.rendezvous import FixedRendezvous

TOKEN = b"0123456789abcdef"


@pytest.fixture
def nodes(free_port):
    """Makes nodes of one job, in threads of this process; the first one made listens."""
    made: list[FixedRendezvous] = []

    def make(nnodes=2, *, nproc=1, token=TOKEN, facts=None, timeout_s=60.0, **options):
        node = FixedRendezvous(
            nproc=nproc,
            nnodes=nnodes,
            endpoint=("127.0.0.1", free_port),
            timeout_s=timeout_s,
            facts=facts,
            load_token=lambda: token,
            begin=options.pop("begin", lambda: (7, "config")),
            **options,
        )
        made.append(node)
        return node

    yield make
    threads = [threading.Thread(target=node.shutdown) for node in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.fixture
def time_is_up(monkeypatch):
    """Ends the time of all deadlines of the rendezvous, once what a test waits for has come."""
    now = [0.0]
    monkeypatch.setattr(
        "planaria.launch.rendezvous.Deadline", lambda s: Deadline(s, clock=lambda: now[0])
    )

    def after(has_come) -> None:
        until = Deadline(60)
        while not has_come():
            until.check("what must come before the time is up")
            time.sleep(0.01)
        now[0] += 1e6

    return after


def posts(node: FixedRendezvous, number: int = 0) -> int:
    """How many posts of a round a node has written or can see."""
    return node._control.add(f"round-{number}/count", 0) if node._control is not None else 0


@pytest.fixture
def at_once():
    with ThreadPoolExecutor(8) as pool:

        def start(*calls) -> list[Future]:
            return [pool.submit(call) for call in calls]

        yield start


def test_a_single_node_needs_no_network():
    node = FixedRendezvous(nproc=3, load_token=lambda: b"", begin=lambda: (4, "config"))
    info = node.next_rendezvous()
    assert (info.rank, info.world_size) == (0, 1)
    assert node.assignment is not None
    assert (node.assignment.attempt, node.assignment.world_size) == (4, 3)
    assert info.bootstrap_store_info is not None
    assert info.bootstrap_store_info.master_addr == "127.0.0.1"
    first = info.bootstrap_store_info.master_port
    again = node.next_rendezvous().bootstrap_store_info
    assert again is not None
    assert again.master_port != first
    assert node.num_nodes_waiting() == 0
    node.shutdown()


def test_nodes_meet_and_agree(nodes, at_once):
    told = []
    trio = [nodes(3, nproc=1 + i, facts={"torch": "2"}, joined=told.append) for i in range(3)]
    assert [node.is_first for node in trio] == [True, False, False]
    infos = [f.result(60) for f in at_once(*(node.next_rendezvous for node in trio))]
    assert {info.rank for info in infos} == {0, 1, 2}
    assert infos[0].rank == 0
    assert len({node.assignment for node in trio}) == 1
    assignment = trio[0].assignment
    assert assignment is not None
    assert (assignment.attempt, assignment.config, assignment.world_size) == (7, "config", 6)
    starts = {assignment.first_rank(info.rank) for info in infos}
    assert len(starts) == 3
    assert len(told) == 3
    # All of them can reach the store of the ranks; there is one.
    infos[0].store.set("x", "1")
    assert infos[2].store.get("x") == b"1"
    done = at_once(*(node.wait_for_all for node in trio))
    assert [f.result(60) for f in done] == [None] * 3


def test_the_next_round_keeps_the_order_and_is_announced(nodes, at_once):
    attempts = iter(range(10))
    pair = [nodes(begin=lambda: (next(attempts), "")), nodes()]
    [f.result(60) for f in at_once(*(node.next_rendezvous for node in pair))]
    before = pair[0].assignment
    assert pair[0].num_nodes_waiting() == 0
    (second,) = at_once(pair[1].next_rendezvous)
    while not pair[0].num_nodes_waiting():
        assert not second.done()
    pair[0].next_rendezvous()
    second.result(60)
    after = pair[0].assignment
    assert before is not None
    assert after is not None
    assert after.nodes == before.nodes
    assert (after.round, after.attempt) == (1, 1)
    assert after.port != before.port


def test_another_token_is_not_heard(nodes, at_once, time_is_up):
    asked = threading.Event()
    first, stranger = nodes(check=asked.set), nodes(token=b"another token of 16")
    waiting, strange = at_once(first.next_rendezvous, stranger.next_rendezvous)
    # The first one pauses once it has read its own post.
    time_is_up(lambda: stranger._warned and posts(first) and asked.is_set())
    with pytest.raises(DeadlineError, match="token"):
        strange.result(60)
    with pytest.raises(DeadlineError, match=r"2 nodes to join \(1 have\)"):
        waiting.result(60)


def test_what_strangers_write_is_ignored(nodes, at_once):
    first = nodes()
    (waiting,) = at_once(first.next_rendezvous)
    other = nodes()
    while first._control is None:
        pass
    control = first._control
    post = '{"id": "ghost", "nproc": 9, "round": 0, "facts": {}, "session": "x"}'
    control.set(f"round-0/post-{control.add('round-0/count', 1)}", f"{'0' * 64}\n{post}")
    control.set(f"round-0/post-{control.add('round-0/count', 1)}", "no message at all")
    # Signed, but in an earlier life of the job.
    earlier = copy.copy(first)
    earlier._session = "earlier"
    old = {"id": "old", "nproc": 9, "round": 0, "facts": {}}
    earlier._write(control, f"round-0/post-{control.add('round-0/count', 1)}", old)
    other.next_rendezvous()
    waiting.result(60)
    assert first.assignment is not None
    assert [n.id for n in first.assignment.nodes] == [first.node.id, other.node.id]


def test_without_the_check_strangers_would_be_heard(nodes, at_once, monkeypatch):
    monkeypatch.setattr("planaria.launch.rendezvous.hmac.compare_digest", lambda a, b: True)
    first = nodes()
    (waiting,) = at_once(first.next_rendezvous)
    while first._control is None:
        pass
    post = (
        f'{{"id": "ghost", "nproc": 9, "round": 0, "facts": {{}}, "session": "{first._session}"}}'
    )
    first._control.set(f"round-0/post-{first._control.add('round-0/count', 1)}", f"\n{post}")
    waiting.result(60)
    assert first.assignment is not None
    assert "ghost" in [n.id for n in first.assignment.nodes]
    first._listening = 1


def test_a_node_that_differs_is_refused_and_told_why(nodes, at_once, time_is_up):
    first = nodes(facts={"torch": "2.13"})
    other = nodes(facts={"torch": "2.11"})
    waiting, refused = at_once(first.next_rendezvous, other.next_rendezvous)
    with pytest.raises(ConfigError, match=r"torch is '2\.11', on the first node '2\.13'"):
        refused.result(60)
    time_is_up(lambda: True)
    with pytest.raises(DeadlineError):
        waiting.result(60)


def test_one_node_too_many_is_told(nodes, at_once, time_is_up):
    pair = [nodes(), nodes()]
    [f.result(60) for f in at_once(*(node.next_rendezvous for node in pair))]
    late = nodes()
    (waiting,) = at_once(late.next_rendezvous)
    # It posts for the next round, which nobody else comes to.
    time_is_up(lambda: posts(pair[0], 1))
    with pytest.raises(DeadlineError):
        waiting.result(60)


def test_a_node_that_gives_up_is_heard_by_all(nodes, at_once):
    pair = [nodes(), nodes()]
    [f.result(60) for f in at_once(*(node.next_rendezvous for node in pair))]
    assert not pair[0].is_closed()
    pair[1].set_closed("rank 1 was killed")
    deadline = Deadline(60)
    while (reason := pair[0].closing_reason()) is None:  # the store takes a moment
        deadline.check("the other node's word")
    assert reason == "rank 1 was killed"
    assert pair[1].closing_reason() is None
    with pytest.raises(CollectiveError, match="rank 1 was killed"):
        pair[0].wait_for_all()


def test_a_first_node_with_nothing_to_do_sends_the_others_home(nodes, at_once):
    first, other = nodes(), nodes()
    first.dismiss("the run is finished")
    with pytest.raises(CollectiveError, match="the run is finished"):
        other.next_rendezvous()


def test_a_first_node_that_dies_is_noticed(nodes, at_once):
    first, other = nodes(), nodes()
    [f.result(60) for f in at_once(first.next_rendezvous, other.next_rendezvous)]
    first._control = first._ranks_store = None  # what its death does to its stores

    def ask_on():
        while True:
            other.closing_reason()

    with pytest.raises(CollectiveError, match="lost the rendezvous"):
        ask_on()


def test_waiting_can_be_given_up(nodes):
    class Enough(Exception):
        pass

    def check():
        raise Enough

    with pytest.raises(Enough):
        nodes(check=check).next_rendezvous()


def test_nobody_listens(nodes, free_port):
    first = nodes()
    other = nodes(timeout_s=0.5)
    first._listener.close()
    with pytest.raises(DeadlineError, match="the first node"):
        other.next_rendezvous()


def test_the_first_node_listens_where_it_was_told_alone(nodes, free_port):
    assert nodes().is_first
    assert not nodes().is_first
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # refused where one listens
        with pytest.raises(OSError):
            probe.bind(("127.0.0.1", free_port))
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", free_port))


def test_bad_addresses(free_port):
    with pytest.raises(ConfigError, match="--rdzv"):
        FixedRendezvous(nproc=1, nnodes=2, load_token=lambda: b"", begin=lambda: (0, ""))
    with pytest.raises(ConfigError, match=r"nowhere\.invalid"):
        FixedRendezvous(
            nproc=1,
            nnodes=2,
            endpoint=("nowhere.invalid", free_port),
            load_token=lambda: b"",
            begin=lambda: (0, ""),
        )
