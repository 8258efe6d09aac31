"""Messages between two processes of a job, both ways at any time, and none blocks its sender."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from planaria.core.connection import Connection, Limits
from planaria.core.deadline import Deadline
from planaria.errors import DeadlineError, WireError

logger = logging.getLogger(__name__)

LIMITS = Limits(header_bytes=1 << 20, payload_bytes=0, payloads=0)

Message = Mapping[str, Any]

# How long a peer may take a message; a reader looks up as often, whether anything comes or not.
_SEND_S = 10.0
_LOOK_UP_S = 60.0


class Link:
    """One side of a connection, with a thread that sends and one that receives.

    Args:
        connection: The connection; the link closes it.
        on_message: Called with each message, one at a time. What it raises as a `WireError` ends
            the link: the other side does not speak as it should.
        on_close: Called once when the link has ended, whoever ended it.
        name: For the threads.
    """

    def __init__(
        self,
        connection: Connection,
        on_message: Callable[[dict[str, Any]], object],
        on_close: Callable[[], object] = lambda: None,
        *,
        name: str,
    ) -> None:
        self._connection = connection
        self._on_message = on_message
        self._on_close = on_close
        self._name = name
        self._outbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._drained = threading.Event()
        self.threads: list[int] = []  # the kernel's ids of them

    def start(self) -> None:
        """Begins to send and receive."""
        for work, what in ((self._send, "send"), (self._receive, "receive")):
            thread = threading.Thread(target=work, name=f"{self._name}-{what}", daemon=True)
            thread.start()
            self.threads.append(thread.native_id or 0)

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return self._closed.is_set()

    def send(self, message: Message) -> None:
        """Sends a message soon; it is lost if the link ends before."""
        self._outbox.put(message)

    def drain(self, deadline: Deadline) -> None:
        """Closes the link once all was sent that is to be, or the deadline is over."""
        self._outbox.put(None)
        self._drained.wait(deadline.timeout())
        self.close()

    def close(self) -> None:
        """Ends the link. It may be called again."""
        self._connection.close()
        self._outbox.put(None)

    def _send(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._connection.send(message, deadline=Deadline(_SEND_S))
        except (WireError, DeadlineError) as error:
            if not self._closed.is_set():
                # The peer must not wait for what will never come.
                logger.info("%s has ended: %s", self._name, error)
                self._connection.close()
        self._drained.set()
        if self._closed.is_set():
            self._connection.close()

    def _receive(self) -> None:
        try:
            while True:
                try:
                    message = self._connection.recv(Deadline(_LOOK_UP_S))
                except DeadlineError:
                    continue  # a connection that broke in the middle of a message says so next
                self._on_message(message.header)
        except WireError:
            pass
        finally:
            self._closed.set()
            self.close()
            self._on_close()
