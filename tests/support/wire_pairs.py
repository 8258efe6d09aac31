"""Pairs of connections, with nothing between them or with the test as the carrier."""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass

from planaria.core.connection import Connection, Limits
from planaria.core.deadline import Deadline

TOKEN = b"the token of this test's job"


def soon() -> Deadline:
    return Deadline(60)


def in_thread(fn: Callable[[], object]) -> Future:
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(fn())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


@dataclass
class Pair:
    """Two connections; what one sends, the test carries to the other as it likes."""

    client: Connection
    server: Connection
    from_client: socket.socket
    from_server: socket.socket

    def carry(self, upstream: bool, forge: Callable[[bytes], list[bytes]] = lambda b: [b]) -> bytes:
        """Carries what one side has sent so far; ``forge`` changes and splits it."""
        source, target = (self.from_client, self.from_server)[:: 1 if upstream else -1]
        source.settimeout(60)
        data = source.recv(1 << 20)
        for piece in forge(data):
            target.sendall(piece)
        return data

    def shake(self) -> None:
        for each in (self.client, self.server):
            in_thread(lambda each=each: each.handshake(soon()))
        self.carry_exactly(True, 48)
        self.carry_exactly(False, 80)
        self.carry_exactly(True, 32)
        self.client.handshake(soon())
        self.server.handshake(soon())

    def carry_exactly(self, upstream: bool, size: int) -> None:
        while size:
            size -= len(self.carry(upstream))


@contextmanager
def pair(
    token: bytes | None = TOKEN, server_token: bytes | None = TOKEN, limits: Limits | None = None
) -> Iterator[Pair]:
    ends = [*socket.socketpair(), *socket.socketpair()]
    client = Connection(ends[0], server=False, token=token, peer="server")
    server = Connection(ends[3], server=True, token=server_token, peer="client", limits=limits)
    try:
        yield Pair(client, server, ends[1], ends[2])
    finally:
        for end in ends:
            end.close()


@contextmanager
def joined(token: bytes | None = TOKEN, server_token: bytes | None = TOKEN) -> Iterator[Pair]:
    """A client and a server that are connected without anything between them."""
    a, b = socket.socketpair()
    with (
        closing(Connection(a, server=False, token=token, peer="server")) as client,
        closing(Connection(b, server=True, token=server_token, peer="client")) as server,
    ):
        yield Pair(client, server, a, b)
