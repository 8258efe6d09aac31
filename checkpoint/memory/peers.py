"""Nodes reach each other over TCP: authenticated messages, one request at a time a connection."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from planaria import errors
from planaria.checkpoint.memory.memory import Member, Reply
from planaria.core.byte_stream import Buffer
from planaria.core.connection import Connection, Limits
from planaria.core.deadline import Deadline
from planaria.core.wire import connect, listen
from planaria.errors import DeadlineError, PlanariaError, WireError

LIMITS = Limits(header_bytes=64 << 20)
_IDLE_S = 3600.0
_ANSWER_S = 60.0


class TcpPeers:
    """Reaches other nodes. Thread-safe; calls that are under way have connections of their own.

    Args:
        token: The job's token.
    """

    def __init__(self, *, token: bytes) -> None:
        self._token = token
        self._addresses: dict[str, str] = {}
        self._idle: dict[str, list[Connection]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def know(self, members: Sequence[Member]) -> None:
        """See `Peers.know`."""
        with self._lock:
            for member in members:
                self._addresses[member.uuid] = member.address

    def call(
        self, uuid: str, request: dict[str, Any], payloads: Sequence[Buffer], deadline: Deadline
    ) -> Reply:
        """See `Peers.call`."""
        with self._lock:
            idle = self._idle.setdefault(uuid, [])
            connection = idle.pop() if idle else None
            address = self._addresses.get(uuid)
        if connection is not None:
            try:
                return self._ask(uuid, connection, request, payloads, deadline)
            except DeadlineError:
                raise
            except WireError:  # it may have been lost while nobody used it
                pass
        if address is None:
            raise WireError(f"node {uuid} is not known here")
        host, _, port = address.rpartition(":")
        try:
            connection = connect(
                host.strip("[]"), int(port), token=self._token, deadline=deadline, limits=LIMITS
            )
        except PlanariaError as error:
            raise type(error)(f"node {uuid}: {error}") from error
        return self._ask(uuid, connection, request, payloads, deadline)

    def _ask(
        self,
        uuid: str,
        connection: Connection,
        request: dict[str, Any],
        payloads: Sequence[Buffer],
        deadline: Deadline,
    ) -> Reply:
        try:
            connection.send(request, payloads, deadline=deadline)
            answer = connection.recv(deadline)
        except BaseException as error:
            connection.close()
            if isinstance(error, DeadlineError | WireError):
                kind = DeadlineError if isinstance(error, DeadlineError) else WireError
                raise kind(f"node {uuid}: {error}") from error
            raise
        with self._lock:
            if self._closed:
                connection.close()
            else:
                self._idle.setdefault(uuid, []).append(connection)
        if "error" in answer.header:
            name, message = answer.header["error"]
            known = getattr(errors, str(name), PlanariaError)
            is_ours = isinstance(known, type) and issubclass(known, PlanariaError)
            raise known(message) if is_ours else PlanariaError(message)
        return answer.header["answer"], answer.payloads

    def close(self) -> None:
        """Ends the connections that nobody uses."""
        with self._lock:
            self._closed = True
            idle = [each for found in self._idle.values() for each in found]
            self._idle.clear()
        for connection in idle:
            connection.close()


class PeerServer:
    """Answers the peers of a node, each connection in a thread of its own.

    Args:
        serve: Answers a request.
        host: Where to listen.
        port: Port, 0 for a free one.
        token: The job's token.

    Attributes:
        address: Host and port where it listens.
    """

    def __init__(
        self,
        serve: Callable[[dict[str, Any], Sequence[Buffer]], Reply],
        host: str,
        port: int,
        *,
        token: bytes,
    ) -> None:
        self._serve = serve
        self._listener = listen(host, port, token=token, limits=LIMITS)
        self.address = self._listener.address
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()
        self._closed = False
        threading.Thread(target=self._accept, name="planaria-peers", daemon=True).start()

    def close(self) -> None:
        """Ends all connections."""
        with self._lock:
            self._closed = True
            connections = list(self._connections)
        self._listener.close()
        for connection in connections:
            connection.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection = self._listener.accept(Deadline(_IDLE_S))
            except DeadlineError:
                continue
            except WireError:
                return
            threading.Thread(target=self._talk, args=(connection,), name="planaria-peer",
                             daemon=True).start()  # fmt: skip

    def _talk(self, connection: Connection) -> None:
        with self._lock:
            if self._closed:
                connection.close()
            self._connections.add(connection)
        try:
            connection.handshake(Deadline(_ANSWER_S))
            while True:
                try:
                    request = connection.recv(Deadline(_IDLE_S))
                except DeadlineError:
                    continue
                answer, payloads = self._answer(request.header, request.payloads)
                connection.send(answer, payloads, deadline=Deadline(_ANSWER_S))
        except PlanariaError:
            pass  # it is gone, or not of this job
        finally:
            connection.close()
            with self._lock:
                self._connections.discard(connection)

    def _answer(self, request: dict[str, Any], payloads: Sequence[Buffer]) -> Reply:
        try:
            answer, found = self._serve(request, payloads)
        except PlanariaError as error:
            return {"error": [type(error).__name__, str(error)]}, ()
        except (KeyError, TypeError, ValueError) as error:
            return {"error": ["WireError", f"a malformed request: {error!r}"]}, ()
        return {"answer": answer}, found
