"""A job as one of its agents takes part in it: hosting the coordinator, following it, or electing.

The first agent hosts the coordinator; others call it. Whoever loses it turns to the agents in an
order that all know: to the coordinator again, then to those with the lowest members. An agent that
comes upon itself waits for others to turn to it, and becomes the coordinator once they are a
quorum of the newest generation that any of them was asked to remember. A generation is published
only after a quorum remembers it, so no two sides ever go on.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from planaria.core.connection import Connection
from planaria.core.deadline import Deadline
from planaria.core.points import point
from planaria.core.procs import identity
from planaria.elastic.agent.calling import Allegiance, Answer, ask, call_agent
from planaria.elastic.agent.hosting import Hosting
from planaria.elastic.agent.node import Hands, Here, Node
from planaria.elastic.agent.peers import RemoteUpstream
from planaria.elastic.agent.roster import Entry, Pledge, newest, order, proven_dead, takeover
from planaria.elastic.membership import points
from planaria.elastic.membership.decision import Past
from planaria.elastic.membership.links import Link
from planaria.elastic.membership.rules import Rules
from planaria.elastic.membership.view import View
from planaria.errors import ConfigError, PlanariaError, StoppedError, WireError

_CALL_S = 5.0
_PAUSE_S = 0.02
_PROBE_S = 0.5
#: Of one node.
_MOST_RANKS = 1 << 16


class Job:
    """What an agent knows of its job, and what it does for it. Arguments as for `ElasticAgent`."""

    def __init__(
        self,
        name: str,
        hands: Hands,
        rules: Rules,
        *,
        token: bytes | None,
        listen: tuple[str, int],
        join: tuple[str, int] | None,
        facts: Mapping[str, Any],
        offer: Mapping[str, Any],
        adopt: Callable[[Mapping[str, Any]], object],
        on_event: Callable[[str, Mapping[str, Any]], object],
    ) -> None:
        self.rules = rules
        self.store_address: tuple[str, int] = ("", 0)
        self.leaves = False
        self._name, self._hands, self._token, self._join = name, hands, token, join
        self._facts, self._offer, self._adopt = dict(facts), dict(offer), adopt
        self._on_event = on_event
        self._host = listen[0]
        self._hosting: Hosting | None = None
        self._upstream: RemoteUpstream | None = None
        self._leader: str | None = None  # the agent of the coordinator that was followed last
        self._roster: dict[str, Entry] = {}
        self._next_id = 0
        self._member_facts: Mapping[str, Any] | None = None
        self._electing = False
        self._pledges: dict[str, tuple[Pledge, Link]] = {}
        self._lease = 0.0  # until when nobody goes on without this agent
        self._echoed = 0.0
        self._proven: frozenset[int] = frozenset()
        self._over = False
        self._stopped: str | None = None
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self.node = Node(
            name, hands, rules, token=token, host=listen[0], port=listen[1],
            more={"agent": self._welcome, "probe": self._tell_term},
        )  # fmt: skip
        self._own = Entry(self.node.address, list(identity()))

    @property
    def address(self) -> tuple[str, int]:
        """Where members and agents call."""
        return self.node.address

    def open(self, nproc: int) -> list[int]:
        """Founds the job, or joins it; returns the ids of the ranks to start here.

        Raises:
            ConfigError: The job refuses this agent: its facts differ.
            PlanariaError: There is no job to join.
        """
        self.node.open()
        if self._join is None:
            ids = self._host_job(None, 1).coordinator.new_ids(self._name, nproc)
            self.node.members.update(ids)
        else:
            ids = self._join_job(self._join, nproc)
        self._own.members.update(dict.fromkeys(ids))
        threading.Thread(target=self._keep_contact, name="planaria-contact", daemon=True).start()
        return ids

    def started(self, member: int, pid: int) -> None:
        """A rank was started here."""
        who = list(identity(pid))
        with self._lock:
            self._own.members[member] = who
            upstream, hosting = self._upstream, self._hosting
        if upstream is not None:
            upstream.started(member, who)
        if hosting is not None:
            hosting.share()

    def leave(self) -> None:
        """Has the members here hand over and go, and this agent after them."""
        self.leaves = True
        self.node.want_leave()

    @property
    def over(self) -> bool:
        """Whether there is nothing left to be done for the job here."""
        hosting = self._hosting
        return self._over or (hosting is not None and hosting.coordinator.over)

    @property
    def stopped(self) -> str | None:
        """Why the job cannot go on, or None."""
        hosting = self._hosting
        return self._stopped or (hosting.coordinator.stopped if hosting is not None else None)

    def close(self) -> None:
        """Ends this agent's part; the coordinator's agent tells the others before."""
        self._closed.set()
        with self._lock:
            hosting, upstream = self._hosting, self._upstream
        if hosting is not None:
            hosting.close()
        if upstream is not None:
            upstream.close()
        self.node.close()

    # Hosting -------------------------------------------------------------------------------------

    def _host_job(self, past: Past | None, term: int) -> Hosting:
        hosting = Hosting(
            self._name, self._host, self.rules, facts=self._facts, offer=self._offer,
            roster={**self._roster, self._name: self._own}, on_event=self._on_event, past=past,
            term=term,
        )  # fmt: skip
        with self._lock:
            self._hosting, self._upstream = hosting, None
            self._leader = self._name
            self.store_address = hosting.store_address
            self.node.promised = term
        hosting.coordinator.attach(self._name, self.node, self._living())
        self.node.follow(Here(self._name, hosting.coordinator))
        hosting.coordinator.start()
        return hosting

    def _welcome(self, hello: Mapping[str, Any], connection: Connection) -> None:
        """Another agent calls: to join, to come back, or to have this one take over."""
        pledge = Pledge.from_json(hello.get("pledge") or {})
        entry = Entry.from_json(hello.get("entry") or {})
        nproc = hello.get("nproc", 0)
        if type(nproc) is not int or not 0 <= nproc < _MOST_RANKS:
            raise WireError(f"an agent with {nproc!r} ranks")
        with self._lock:
            hosting = self._hosting
        if hosting is not None and pledge.term > hosting.coordinator.term:
            self._step_down("a newer coordinator was elected")
            hosting = None
        if hosting is not None and (why := hosting.objection(hello, pledge)):
            self._dismiss(connection, {"type": "refused", "reason": why})
            return
        address: tuple[str, int] | None = None
        link = Link(
            connection,
            lambda message: self._hear_agent(pledge.name, message),
            lambda: self._lost_agent(pledge.name, link),
            name="planaria-agent",
        )
        with self._lock:
            # An agent that has just taken over may do so only once it has seen all pledges.
            hosting = self._hosting
            if hosting is None and not self._electing:
                leader = self._roster.get(self._leader or "")
                address = None if leader is None else leader.address
            elif hosting is None:
                self._roster[pledge.name] = entry
                self._pledges[pledge.name] = pledge, link
                link.send({"type": "wait"})
        if hosting is not None:
            hosting.roster[pledge.name] = entry
            link.start()
            hosting.hire(pledge, link, nproc)
        elif pledge.name in self._pledges:
            link.start()
        else:
            self._dismiss(connection, {"type": "elsewhere", "address": address})

    def _dismiss(self, connection: Connection, message: Mapping[str, Any]) -> None:
        connection.send(message, deadline=Deadline(_CALL_S))
        connection.close()

    def _hear_agent(self, name: str, message: Mapping[str, Any]) -> None:
        hosting = self._hosting
        if hosting is not None:
            hosting.hear(name, message)

    def _lost_agent(self, name: str, link: Link) -> None:
        with self._lock:
            if name in self._pledges and self._pledges[name][1] is link:
                del self._pledges[name]
            hosting = self._hosting
        if hosting is not None and hosting.lost(name, link):
            self._probe(name, hosting)

    def _tell_term(self, hello: Mapping[str, Any], connection: Connection) -> None:
        """A coordinator that has lost this agent asks whether there is a newer one."""
        with self._lock:
            leader = self._leader if self._hosting or self._upstream else None
            entry = None if leader is None else self._roster.get(leader)
            if leader == self._name:
                entry = self._own
            said = Allegiance(self.node.promised, leader, entry)
        self._dismiss(connection, said.to_json())

    def _learn(self, said: Allegiance) -> None:
        """Turns to the coordinator that another agent follows, at the next occasion."""
        with self._lock:
            if said.leader is not None and said.entry is not None and said.leader != self._name:
                self._leader = said.leader
                self._roster[said.leader] = said.entry

    def _probe(self, name: str, hosting: Hosting) -> None:
        """Asks an agent that was lost, until it is back, whether it follows another by now."""
        while not self._closed.wait(_PROBE_S) and self._hosting is hosting:
            entry = hosting.missing(name)
            if entry is None:
                return
            try:
                said = ask(entry.address, token=self._token, deadline=Deadline(_CALL_S))
            except PlanariaError:
                continue
            if said.term > hosting.coordinator.term:
                self._learn(said)
                self._step_down("a newer coordinator was elected while this one was out of reach")

    def _step_down(self, why: str) -> None:
        with self._lock:
            hosting, self._hosting = self._hosting, None
        if hosting is None:
            return
        hosting.close()
        self._on_event("stepped_down", {"reason": why})
        self.node.follow(None)
        self._begin_election()

    # Following -----------------------------------------------------------------------------------

    def _join_job(self, address: tuple[str, int], nproc: int) -> list[int]:
        until = Deadline(self.rules.join_s)
        while True:
            answer = self._call(address, until, nproc)
            if answer.kind == "hired":
                break
            if answer.kind == "refused":
                raise ConfigError(f"the job at {address[0]}:{address[1]} refuses: {answer.reason}")
            if answer.address is not None:
                address = answer.address
            until.check(f"the job at {address[0]}:{address[1]}")
            time.sleep(_PAUSE_S)
        record = answer.message
        self.rules = Rules(**record["rules"])
        self.node.adopt(self.rules)
        self._offer = dict(record["offer"])
        self._adopt(self._offer)
        ids = [int(each) for each in record["ids"]]
        self.node.members.update(ids)
        self._follow(answer)
        return ids

    def _call(self, address: tuple[str, int], until: Deadline, nproc: int = 0) -> Answer:
        hello = {
            "type": "hello", "kind": "agent", "nproc": nproc, "facts": self._facts,
            "pledge": self._pledge().to_json(), "entry": self._own.to_json(),
        }  # fmt: skip
        return call_agent(
            address, hello, token=self._token, deadline=until.sub(_CALL_S),
            on_message=self._hear_leader, on_close=self._lost_leader,
        )  # fmt: skip

    def _follow(self, answer: Answer) -> None:
        assert answer.link is not None
        record = answer.message
        with self._lock:
            self._upstream = RemoteUpstream(answer.link)
            self._leader = str(record["leader"])
            self.node.promised = max(self.node.promised, int(record["term"]))
            host, port = record["store"]
            self.store_address = str(host), int(port)
            self._echoed = time.monotonic()
            self._lease = answer.asked + self.rules.contact_s
            self._electing = False
            upstream = self._upstream
            started = dict(self._own.members)
        for member, who in started.items():
            if who is not None:
                upstream.started(member, who)
        self.node.follow(upstream)
        self._on_event("follows", {"leader": self._leader, "term": int(record["term"])})
        answer.open()

    def _hear_leader(self, message: Mapping[str, Any]) -> None:
        try:
            match message.get("type"):
                case "alive":
                    with self._lock:
                        self._echoed = time.monotonic()
                        self._lease = float(message["at"]) + self.rules.contact_s
                case "to":
                    self.node.deliver(int(message["member"]), message["message"])
                    self._note_view(message["message"])
                case "fence":
                    self.node.fence(int(message["member"]), str(message["reason"]))
                case "start":
                    self._own.members[int(message["member"])] = None
                    self.node.start(int(message["member"]), message["instead_of"])
                case "stop":
                    self._stopped, self._over = str(message["reason"]), True
                    self.node.stop(str(message["reason"]))
                case "propose":
                    self.node.propose(int(message["term"]), View.from_json(message["view"]))
                case "roster":
                    agents = {n: Entry.from_json(e) for n, e in message["agents"].items()}
                    with self._lock:
                        self._roster = agents
                        self._next_id = int(message["next_id"])
                        self._member_facts = message["facts"]
                case "over":
                    self._over = True
                case other:
                    raise WireError(f"the coordinator's message of an unknown kind: {other!r}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise WireError(f"a malformed message of the coordinator: {error!r}") from None

    def _note_view(self, message: Mapping[str, Any]) -> None:
        if message.get("type") == "view":
            view = View.from_json(message["view"])
            self.store_address = view.store
            if view.me == min(view.members):
                self._on_event("generation", view.to_json())

    def _lost_leader(self) -> None:
        if self._closed.is_set() or self._over:
            return
        with self._lock:
            if self._upstream is None:
                return
            self._upstream = None
        self.node.follow(None)
        self._on_event("leader_lost", {"leader": self._leader})
        self._begin_election()

    def _keep_contact(self) -> None:
        """Says that this agent lives, and notices when others fall silent."""
        contact = self.rules.contact_s
        while not self._closed.wait(min(contact / 10, 1.0)):
            now = time.monotonic()
            with self._lock:
                upstream, echoed, hosting = self._upstream, self._echoed, self._hosting
            if upstream is not None:
                upstream.alive(now)
                if now - echoed > contact / 2:
                    upstream.close()
            if hosting is not None:
                hosting.hang_up_on_silent(contact / 2)

    # Electing ------------------------------------------------------------------------------------

    def _begin_election(self) -> None:
        with self._lock:
            if self._electing or self._closed.is_set():
                return
            self._electing = True
        threading.Thread(target=self._elect, name="planaria-election", daemon=True).start()

    def _elect(self) -> None:
        until = Deadline(self.rules.recovery_s)
        try:
            while not self._closed.is_set():
                if until.expired:
                    raise StoppedError(
                        f"no quorum within {self.rules.recovery_s:g} s: the coordinator is out of "
                        "reach, and too few of the other agents are in reach"
                    )
                if self._turn_to_others(until):
                    return
                self._closed.wait(_PAUSE_S)
        except PlanariaError as error:
            self._give_up(str(error))

    def _turn_to_others(self, until: Deadline) -> bool:
        """Goes through the agents once; returns whether there is a coordinator now."""
        with self._lock:
            roster, leader = dict(self._roster), self._leader
        roster[self._name] = self._own
        comes_after = False
        for name in order(roster, newest([self._pledge()]), leader):
            dead = proven_dead(roster[name]) if name != self._name else None
            if dead is not None:
                # Later others may have gone on without this side, in which those now dead took
                # part: only as long as that cannot be does their death count.
                if time.monotonic() < self._lease:
                    self._proven |= dead
                continue
            if name == self._name:
                if self._take_over():
                    return True
                comes_after = True
                continue
            if comes_after:
                # They turn to this one, unless they have another coordinator by now.
                with contextlib.suppress(PlanariaError):
                    deadline = until.sub(_CALL_S)
                    self._learn(ask(roster[name].address, token=self._token, deadline=deadline))
                continue
            try:
                answer = self._call(roster[name].address, until)
            except PlanariaError:
                continue
            if answer.kind == "hired":
                self._follow(answer)
                return True
            if answer.kind == "refused":
                raise StoppedError(answer.reason)
        return False

    def _take_over(self) -> bool:
        with self._lock:
            pledges = {name: each for name, (each, _) in self._pledges.items()}
            found = takeover(
                [self._pledge(), *pledges.values()], self._proven, self._next_id,
                self._member_facts,
            )  # fmt: skip
            if found is None:
                return False
            links = {name: self._pledges.pop(name)[1] for name in pledges}
        term, past = found
        hosting = self._host_job(past, term)
        with self._lock:
            self._electing = False
        self._on_event("elected", {"leader": self._name, "term": term, "dead": sorted(past.dead)})
        point(points.ELECTED)
        for name, link in links.items():
            hosting.hire(pledges[name], link, 0)
        return True

    def _give_up(self, reason: str) -> None:
        self._stopped, self._over = reason, True
        self._on_event("stopped", {"reason": reason})
        for member in self._living():
            self.node.deliver(member, {"type": "stopped", "reason": reason})
        self.node.stop(reason)

    def _pledge(self) -> Pledge:
        node = self.node
        return Pledge(
            self._name, self._living(), node.promised, node.accepted, frozenset(node.dead)
        )

    def _living(self) -> frozenset[int]:
        return frozenset(self.node.members - set(self.node.dead))
