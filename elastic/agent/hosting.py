"""The agent that hosts the coordinator: which other agents it has, and what it tells them."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from planaria.core.deadline import Deadline
from planaria.elastic.agent.peers import RemotePort
from planaria.elastic.agent.roster import Entry, Pledge, proven_dead
from planaria.elastic.agent.stores import serve_store
from planaria.elastic.membership.coordinator import Coordinator
from planaria.elastic.membership.decision import Past
from planaria.elastic.membership.links import Link
from planaria.elastic.membership.quorum import differences
from planaria.elastic.membership.rules import Rules

_PAUSE_S = 0.02
_FAREWELL_S = 10.0


class Hosting:
    """The coordinator and its store, in this process, and the agents that follow it.

    Args:
        name: This agent's name.
        host: Address that the store listens on.
        rules: The job's rules.
        facts: What has to be equal on all agents.
        offer: What agents that join are given.
        roster: Who is where, this agent included; kept up to date here.
        on_event: Called with what happens.
        past: What is taken over from an earlier coordinator.
        term: Number of this coordinator.
    """

    def __init__(
        self,
        name: str,
        host: str,
        rules: Rules,
        *,
        facts: Mapping[str, Any],
        offer: Mapping[str, Any],
        roster: dict[str, Entry],
        on_event: Callable[[str, Mapping[str, Any]], object],
        past: Past | None,
        term: int,
    ) -> None:
        self._store, self.store_address = serve_store(host)
        self.coordinator = Coordinator(
            rules, self.store_address, on_note=self._note, past=past, term=term
        )
        self.roster = roster
        self._name, self._rules = name, rules
        self._facts, self._offer = dict(facts), dict(offer)
        self._on_event = on_event
        self._ports: dict[str, tuple[RemotePort, Link]] = {}
        self._lock = threading.RLock()
        self._closed = threading.Event()

    def objection(self, hello: Mapping[str, Any], pledge: Pledge) -> str | None:
        """Why an agent that calls cannot take part, or None."""
        if self.coordinator.over:
            return self.coordinator.stopped or "the run is done"
        wrong = differences(self._facts, hello.get("facts") or {})
        if wrong:
            return "; ".join(wrong)
        gone = set(self.coordinator.roster()["gone"])
        if pledge.members and pledge.members <= gone:
            return f"the job went on without members {sorted(pledge.members)}"
        return None

    def hire(self, pledge: Pledge, link: Link, nproc: int) -> None:
        """Has an agent take part, with the members that it has and with `nproc` new ones."""
        name, coordinator = pledge.name, self.coordinator
        port = RemotePort(
            name, link, coordinator, lambda member, who: self._note_started(name, member, who)
        )
        with self._lock:
            self._ports[name] = port, link
            ids = coordinator.new_ids(name, nproc) if nproc else []
            self.roster[name].members.update(dict.fromkeys(ids))
            link.send({
                "type": "hired", "ids": ids, "leader": self._name, "term": coordinator.term,
                "rules": dataclasses.asdict(self._rules), "offer": self._offer,
                "store": list(self.store_address),
            })  # fmt: skip
        if pledge.dead:
            coordinator.dead(pledge.dead)
        coordinator.attach(name, port, {*pledge.members, *ids})
        self._on_event("agent_joined", {"name": name, "members": sorted({*pledge.members, *ids})})
        self.share()

    def hear(self, name: str, message: Mapping[str, Any]) -> None:
        """Takes what an agent says.

        Raises:
            WireError: It is malformed.
        """
        with self._lock:
            port = self._ports.get(name)
        if port is not None:
            port[0].hear(message)

    def missing(self, name: str) -> Entry | None:
        """Where an agent is that was lost, None once it is back."""
        with self._lock:
            return None if name in self._ports else self.roster.get(name)

    def lost(self, name: str, link: Link) -> bool:
        """A link to an agent has ended; its processes may be proven dead from here.

        Returns:
            Whether it is out of reach and may be alive.
        """
        with self._lock:
            port = self._ports.get(name)
            if port is None or port[1] is not link:
                return False
            del self._ports[name]
            entry = self.roster.get(name)
        if self._closed.is_set():
            return False
        self._on_event("agent_lost", {"name": name})
        self.coordinator.detach(name)
        until = Deadline(self._rules.contact_s)
        while entry is not None and not until.expired and not self._closed.wait(_PAUSE_S):
            with self._lock:
                if name in self._ports:
                    return False
            dead = proven_dead(entry)
            if dead is not None:
                self.coordinator.dead(dead, "its agent is gone")
                return False
        return True

    def hang_up_on_silent(self, limit_s: float) -> None:
        """Ends the links to agents that have said nothing for so long."""
        now = time.monotonic()
        with self._lock:
            silent = [link for port, link in self._ports.values() if now - port.heard > limit_s]
        for link in silent:
            link.close()

    def share(self) -> None:
        """Tells the other agents who is where, for the day when this one is gone."""
        known = self.coordinator.roster()
        with self._lock:
            agents = {name: entry.to_json() for name, entry in self.roster.items()}
            for _, link in self._ports.values():
                link.send({"type": "roster", "agents": agents, "next_id": known["next_id"],
                           "facts": known["facts"]})  # fmt: skip

    def close(self) -> None:
        """Ends it; the other agents are told if the job is over, else they elect another."""
        self._closed.set()
        over = self.coordinator.over
        self.coordinator.close()
        with self._lock:
            ports, self._ports = list(self._ports.values()), {}
        until = Deadline(_FAREWELL_S)
        for port, link in ports:
            if over:
                port.over()
            link.drain(until)
        self._store = None

    def _note_started(self, name: str, member: int, who: list[Any]) -> None:
        with self._lock:
            self.roster[name].members[member] = who
        self.share()

    def _note(self, kind: str, content: Mapping[str, Any]) -> None:
        self._on_event(kind, content)
        if kind in ("generation", "asks"):
            self.share()
