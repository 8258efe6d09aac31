"""Links between publisher and subscriber that the test cuts, slows or corrupts."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator


class Link:
    """Carries bytes to a server; the test changes what goes downstream (to the receiver)."""

    def __init__(self, port: int) -> None:
        self.forge: Callable[[bytes], bytes] = lambda data: data
        self.carried = 0
        self._port = port
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Ends all connections that are open."""
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                return
            self._open += [near, far]
            for source, target, down in ((near, far, False), (far, near, True)):
                threading.Thread(
                    target=self._carry, args=(source, target, down), daemon=True
                ).start()

    def _carry(self, source: socket.socket, target: socket.socket, down: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if down:
                    data = self.forge(data)
                    self.carried += len(data)
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def link(url: str) -> Iterator[Link]:
    made = Link(int(url.rpartition(":")[2]))
    try:
        yield made
    finally:
        made.close()
