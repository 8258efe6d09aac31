"""Where the members of one agent, and other agents, call: one listener, told apart by a hello."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from planaria.core.connection import Connection
from planaria.core.deadline import Deadline
from planaria.core.wire import listen
from planaria.elastic.membership.links import LIMITS, Link, Message
from planaria.elastic.membership.view import ids
from planaria.errors import DeadlineError, WireError

_HELLO_S = 30.0
_ACCEPT_S = 60.0

#: Called with the hello and the connection that it came over; whoever is called owns it.
Welcome = Callable[[dict[str, Any], Connection], object]


class Reception:
    """Listens, and hands each caller to whoever receives its kind.

    Args:
        welcome: By the `kind` of the hello.
        token: The job's token.
        host: Address to listen on; anything but loopback needs a token.
        port: Port, 0 for a free one.

    Raises:
        ConfigError: It cannot listen there.
    """

    def __init__(
        self,
        welcome: Mapping[str, Welcome],
        *,
        token: bytes | None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self._welcome = dict(welcome)
        self._listener = listen(host, port, token=token, limits=LIMITS)
        self.address = self._listener.address

    def start(self) -> None:
        """Begins to receive."""
        threading.Thread(target=self._accept, name="planaria-reception", daemon=True).start()

    def close(self) -> None:
        """Receives nobody any more."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept(Deadline(_ACCEPT_S))
            except DeadlineError:
                continue
            except WireError:
                return
            # A caller that is slow or not of this job holds up nobody else.
            threading.Thread(
                target=self._greet, args=(connection,), name="planaria-greeting", daemon=True
            ).start()

    def _greet(self, connection: Connection) -> None:
        try:
            hello = connection.recv(Deadline(_HELLO_S)).header
            welcome = self._welcome.get(str(hello.get("kind")))
            if hello.get("type") == "hello" and welcome is not None:
                welcome(hello, connection)
                return
        except (WireError, DeadlineError):
            pass
        connection.close()


class Desk:
    """The members that live with one agent.

    Args:
        take: Called with a member and each of its messages; raises WireError on a malformed one.
        beat_s: Seconds between the heartbeats of a member.
        expects: Whether a member of that id may come; nobody else's calls are taken.
        on_threads: Called with a member and the kernel's ids of threads that live as long as it.
    """

    def __init__(
        self,
        take: Callable[[int, Message], object],
        *,
        beat_s: float,
        expects: Callable[[int], bool] = lambda member: True,
        on_threads: Callable[[int, tuple[int, ...]], object] = lambda member, threads: None,
    ) -> None:
        self._take = take
        self._on_threads = on_threads
        self.beat_s = beat_s
        self._expects = expects
        self._lock = threading.Lock()
        self._links: dict[int, Link] = {}
        self._said: dict[int, Message] = {}  # what a member waits for an answer to
        self._closed_to: set[int] = set()

    def welcome(self, hello: Mapping[str, Any], connection: Connection) -> None:
        """Receives a member.

        Raises:
            WireError: It may not come: it is none of this agent's, or has been given up.
        """
        member = hello.get("member")
        if type(member) is not int or not self._expects(member):
            raise WireError(f"not a member that is expected here: {member!r}")
        link = Link(
            connection,
            lambda message: self._hear(member, message),
            lambda: self._hung_up(member),
            name=f"planaria-member-{member}",
        )
        with self._lock:
            if member in self._closed_to or member in self._links:
                raise WireError(f"member {member} was here already")
            self._links[member] = link
        link.send({"type": "welcome", "beat_s": self.beat_s})
        link.start()

    def deliver(self, member: int, message: Message) -> None:
        """Passes a message on to a member, if it is here."""
        with self._lock:
            link = self._links.get(member)
            if message.get("type") in ("view", "stopped", "refused"):
                self._said.pop(member, None)
        if link is not None:
            link.send(message)

    def repeat(self) -> None:
        """Says again what members wait for an answer to: the one who heard it is gone."""
        with self._lock:
            said = sorted(self._said.items())
        for member, message in said:
            self._take(member, message)

    def dismiss(self, member: int) -> None:
        """Hears nothing of a member any more: it is dead, or given up for dead."""
        with self._lock:
            self._closed_to.add(member)
            self._said.pop(member, None)
            link = self._links.pop(member, None)
        if link is not None:
            link.close()

    def close(self) -> None:
        """Hangs up on all."""
        with self._lock:
            links = list(self._links.values())
        for link in links:
            link.close()

    def _hear(self, member: int, message: dict[str, Any]) -> None:
        with self._lock:
            if member in self._closed_to:
                return
            if message.get("type") in ("join", "standing"):
                self._said[member] = message
        if message.get("type") != "threads":
            self._take(member, message)
            return
        try:
            threads = ids(message["ids"])
        except (KeyError, TypeError) as error:
            raise WireError(f"malformed ids of threads: {error!r}") from None
        self._on_threads(member, threads)

    def _hung_up(self, member: int) -> None:
        with self._lock:
            self._links.pop(member, None)
            self._said.pop(member, None)
            # Whoever comes back under this id cannot be told from a stranger.
            self._closed_to.add(member)
