"""Exact reads and whole writes on a stream socket, each within a deadline."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn, Protocol, TypeAlias

from planaria.core.deadline import Deadline
from planaria.errors import DeadlineError, WireError

_CHUNK = 1 << 20

Buffer: TypeAlias = "bytes | bytearray | memoryview[Any]"


class Added(Protocol):
    """What bytes are added to as they pass: `hmac.HMAC`, `planaria.core.mac.Gmac`."""

    def update(self, data: memoryview[Any], /) -> None:
        """Adds contiguous bytes."""
        ...


class ByteStream:
    """A connected stream socket that, once broken, says why and stays broken.

    One thread may read while another writes.
    """

    def __init__(self, sock: socket.socket, peer: str = "") -> None:
        """Takes over a connected socket.

        Args:
            sock: Connected socket; the stream closes it.
            peer: Name of the other side for messages, by default its address.
        """
        self.peer = peer or _peer_name(sock)
        # A timeout of the socket's own would be shared by the reading and the writing thread.
        sock.setblocking(False)
        self._sock = sock
        self._broken: str | None = None

    def read_some(self, view: memoryview, deadline: Deadline, what: str) -> int:
        """Reads what has come, at least one byte and at most ``view`` holds.

        A read that ends in DeadlineError took nothing, so it may be repeated.

        Args:
            view: Where the bytes go.
            deadline: When to give up.
            what: What is being waited for, for the errors.

        Returns:
            How many bytes came; 0 when the peer has closed the connection.

        Raises:
            WireError: The connection was lost, or closed on this side.
            DeadlineError: Nothing came in time.
        """
        got = self._when_ready(select.POLLIN, deadline, what, lambda: self._sock.recv_into(view))
        if not got:
            self.check_usable()  # the end that close() in another thread makes is no peer's
        return got

    def read(
        self,
        size: int,
        deadline: Deadline,
        what: str,
        *,
        into: Added | None = None,
        hint: str = "",
    ) -> bytearray:
        """Reads exactly ``size`` bytes.

        Args:
            size: How many bytes.
            deadline: When to give up.
            what: What they are part of, for the errors.
            into: What to add them to as they come.
            hint: Why the peer may have left instead, for the error.

        Raises:
            WireError: The connection ended before, was lost, or closed on this side.
            DeadlineError: Not all of them came in time.
        """
        data = bytearray(size)
        self.fill(memoryview(data), deadline, what, into=into, hint=hint)
        return data

    def fill(
        self,
        view: memoryview[Any],
        deadline: Deadline,
        what: str,
        *,
        into: Added | None = None,
        hint: str = "",
    ) -> None:
        """Reads exactly as many bytes as ``view`` holds, there; see `read`."""
        while view:
            got = self.read_some(view[:_CHUNK], deadline, what)
            if not got:
                raise WireError(f"{what} was cut short: the connection ended within it{hint}")
            if into is not None:
                into.update(view[:got])
            view = view[got:]

    def write(
        self, data: Buffer, deadline: Deadline, what: str, *, into: Added | None = None
    ) -> None:
        """Writes all of ``data``; returns when the system has taken it.

        Args:
            data: Contiguous bytes.
            deadline: When to give up.
            what: What is being waited for, for the errors.
            into: What to add them to as they go.

        Raises:
            WireError: The connection was lost, or closed on this side.
            DeadlineError: The peer did not take it in time.
        """
        view = memoryview(data)
        for start in range(0, len(view), _CHUNK):
            chunk = view[start : start + _CHUNK]
            if into is not None:
                into.update(chunk)
            while chunk:
                send = partial(self._sock.send, chunk)
                chunk = chunk[self._when_ready(select.POLLOUT, deadline, what, send) :]

    def check_usable(self) -> None:
        """Raises a WireError that says why, if the stream is broken or closed."""
        if self._broken is not None:
            raise WireError(f"the connection to {self.peer} cannot be used: {self._broken}")

    @contextlib.contextmanager
    def broken_by_errors(self) -> Iterator[None]:
        """Breaks the stream on an error: the two sides no longer agree where they are in it."""
        try:
            yield
        except BaseException as error:
            self._broken = self._broken or str(error) or type(error).__name__
            self.close()
            raise

    def close(self) -> None:
        """Closes the socket; what waits in it, in any thread, ends with a WireError."""
        self._broken = self._broken or "it was closed on this side"
        shut(self._sock)

    def _when_ready(
        self, event: int, deadline: Deadline, what: str, call: Callable[[], int]
    ) -> int:
        """Does a read or a write as soon as the socket takes it."""
        ready = True  # most often it is
        while True:
            try:
                deadline.check(what)
                if ready:
                    return call()
                poll = select.poll()
                poll.register(self._sock, event)
                # In slices: another thread's close() may come just before the wait.
                ready = bool(poll.poll(min(deadline.timeout(), 1.0) * 1e3))
            except BlockingIOError:
                ready = False
            except ValueError:  # closed on this side: it has no descriptor any more
                self.check_usable()
                raise
            except DeadlineError:
                raise
            except OSError as error:
                self._lost(error)

    def _lost(self, error: OSError) -> NoReturn:
        why = self._broken or error.strerror or str(error)
        raise WireError(f"the connection to {self.peer} was lost: {why}") from error


def arm_timeout(sock: socket.socket, deadline: Deadline, what: str) -> None:
    """Gives the socket's next operation what is left of the budget.

    Raises:
        DeadlineError: Nothing is left.
    """
    deadline.check(what)
    # 0 would mean not to wait at all, and to fail in another way.
    sock.settimeout(max(deadline.timeout(), 1e-3))


def shut(sock: socket.socket) -> None:
    """Closes a socket and wakes the threads that wait in it."""
    # Refused by a socket that is not connected any more, and off Linux by one that listens.
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def address_name(address: tuple[Any, ...]) -> str:
    """Returns ``host:port`` of a socket's address, with an IPv6 host in brackets."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def _peer_name(sock: socket.socket) -> str:
    try:
        address = sock.getpeername()
    except OSError:
        return "the peer"
    return address_name(address) if isinstance(address, tuple) else "the peer"
