"""A link to a server that stops in the middle of what a client sends, until it is told to go on."""

import contextlib
import socket
import threading
from collections.abc import Iterator

from checkpoints import WAIT_S


class SlowLink:
    """Forwards connections to a server on the loopback interface.

    Args:
        port: The server's.

    Attributes:
        port: Where clients connect to.
        reached: Set once a connection has been held.
    """

    def __init__(self, port: int) -> None:
        self._server = port
        self._after: int | None = None
        self.reached, self._go_on = threading.Event(), threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def held_after(self, nbytes: int) -> Iterator[None]:
        """A block in which no connection gets more through to the server, from where it begins."""
        self.reached.clear()
        self._go_on.clear()
        self._after = nbytes
        try:
            yield
        finally:
            self.go_on()

    def go_on(self) -> None:
        """Everything gets through again."""
        self._after = None
        self._go_on.set()

    def close(self) -> None:
        """Takes no more connections; those that are open end with their clients."""
        self.go_on()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server))
                for work, ends in ((self._up, (client, server)), (self._down, (server, client))):
                    threading.Thread(target=work, args=ends, daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        sent = 0
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                after = self._after
                sent = 0 if after is None else sent + len(data)
                if after is not None and sent > after:
                    self.reached.set()
                    self._go_on.wait(WAIT_S)
                server.sendall(data)
        _end(server)

    def _down(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                client.sendall(data)
        _end(client)


def _end(side: socket.socket) -> None:
    with contextlib.suppress(OSError):
        side.shutdown(socket.SHUT_WR)
