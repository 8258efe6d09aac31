"""What agents say to each other: the coordinator's agent and another one, seen from both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from planaria.elastic.membership.coordinator import Coordinator
from planaria.elastic.membership.links import Link, Message
from planaria.elastic.membership.view import View, ids
from planaria.errors import WireError


class RemotePort:
    """An agent elsewhere, as the coordinator sees it; see `Port`.

    Args:
        name: The agent's name.
        link: To it.
        coordinator: The coordinator.
        on_started: Called with a member and the identity of its process.
    """

    def __init__(
        self,
        name: str,
        link: Link,
        coordinator: Coordinator,
        on_started: Callable[[int, list[Any]], object],
    ) -> None:
        self.heard = time.monotonic()
        self._name = name
        self._link = link
        self._coordinator = coordinator
        self._on_started = on_started

    def hear(self, message: Mapping[str, Any]) -> None:
        """Takes what the agent says.

        Raises:
            WireError: It is malformed.
        """
        self.heard = time.monotonic()
        coordinator = self._coordinator
        try:
            match message.get("type"):
                case "alive":
                    self._link.send({"type": "alive", "at": message["at"]})
                case "from":
                    coordinator.take(self._name, int(message["member"]), message["message"])
                case "dead":
                    coordinator.dead(ids(message["ids"]), str(message["how"]))
                case "accepted":
                    coordinator.accepted(self._name, message["term"], message["generation"])
                case "started":
                    self._on_started(int(message["member"]), list(message["identity"]))
                case "stop":
                    coordinator.stop()
                case "leave":
                    coordinator.leave(ids(message["ids"]))
                case other:
                    raise WireError(f"an agent's message of an unknown kind: {other!r}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise WireError(f"a malformed message of an agent: {error!r}") from None

    def deliver(self, member: int, message: Message) -> None:
        """Passes a message on to one of its members."""
        self._link.send({"type": "to", "member": member, "message": dict(message)})

    def fence(self, member: int, reason: str) -> None:
        """Has a member killed."""
        self._link.send({"type": "fence", "member": member, "reason": reason})

    def start(self, member: int, instead_of: int | None) -> None:
        """Has a process started."""
        self._link.send({"type": "start", "member": member, "instead_of": instead_of})

    def stop(self, reason: str) -> None:
        """Says that the job cannot go on."""
        self._link.send({"type": "stop", "reason": reason})

    def propose(self, term: int, view: View) -> None:
        """Asks it to remember a generation."""
        self._link.send({"type": "propose", "term": term, "view": view.to_json()})

    def over(self) -> None:
        """Says that the job is over."""
        self._link.send({"type": "over"})


class RemoteUpstream:
    """The coordinator elsewhere, as an agent sees it; see `Upstream`."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def take(self, member: int, message: Message) -> None:
        """Passes on what a member said."""
        self._link.send({"type": "from", "member": member, "message": dict(message)})

    def dead(self, ids: Iterable[int], how: str) -> None:
        """Says that processes are proven dead."""
        self._link.send({"type": "dead", "ids": sorted(ids), "how": how})

    def accepted(self, term: int, generation: int) -> None:
        """Says that a proposed generation is remembered."""
        self._link.send({"type": "accepted", "term": term, "generation": generation})

    def started(self, member: int, who: list[Any]) -> None:
        """Says which process a member is."""
        self._link.send({"type": "started", "member": member, "identity": who})

    def alive(self, now: float) -> None:
        """Says that this agent is alive, at a time on its own clock; the answer repeats it."""
        self._link.send({"type": "alive", "at": now})

    def stop(self) -> None:
        """Asks that the whole job stops."""
        self._link.send({"type": "stop"})

    def leave(self, ids: Iterable[int]) -> None:
        """Asks that members go."""
        self._link.send({"type": "leave", "ids": sorted(ids)})

    def close(self) -> None:
        """Hangs up."""
        self._link.close()
