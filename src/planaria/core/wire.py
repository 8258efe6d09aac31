"""Listening and connecting: how processes of a job get an authenticated connection.

What goes over it, and what that is proof against, is in :mod:`planaria.core.connection`; its
public names, and those of the job's token, can be imported from here.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any, Self

from planaria.core.byte_stream import Buffer, address_name, arm_timeout, shut
from planaria.core.connection import Connection, Limits, Message
from planaria.core.deadline import Deadline
from planaria.core.token import TOKEN_ENV, load_token, make_token
from planaria.errors import ConfigError, WireError

__all__ = [
    "Buffer",
    "Connection",
    "Limits",
    "Listener",
    "Message",
    "connect",
    "listen",
    "load_token",
    "make_token",
]


class Listener:
    """A listening socket. Made by :func:`listen`."""

    def __init__(self, sock: socket.socket, token: bytes | None, limits: Limits | None) -> None:
        self._sock = sock
        self._token = token
        self._limits = limits
        self.address: tuple[str, int] = sock.getsockname()[:2]

    def accept(self, deadline: Deadline) -> Connection:
        """Waits for the next caller.

        It returns before the handshake, so that a caller that is slow, silent or not of this job
        holds up nobody else: its own connection fails at the first use.

        Raises:
            DeadlineError: Nobody called in time.
            WireError: The listener is closed.
        """
        what = f"a connection to {address_name(self.address)}"
        try:
            arm_timeout(self._sock, deadline, what)
            sock, _ = self._sock.accept()
        except TimeoutError:
            raise deadline.error(what) from None
        except OSError as error:
            raise WireError(f"cannot accept {what}: {error.strerror or error}") from error
        _tune(sock)
        return Connection(sock, server=True, token=self._token, limits=self._limits)

    def close(self) -> None:
        """Stops listening; an :meth:`accept` that waits in another thread ends with WireError."""
        shut(self._sock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def listen(
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    token: bytes | None = None,
    limits: Limits | None = None,
) -> Listener:
    """Listens for connections.

    Args:
        host: Name or address to bind to. Anything but loopback needs a token.
        port: Port, or 0 for a free one: read it from ``.address``.
        token: The job's token, see :func:`load_token`.
        limits: For the connections that are accepted.

    Returns:
        The listener; close it, or use it as a context manager.

    Raises:
        ConfigError: No token for an address that others can reach, or the address is not usable.
    """
    family, address = _resolve(host, port)[0]
    if not token and not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback:
        raise ConfigError(
            f"refused to listen on {host or 'every address'} ({address[0]}) without a token: "
            f"set {TOKEN_ENV}, or bind to 127.0.0.1"
        )
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return Listener(sock, token, limits)


def connect(
    host: str,
    port: int,
    *,
    token: bytes | None = None,
    deadline: Deadline,
    limits: Limits | None = None,
) -> Connection:
    """Connects to a listener and completes the handshake.

    Args:
        host: Name or address.
        port: Port.
        token: The job's token, the same as the listener's.
        deadline: When to give up.
        limits: Largest message to accept and to send.

    Raises:
        ConfigError: The host's name is not known.
        WireError: Nobody listens there, or it is not of this job.
        DeadlineError: No answer in time.
    """
    what = f"a connection to {address_name((host, port))}"
    failure = "no address"
    for family, address in _resolve(host, port):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            arm_timeout(sock, deadline, what)
            sock.connect(address)
            _tune(sock)
        except TimeoutError:
            sock.close()
            raise deadline.error(what) from None
        except OSError as error:
            sock.close()
            failure = error.strerror or str(error)
            continue
        name = address_name((host, port))
        connection = Connection(sock, server=False, token=token, peer=name, limits=limits)
        connection.handshake(deadline)
        return connection
    raise WireError(f"could not make {what}: {failure}; is the other side running?")


def _resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[Any, ...]]]:
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(f"{host}:{port} is not an address that can be used: {error}") from error
    return [(family, address) for family, _, _, _, address in found]


def _tune(sock: socket.socket) -> None:
    # A message is several writes; without this the last waits for the peer's delayed ACK.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
