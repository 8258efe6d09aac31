"""An agent's part in a job: its members on one side, the coordinator on the other."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

from planaria.elastic.membership.coordinator import Coordinator
from planaria.elastic.membership.desk import Desk, Reception, Welcome
from planaria.elastic.membership.links import Message
from planaria.elastic.membership.rules import Rules
from planaria.elastic.membership.view import View

#: A member's heartbeats come so many times in `hang_s`.
_BEATS = 20
_MOST_BEAT_S = 0.5


class Hands(Protocol):
    """What carries out on this machine what the coordinator wants. No method may block."""

    def start(self, member: int, instead_of: int | None) -> None:
        """Starts a process under an id, in the place of a lost one."""
        ...

    def fence(self, member: int, reason: str) -> None:
        """Kills a process; its end is reported by :meth:`Node.ended`."""
        ...

    def watch(self, member: int, threads: Collection[int]) -> None:
        """Learns which threads of a process live as long as it: their end tells of its own."""
        ...

    def stop(self, reason: str) -> None:
        """The job cannot go on. The members were told."""
        ...


class Upstream(Protocol):
    """The coordinator, as an agent sees it. No method may block for long."""

    def take(self, member: int, message: Message) -> None:
        """Passes on what a member said."""
        ...

    def dead(self, ids: Iterable[int], how: str) -> None:
        """Says that processes are proven dead."""
        ...

    def accepted(self, term: int, generation: int) -> None:
        """Says that a proposed generation is remembered."""
        ...

    def stop(self) -> None:
        """Asks that the whole job stops at the next step boundary."""
        ...

    def leave(self, ids: Iterable[int]) -> None:
        """Asks that members go at the next step boundary."""
        ...


class Node:
    """One agent.

    Args:
        name: The agent's name, unlike any other's.
        hands: Starts and ends processes.
        rules: The job's rules.
        token: The job's token.
        host: Address to listen on; anything but loopback needs a token.
        port: Port, 0 for a free one.
        more: Who else may call, by the kind of the hello.
    """

    def __init__(
        self,
        name: str,
        hands: Hands,
        rules: Rules,
        *,
        token: bytes | None,
        host: str = "127.0.0.1",
        port: int = 0,
        more: Mapping[str, Welcome] | None = None,
    ) -> None:
        self.name = name
        self.rules = rules
        self.members: set[int] = set()  # that live here, or have lived
        self.admitted: set[int] = set()  # of them, those that ever took part
        self.dead: dict[int, str] = {}
        self.promised = 0  # the newest term that this agent has taken part in
        self.accepted: tuple[int, View] | None = None
        self._hands = hands
        self._lock = threading.RLock()
        self._upstream: Upstream | None = None
        self.desk = Desk(
            self._take,
            beat_s=_beat_s(rules),
            expects=lambda member: member in self.members,
            on_threads=hands.watch,
        )
        self._reception = Reception(
            {"member": self.desk.welcome, **(more or {})}, token=token, host=host, port=port
        )
        self.address = self._reception.address

    def adopt(self, rules: Rules) -> None:
        """Goes by the rules of the job that it has joined."""
        self.rules = rules
        self.desk.beat_s = _beat_s(rules)

    def open(self) -> None:
        """Begins to receive members and agents."""
        self._reception.start()

    def close(self) -> None:
        """Hangs up on all."""
        self._reception.close()
        self.desk.close()

    def follow(self, upstream: Upstream | None) -> None:
        """Has a coordinator from now on, or none; it hears of what was not answered yet."""
        with self._lock:
            self._upstream = upstream
            dead = dict(self.dead)
        if upstream is not None:
            for member, how in dead.items():
                upstream.dead([member], how)
            self.desk.repeat()

    def ended(self, member: int, how: str) -> None:
        """One of the processes here has ended, which is proven; it may be said again."""
        self.desk.dismiss(member)
        with self._lock:
            self.dead[member] = how
            upstream = self._upstream
        if upstream is not None:
            upstream.dead([member], how)

    def want_stop(self) -> None:
        """Asks the whole job to save and stop."""
        if self._upstream is not None:
            self._upstream.stop()

    def want_leave(self) -> None:
        """Asks the members here to hand over and go."""
        if self._upstream is not None:
            self._upstream.leave(sorted(self.members - set(self.dead)))

    # What the coordinator asks -------------------------------------------------------------------

    def deliver(self, member: int, message: Message) -> None:
        """Passes a message on to a member that lives here."""
        if message.get("type") == "view":
            self.admitted.add(member)
        self.desk.deliver(member, message)

    def fence(self, member: int, reason: str) -> None:
        """Has a member killed."""
        self._hands.fence(member, reason)

    def start(self, member: int, instead_of: int | None) -> None:
        """Has a process started."""
        self.members.add(member)
        self._hands.start(member, instead_of)

    def stop(self, reason: str) -> None:
        """Hears that the job cannot go on."""
        self._hands.stop(reason)

    def propose(self, term: int, view: View) -> None:
        """Remembers a generation, unless a newer coordinator has been followed since."""
        with self._lock:
            if term < self.promised:
                return
            self.promised = term
            self.accepted = term, view
            upstream = self._upstream
        if upstream is not None:
            upstream.accepted(term, view.generation)

    def _take(self, member: int, message: Message) -> None:
        upstream = self._upstream
        if upstream is not None:
            upstream.take(member, message)


def _beat_s(rules: Rules) -> float:
    return min(rules.hang_s / _BEATS, _MOST_BEAT_S)


class Here:
    """The coordinator, in the same process."""

    def __init__(self, name: str, coordinator: Coordinator) -> None:
        self._name = name
        self._coordinator = coordinator

    def take(self, member: int, message: Message) -> None:
        """Passes on what a member said."""
        self._coordinator.take(self._name, member, message)

    def dead(self, ids: Iterable[int], how: str) -> None:
        """Says that processes are proven dead."""
        self._coordinator.dead(ids, how)

    def accepted(self, term: int, generation: int) -> None:
        """Says that a proposed generation is remembered."""
        self._coordinator.accepted(self._name, term, generation)

    def stop(self) -> None:
        """Asks that the whole job stops."""
        self._coordinator.stop()

    def leave(self, ids: Iterable[int]) -> None:
        """Asks that members go."""
        self._coordinator.leave(ids)
