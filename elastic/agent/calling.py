"""Calling another agent: to join its job, to come back, or to have it take over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from planaria.core.deadline import Deadline
from planaria.core.wire import connect
from planaria.elastic.agent.roster import Entry
from planaria.elastic.membership.links import LIMITS, Link
from planaria.errors import WireError


@dataclass
class Answer:
    """What the other agent says.

    Attributes:
        kind: "hired", "refused", "elsewhere", or "silent" if it took too long.
        message: All of it.
        asked: When the call was made: the other has heard of this agent since.
        link: To the agent, if this one is hired; nothing more is heard before :meth:`open`.
    """

    kind: str
    message: Mapping[str, Any] = field(default_factory=dict)
    link: Link | None = None
    asked: float = field(default_factory=time.monotonic)
    _opened: threading.Event = field(default_factory=threading.Event)

    @property
    def reason(self) -> str:
        """Why this agent was refused."""
        return str(self.message.get("reason", ""))

    @property
    def address(self) -> tuple[str, int] | None:
        """Where to ask instead."""
        found = self.message.get("address")
        return None if found is None else (str(found[0]), int(found[1]))

    def open(self) -> None:
        """Lets what comes after the answer through."""
        self._opened.set()


@dataclass(frozen=True)
class Allegiance:
    """Whom an agent follows.

    Attributes:
        term: The newest term that it has taken part in.
        leader: The coordinator's agent, by name, None while it has none.
        entry: Who and where that is.
    """

    term: int
    leader: str | None = None
    entry: Entry | None = None

    def to_json(self) -> dict[str, Any]:
        """What `ask` reads."""
        entry = None if self.entry is None else self.entry.to_json()
        return {"term": self.term, "leader": self.leader, "entry": entry}


def ask(address: tuple[str, int], *, token: bytes | None, deadline: Deadline) -> Allegiance:
    """Asks an agent whom it follows.

    Raises:
        WireError: It does not answer, or not as it should.
        DeadlineError: It did not in time.
    """
    with connect(*address, token=token, deadline=deadline, limits=LIMITS) as connection:
        connection.send({"type": "hello", "kind": "probe"}, deadline=deadline)
        answer = connection.recv(deadline).header
    term, leader, entry = answer.get("term"), answer.get("leader"), answer.get("entry")
    if type(term) is not int:
        raise WireError(f"not a term: {term!r}")
    if leader is None or entry is None:
        return Allegiance(term)
    return Allegiance(term, str(leader), Entry.from_json(entry))


def call_agent(
    address: tuple[str, int],
    hello: Mapping[str, Any],
    *,
    token: bytes | None,
    deadline: Deadline,
    on_message: Callable[[Mapping[str, Any]], object],
    on_close: Callable[[], object],
) -> Answer:
    """Calls an agent and waits for its answer.

    Args:
        address: Where it listens.
        hello: Who calls.
        token: The job's token.
        deadline: When to give up; an agent that is about to take over says "wait" meanwhile.
        on_message: Called with what comes later, if this agent is hired.
        on_close: Called when the link ends, if this agent is hired.

    Raises:
        WireError: It does not answer, or is not of this job.
        DeadlineError: It did not in time.
    """
    answered = threading.Event()
    answer = Answer("silent")

    def hear(message: dict[str, Any]) -> None:
        if answered.is_set():
            answer._opened.wait(deadline.budget)
            on_message(message)
        elif message.get("type") != "wait":
            answer.kind, answer.message = str(message.get("type")), message
            answered.set()

    def ended() -> None:
        hired = answered.is_set() and answer.kind == "hired"
        answered.set()
        if hired:
            answer._opened.wait(deadline.budget)
            on_close()

    connection = connect(*address, token=token, deadline=deadline, limits=LIMITS)
    connection.send(hello, deadline=deadline)
    link = Link(connection, hear, ended, name="planaria-leader")
    link.start()
    answered.wait(deadline.timeout())
    if answer.kind == "hired":
        answer.link = link
    else:
        link.close()
    return answer
