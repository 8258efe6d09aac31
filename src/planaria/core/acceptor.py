"""Connections as they come in: one thread that accepts, and a thread for each connection."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from planaria.core.connection import Connection
from planaria.core.deadline import Deadline
from planaria.core.wire import Listener
from planaria.errors import DeadlineError, WireError

_PAUSE_S = 0.05


class Acceptor:
    """Accepts until it is closed; a failure (out of descriptors, or threads) does not end it."""

    def __init__(self, listener: Listener, serve: Callable[[Connection], None], name: str) -> None:
        """Starts to accept.

        Args:
            listener: Where connections come in; closed with this.
            serve: Runs with each connection, in a thread of its own. The handshake is still to be
                made. When it returns, the connection is its own to have closed, or kept.
            name: Of the threads.
        """
        self._listener, self._run, self._name = listener, serve, name
        self._lock = threading.Lock()
        self._open: set[Connection] = set()
        self._closed = False
        self.address = listener.address
        threading.Thread(target=self._accept, name=f"{name}-accept", daemon=True).start()

    def stop(self) -> None:
        """Accepts no more; connections that are open stay so."""
        with self._lock:
            self._closed = True
        self._listener.close()

    def close(self) -> None:
        """Accepts no more, and closes every connection that is being served."""
        self.stop()
        with self._lock:
            open_now = list(self._open)
        for connection in open_now:
            connection.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection = self._listener.accept(Deadline(3600.0))
            except DeadlineError:
                continue
            except WireError:
                if not self._closed:
                    time.sleep(_PAUSE_S)
                continue
            with self._lock:
                if self._closed:
                    connection.close()
                    return
                self._open.add(connection)
            name = f"{self._name}-{connection.peer}"
            thread = threading.Thread(
                target=self._serve, args=(connection,), name=name, daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # no more threads to be had: who called may come again
                self._end(connection)
                connection.close()
                time.sleep(_PAUSE_S)

    def _serve(self, connection: Connection) -> None:
        try:
            self._run(connection)
        finally:
            self._end(connection)

    def _end(self, connection: Connection) -> None:
        with self._lock:
            self._open.discard(connection)
