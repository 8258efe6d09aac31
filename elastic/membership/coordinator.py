"""Carries decisions out: takes what members say, tells them what was decided, keeps time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from planaria.core.points import point
from planaria.elastic.membership import points
from planaria.elastic.membership.decision import Decider, Past
from planaria.elastic.membership.links import Message
from planaria.elastic.membership.rules import (
    Action,
    Fence,
    Note,
    Publish,
    Rules,
    Start,
    Stop,
    Tell,
)
from planaria.elastic.membership.view import Standing, View
from planaria.elastic.membership.watching import Beat
from planaria.errors import WireError

_TICK_S = 0.05


class Port(Protocol):
    """An agent, as the coordinator sees it. No method may block."""

    def deliver(self, member: int, message: Message) -> None:
        """Passes a message on to one of its members."""
        ...

    def fence(self, member: int, reason: str) -> None:
        """Kills one of its members; the proof follows by :meth:`Coordinator.dead`."""
        ...

    def start(self, member: int, instead_of: int | None) -> None:
        """Starts a process under a new id, in the place of a lost one."""
        ...

    def stop(self, reason: str) -> None:
        """The job cannot go on; its members were told."""
        ...

    def propose(self, term: int, view: View) -> None:
        """Asks the agent to remember a generation before anybody acts on it."""
        ...


class Coordinator:
    """Decides for a job, in the process of one agent.

    Args:
        rules: Sizes, policy and budgets.
        store: Host and port of the store that generations share.
        on_note: Called with what is worth a line in a log: its kind, its content. It must be quick.
        past: The generation to take over, where an earlier coordinator is gone.
        term: Number of this coordinator among those of the job.
        clock: Seconds.
    """

    def __init__(
        self,
        rules: Rules,
        store: tuple[str, int],
        *,
        on_note: Callable[[str, Mapping[str, Any]], object] = lambda kind, content: None,
        past: Past | None = None,
        term: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rules = rules
        self.term = term
        self._clock = clock
        self._past = past if past is not None and past.generation else None
        self._store = store
        self._on_note = on_note
        self._lock = threading.RLock()
        self._decider = Decider(rules, clock(), past)
        self._ports: dict[str, Port] = {}
        self._home: dict[int, str] = {}  # member -> the agent it lives with
        self._proposal: View | None = None
        self._accepted: set[str] = set()
        self._proposing = False
        self._held: list[Action] = []  # what comes after a proposal
        self._closed = threading.Event()

    def start(self) -> None:
        """Begins to keep time."""
        threading.Thread(target=self._tick, name="planaria-coordinator", daemon=True).start()

    def close(self) -> None:
        """Decides nothing any more."""
        self._closed.set()

    # Agents --------------------------------------------------------------------------------------

    def attach(self, name: str, port: Port, members: Iterable[int] = ()) -> None:
        """An agent takes part, with members that it has already."""
        with self._lock:
            self._ports[name] = port
            for member in members:
                self._home[member] = name
                if self._past is not None:
                    # It may wait for an answer of a coordinator that is gone, or not know at all.
                    lost = {"generation": self._past.generation, "ids": sorted(self._past.dead)}
                    port.deliver(member, {"type": "lost", **lost})
            self._act(self._decider.reach(self._of(name), True, self._clock()))

    def detach(self, name: str) -> None:
        """An agent is out of reach, and its members with it; nothing is proven."""
        with self._lock:
            self._ports.pop(name, None)
            self._act(self._decider.reach(self._of(name), False, self._clock()))

    def new_ids(self, name: str, count: int) -> list[int]:
        """Ids for processes that an agent is about to start."""
        with self._lock:
            ids = self._decider.new_ids(count, self._clock())
            self._home.update(dict.fromkeys(ids, name))
            return ids

    def take(self, name: str, member: int, message: Message) -> None:
        """Takes a message of a member of an agent.

        Raises:
            WireError: It is malformed.
        """
        with self._lock:
            if self._home.setdefault(member, name) != name:
                raise WireError(f"member {member} lives with {self._home[member]}, not with {name}")
            self._act(self._taken(member, message))

    def dead(self, ids: Iterable[int], how: str = "") -> None:
        """Processes are proven dead."""
        with self._lock:
            self._act(self._decider.dead(ids, self._clock(), how))

    def accepted(self, name: str, term: int, generation: int) -> None:
        """An agent remembers a proposed generation."""
        with self._lock:
            proposal = self._proposal
            if proposal is None or (term, generation) != (self.term, proposal.generation):
                return
            self._accepted.add(name)
            if not self._proposing:
                self._conclude()

    def stop(self) -> None:
        """Has the whole job save and end at the next step boundary."""
        with self._lock:
            self._act(self._decider.stop(self._clock()))

    def leave(self, ids: Iterable[int]) -> None:
        """Has members go at the next step boundary."""
        with self._lock:
            self._act(self._decider.leave(ids, self._clock()))

    # What is known -------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Whether every member has finished, left or died, or the job was stopped."""
        with self._lock:
            return self._decider.over

    @property
    def stopped(self) -> str | None:
        """Why the job cannot go on, or None."""
        with self._lock:
            return self._decider.stopped

    @property
    def view(self) -> View | None:
        """The current generation, seen by its first member."""
        with self._lock:
            return self._decider.view

    def roster(self) -> dict[str, Any]:
        """What another agent needs to take over."""
        with self._lock:
            return {
                "term": self.term,
                "next_id": self._decider.next_id,
                "homes": {str(member): name for member, name in self._home.items()
                          if member not in self._decider.gone},
                "gone": sorted(self._decider.gone),
                "facts": self._decider.facts,
            }  # fmt: skip

    # ---------------------------------------------------------------------------------------------

    def _taken(self, member: int, message: Message) -> list[Action]:
        kind, now = message.get("type"), self._clock()
        if kind == "beat":
            return self._decider.beat(member, Beat.from_json(message), now)
        if kind == "join":
            facts = message.get("facts")
            if not isinstance(facts, dict):
                raise WireError("a joiner without facts")
            return self._decider.join(member, facts, now)
        if kind == "standing":
            standing = Standing.from_json(message.get("standing") or {})
            acts = self._decider.stand(member, standing, now)
            left = standing.leaving
            return [Tell(member, {"type": "left"}), *acts] if left else acts
        if kind == "bye":
            self._decider.hang_up(member)
            return []
        if kind == "finish":
            acts = self._decider.finish(member, now, complete=message.get("complete") is True)
            return [Tell(member, {"type": "finished"}), *acts]
        raise WireError(f"a message of an unknown kind: {kind!r}")

    def _of(self, name: str) -> list[int]:
        return [member for member, home in self._home.items() if home == name]

    def _tick(self) -> None:
        while not self._closed.wait(_TICK_S):
            with self._lock:
                self._act(self._decider.tick(self._clock()))

    def _act(self, actions: list[Action]) -> None:
        """Carries actions out in their order; what follows a proposal waits for its acceptance."""
        self._held += actions
        while self._held and self._proposal is None:
            action = self._held.pop(0)
            if isinstance(action, Publish):
                self._propose(action.view)
            else:
                self._do(action)
        # What kills and what reports need not wait.
        for action in [a for a in self._held if isinstance(a, Fence | Note)]:
            self._held.remove(action)
            self._do(action)

    def _do(self, action: Action) -> None:
        match action:
            case Tell(member, message):
                self._deliver(member, message)
            case Fence(member, reason):
                port = self._port(member)
                if port is not None:
                    port.fence(member, reason)
            case Start(member, instead_of):
                home = self._home.get(instead_of) if instead_of is not None else None
                name = home if home in self._ports else min(self._ports, default=None)
                if name is not None:
                    self._home[member] = name
                    self._ports[name].start(member, instead_of)
            case Stop(reason):
                self._on_note("stopped", {"reason": reason})
                for member in list(self._home):
                    self._deliver(member, {"type": "stopped", "reason": reason})
                for port in list(self._ports.values()):
                    port.stop(reason)
            case Note(kind, content):
                self._on_note(kind, content)
            case Publish():
                raise AssertionError("proposed, not done")

    def _propose(self, view: View) -> None:
        point(points.PROPOSED)
        self._proposal = replace(view, store=self._store)
        self._accepted = set()
        self._proposing = True
        for port in list(self._ports.values()):
            port.propose(self.term, self._proposal)
        self._proposing = False
        self._conclude()

    def _conclude(self) -> None:
        """Publishes the proposal once agents remember it with whom no other can be decided."""
        view = self._proposal
        if view is None or not self._decider.may_publish(
            member for member, home in self._home.items() if home in self._accepted
        ):
            return
        self._proposal = None
        self._decider.view = view
        self._on_note("generation", view.to_json())
        for member in view.members:
            self._deliver(member, {"type": "view", "view": view.seen_by(member).to_json()})
        self._act([])

    def _deliver(self, member: int, message: Message) -> None:
        port = self._port(member)
        if port is not None:
            port.deliver(member, message)

    def _port(self, member: int) -> Port | None:
        return self._ports.get(self._home.get(member, ""))
