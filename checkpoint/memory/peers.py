"""Peers over TCP: authenticated connections that are used again, and the server at their end."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

from planaria.checkpoint.memory.links import Serve
from planaria.checkpoint.memory.memory import Member, Reply
from planaria.core import rpc, wire
from planaria.core.acceptor import Acceptor
from planaria.core.byte_stream import Buffer
from planaria.core.connection import Connection
from planaria.core.deadline import Deadline
from planaria.errors import (
    ConfigError,
    DeadlineError,
    PeerClosedError,
    PlanariaError,
    SaveFailedError,
    WireError,
)

# A connection that nobody uses for so long is closed by the server.
_IDLE_S = 600.0
# So many unused connections are kept for each node.
_KEPT = 16


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of ``host:port``, an IPv6 host in brackets.

    Raises:
        ConfigError: It is not of this form.
    """
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()):
        raise ConfigError(f"{address!r} is not of the form host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


class TcpPeers:
    """Calls nodes over TCP; see `Peers`. Connections are made when needed, and used again."""

    def __init__(self, *, token: bytes | None = None) -> None:
        """Knows nobody yet.

        Args:
            token: The job's token.
        """
        self._token = token
        self._lock = threading.Lock()
        self._addresses: dict[str, str] = {}
        self._unused: dict[str, list[Connection]] = {}
        self._used: set[Connection] = set()
        self._closed = False

    def know(self, members: Sequence[Member]) -> None:
        """See `Peers.know`; a member without an address is left out.

        Unused connections to all others are closed: of nodes that come and go none must stay.
        """
        uuids = {member.uuid for member in members}
        with self._lock:
            for member in members:
                if member.address:
                    self._addresses[member.uuid] = member.address
            others = [self._unused.pop(uuid) for uuid in self._unused.keys() - uuids]
        for connection in chain(*others):
            connection.close()

    def call(
        self,
        uuid: str,
        request: dict[str, Any],
        payloads: Sequence[Buffer],
        deadline: Deadline,
        into: Sequence[memoryview[Any]] = (),
    ) -> Reply:
        """See `Peers.call`."""
        try:
            return self._call(uuid, request, payloads, deadline, into)
        except PlanariaError as error:
            raise type(error)(f"node {uuid}: {error}") from error

    def close(self) -> None:
        """Closes all connections; calls under way end with WireError."""
        with self._lock:
            self._closed = True
            every = [*self._used, *(c for unused in self._unused.values() for c in unused)]
            self._unused.clear()
        for connection in every:
            connection.close()

    def _call(
        self,
        uuid: str,
        request: dict[str, Any],
        payloads: Sequence[Buffer],
        deadline: Deadline,
        into: Sequence[memoryview[Any]],
    ) -> Reply:
        while True:
            connection, fresh = self._take(uuid, deadline)
            try:
                message = rpc.call(
                    connection,
                    request,
                    payloads,
                    deadline=deadline,
                    otherwise=SaveFailedError,
                    into=into,
                )
            except PeerClosedError:
                self._drop(connection)
                # The node may have closed it while it was not used; all requests can be repeated.
                if fresh or self._closed:
                    raise
            except (WireError, DeadlineError) as error:
                # Also the other side may have run out of time; then the connection is still good.
                self._drop(connection)
                if isinstance(error, DeadlineError) or fresh or self._closed:
                    raise
            except PlanariaError:
                self._give_back(uuid, connection)
                raise
            except BaseException:
                self._drop(connection)
                raise
            else:
                self._give_back(uuid, connection)
                return message.header, message.payloads

    def _take(self, uuid: str, deadline: Deadline) -> tuple[Connection, bool]:
        with self._lock:
            if self._closed:
                raise WireError("this node was closed")
            if self._unused.get(uuid):
                connection = self._unused[uuid].pop()
                self._used.add(connection)
                return connection, False
            address = self._addresses.get(uuid)
        if address is None:
            raise WireError("its address is not known")
        host, port = parse_address(address)
        made = wire.connect(host, port, token=self._token, limits=rpc.LIMITS, deadline=deadline)
        with self._lock:
            self._used.add(made)
            if not self._closed:
                return made, True
        self._drop(made)
        raise WireError("this node was closed")

    def _give_back(self, uuid: str, connection: Connection) -> None:
        with self._lock:
            unused = self._unused.setdefault(uuid, [])
            if not self._closed and len(unused) < _KEPT:
                self._used.discard(connection)
                unused.append(connection)
                return
        self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        with self._lock:
            self._used.discard(connection)
        connection.close()


class PeerServer:
    """Answers the peers of a node. One thread a connection: who is slow holds up nobody else."""

    def __init__(
        self,
        serve: Serve,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        token: bytes | None = None,
        answering: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """Starts to listen.

        Args:
            serve: Answers requests: `SnapshotNode.serve`.
            host: Address to bind to; anything but loopback needs a token.
            port: Port, or 0 for a free one.
            token: The job's token.
            answering: `SnapshotNode.answering`, with which bytes are sent from where they lie;
                without it each answer is copied first.

        Raises:
            ConfigError: The address cannot be used, or needs a token.
        """
        self._answer, self._answering = serve, answering
        listener = wire.listen(host, port, token=token, limits=rpc.LIMITS)
        self._acceptor = Acceptor(listener, self._serve, "planaria-memory")

    @property
    def address(self) -> str:
        """Where it listens, ``host:port``; the port is the real one."""
        host, port = self._acceptor.address
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._acceptor.address[1]

    def close(self) -> None:
        """Stops listening and ends all connections."""
        self._acceptor.close()

    def _serve(self, connection: Connection) -> None:
        try:
            with contextlib.suppress(PlanariaError, OSError):
                connection.handshake(Deadline(30.0))
                rpc.serve(
                    connection,
                    self._answer,
                    lambda: Deadline(_IDLE_S),
                    answering=self._answering,
                )
        finally:
            connection.close()
