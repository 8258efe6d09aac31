"""What an agent takes from whom: the token, ids that are expected, messages that make sense."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from planaria.core.connection import Connection
from planaria.core.deadline import Deadline
from planaria.core.wire import connect
from planaria.elastic.membership import (
    AgentMembership,
    Alone,
    FixedMembership,
    Standing,
    View,
)
from planaria.elastic.membership import (
    connect as connect_member,
)
from planaria.elastic.membership.coordinator import Coordinator
from planaria.elastic.membership.desk import Desk, Reception
from planaria.elastic.membership.links import LIMITS, Link, Message
from planaria.elastic.membership.rules import Rules
from planaria.errors import CollectiveError, ConfigError, StoppedError, WireError

TOKEN = b"the token of one job"


class Office:
    """An agent's ends without processes: members are threads of the test."""

    def __init__(self, rules: Rules, token: bytes = TOKEN) -> None:
        self.ahead_s = 0.0
        self.coordinator = Coordinator(rules, ("127.0.0.1", 1), clock=self.clock)
        self.desk = Desk(
            lambda member, message: self.coordinator.take("here", member, message),
            beat_s=0.05,
            expects=lambda member: member < 10,
        )
        self.reception = Reception({"member": self.desk.welcome}, token=token)
        self.fenced: list[int] = []
        self.coordinator.attach("here", self)
        self.coordinator.start()
        self.reception.start()
        self._members: list[AgentMembership] = []

    def clock(self) -> float:
        return time.monotonic() + self.ahead_s

    def member(self, number: int, token: bytes = TOKEN) -> AgentMembership:
        made = AgentMembership(*self.reception.address, number, token=token, deadline=Deadline(30))
        self._members.append(made)
        return made

    def close(self) -> None:
        for member in self._members:
            member.close()
        self.coordinator.close()
        self.reception.close()
        self.desk.close()

    def deliver(self, member: int, message: Message) -> None:
        self.desk.deliver(member, message)

    def fence(self, member: int, reason: str) -> None:
        self.fenced.append(member)

    def start(self, member: int, instead_of: int | None) -> None: ...

    def stop(self, reason: str) -> None: ...

    def propose(self, term: int, view: View) -> None:
        self.coordinator.accepted("here", term, view.generation)


@pytest.fixture
def office() -> Iterator[Callable[..., Office]]:
    made: list[Office] = []

    def make(world: int, **rules: Any) -> Office:
        made.append(Office(Rules(world, **rules)))
        return made[-1]

    yield make
    for each in made:
        each.close()


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Makes calls in threads of their own; returns what they return or raise."""
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def join_all(*members: AgentMembership) -> list[View]:
    return at_once(*(lambda m=m: m.join({}, Deadline(30)) for m in members))


def wait_for(check: Callable[[], object]) -> None:
    until = Deadline(30)
    while not check():
        until.check("it")
        time.sleep(0.005)


def test_a_whole_life(office: Callable[..., Office]) -> None:
    it = office(3)
    a, b, c = (it.member(i) for i in range(3))
    views = join_all(a, b, c)
    assert [v.rank for v in views] == [0, 1, 2]
    heard: list[frozenset[int]] = []
    a.on_loss(heard.append)
    it.desk.dismiss(1)
    it.coordinator.dead([1], "killed")
    wait_for(lambda: heard and c.gone())
    assert heard == [frozenset({1})]
    assert a.disturbed()
    views = at_once(
        lambda: a.regroup(Standing(1, 4), Deadline(30)),
        lambda: c.regroup(Standing(1, 5, "lost one"), Deadline(30)),
    )
    assert [(v.generation, v.members, v.rank, v.step) for v in views] == [
        (2, (0, 2), 0, 5),
        (2, (0, 2), 1, 5),
    ]
    assert a.gone() == frozenset()
    assert not a.disturbed()
    it.coordinator.stop()
    wait_for(lambda: a.change_wanted() == c.change_wanted() == "stop")
    c.leave("told to", Deadline(30))
    a.finish(Deadline(30))


def test_a_caller_without_the_token_gets_nowhere(office: Callable[..., Office]) -> None:
    it = office(1)
    with pytest.raises(WireError, match="token"):
        it.member(0, b"the token of another job")
    assert it.member(0).join({}, Deadline(30)).members == (0,)


def test_a_token_that_is_not_checked_is_noticed(
    office: Callable[..., Office], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("planaria.core.connection._same", lambda got, wanted: True)
    monkeypatch.setattr("planaria.core.connection._mac", lambda key, label, data: bytes(32))
    with pytest.raises(pytest.fail.Exception):
        test_a_caller_without_the_token_gets_nowhere(office)


@pytest.mark.parametrize("number", [99, -1, True, "0", None])
def test_members_that_are_not_expected_are_sent_away(
    office: Callable[..., Office], number: object
) -> None:
    it = office(1)
    connection = connect(*it.reception.address, token=TOKEN, deadline=Deadline(30), limits=LIMITS)
    hello = {"type": "hello", "kind": "member", "member": 99 if number == -1 else number}
    connection.send(hello, deadline=Deadline(30))
    with pytest.raises(WireError):
        connection.recv(Deadline(30))
    connection.close()


def test_an_id_is_used_once(office: Callable[..., Office]) -> None:
    """One that was given up for dead cannot come back, nor anybody in its name."""
    it = office(2)
    a, b = it.member(0), it.member(1)
    join_all(a, b)
    it.coordinator.dead([1], "killed")
    it.desk.dismiss(1)
    assert a.regroup(Standing(1, 3), Deadline(30)).members == (0,)
    with pytest.raises(CollectiveError):
        b.regroup(Standing(1, 9), Deadline(30))
    again = it.member(1)
    with pytest.raises(CollectiveError):
        again.join({}, Deadline(30))


def test_a_zombie_that_still_has_its_connection_is_told_to_stop(
    office: Callable[..., Office],
) -> None:
    it = office(2)
    a, b = it.member(0), it.member(1)
    join_all(a, b)
    it.coordinator.dead([1], "its agent said so")
    assert a.regroup(Standing(1, 3), Deadline(30)).step == 3
    with pytest.raises(StoppedError):
        b.regroup(Standing(1, 9), Deadline(30))
    view = it.coordinator.view
    assert view is not None
    assert (view.generation, view.members, view.step) == (2, (0,), 3)


@pytest.mark.parametrize(
    "message",
    [
        {"type": "nonsense"},
        {"type": "join"},
        {"type": "standing", "standing": {"generation": "one"}},
        {"type": "beat", "step": None},
    ],
    ids=lambda message: str(message["type"]),
)
def test_malformed_messages_end_the_connection(
    office: Callable[..., Office], message: dict[str, Any]
) -> None:
    it = office(1)
    connection = connect(*it.reception.address, token=TOKEN, deadline=Deadline(30), limits=LIMITS)
    connection.send({"type": "hello", "kind": "member", "member": 0}, deadline=Deadline(30))
    assert connection.recv(Deadline(30)).header["type"] == "welcome"
    connection.send(message, deadline=Deadline(30))
    with pytest.raises(WireError):
        connection.recv(Deadline(30))
    connection.close()


def test_an_agent_that_ends_is_noticed(office: Callable[..., Office]) -> None:
    it = office(2)
    a = it.member(0)
    waiting = threading.Thread(target=lambda: time.sleep(0.05) or it.desk.close())
    waiting.start()
    with pytest.raises(CollectiveError, match="lost its agent"):
        a.join({}, Deadline(30))
    waiting.join()


def test_too_little_time_is_said(office: Callable[..., Office]) -> None:
    it = office(2)
    with pytest.raises(TimeoutError, match="admitted"):
        it.member(0).join({}, Deadline(0.01))


def test_a_silent_member_is_fenced(office: Callable[..., Office]) -> None:
    it = office(2, hang_s=30.0)
    a, b = it.member(0), it.member(1)
    join_all(a, b)
    b._closed.set()  # its heart stops; its connection stays
    decider = it.coordinator._decider
    while not it.fenced:
        it.ahead_s += 5.0
        now = it.clock()
        # The other one is never silent for long.
        wait_for(lambda now=now: min(decider._ticked, decider._table[0].watched.heard) >= now)
    assert it.fenced == [1]


def test_a_process_alone_is_its_own_job() -> None:
    it = connect_member({})
    assert isinstance(it, Alone)
    view = it.join({}, Deadline(1))
    assert (view.members, view.rank, view.world_size) == ((0,), 0, 1)
    it.store(view, "a").set("k", "v")
    assert it.store(view, "a").get("k") == b"v"
    assert it.regroup(Standing(1, 7), Deadline(1)).step == 7
    assert it.change_wanted() is None


def test_a_fixed_job_can_only_restart() -> None:
    env = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    it = connect_member(env)
    assert isinstance(it, FixedMembership)
    with pytest.raises(CollectiveError, match="restart"):
        it.regroup(Standing(1, 7), Deadline(1))


@pytest.mark.parametrize(
    "env",
    [
        {"PLANARIA_ELASTIC": "somewhere", "PLANARIA_MEMBER": "0"},
        {"PLANARIA_ELASTIC": "127.0.0.1:1", "PLANARIA_MEMBER": "first"},
        {"WORLD_SIZE": "two"},
        {"WORLD_SIZE": "2", "RANK": "1"},
    ],
)
def test_a_bad_environment_is_said(env: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        connect_member(env)


def test_a_link_that_cannot_send_ends_for_both() -> None:
    """Whoever waits for an answer would wait for nothing."""
    ends = socket.socketpair()
    over = threading.Barrier(3)
    links = [
        Link(Connection(end, server=server, token=TOKEN, limits=LIMITS), lambda message: None,
             lambda: over.wait(30), name="test")
        for end, server in zip(ends, (True, False), strict=True)
    ]  # fmt: skip
    for link in links:
        link.start()
    links[0].send({"fact": float("nan")})
    over.wait(30)
    assert all(link.closed for link in links)
