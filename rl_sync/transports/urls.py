"""Transports by URL.

========================= ======================================================================
``tcp://host:port``       a server at the publisher, a connection at each receiver
``/a/folder``, ``file:``  a folder of self-describing versions; so is any fsspec URL (``s3:``...)
``shm://name``            such a folder in the host's shared memory, mapped by its readers
========================= ======================================================================
"""

from __future__ import annotations

from typing import Any, Protocol

from planaria.core.deadline import Deadline
from planaria.errors import ConfigError
from planaria.rl_sync.layout.table import BlockTable
from planaria.rl_sync.transports.feed import Feed
from planaria.rl_sync.transports.folder import FolderFeed, FolderOutlet
from planaria.rl_sync.transports.tcp import FeedServer, TcpFeed, parse_address
from planaria.rl_sync.versions.log import VersionLog


class Outlet(Protocol):
    """Where a publisher's versions go."""

    sent_bytes: int

    @property
    def url(self) -> str:
        """Where receivers find it."""
        ...

    def published(self, version: int, deadline: Deadline) -> None:
        """The log has a new version."""
        ...

    def resumed(self, version: int, digest: tuple[str, ...]) -> None:
        """The log begins anew with a version of an earlier life."""
        ...

    def close(self) -> None:
        """Ends it."""
        ...


class TcpOutlet(FeedServer):
    """A server of the log: receivers come for versions, so nothing has to be done for one."""

    def published(self, version: int, deadline: Deadline) -> None:
        """See `Outlet.published`."""

    def resumed(self, version: int, digest: tuple[str, ...]) -> None:
        """See `Outlet.resumed`."""


def open_outlet(
    url: str,
    log: VersionLog,
    table: BlockTable,
    token: bytes | None,
    *,
    rate: float | None = None,
    fan_out: int | None = None,
) -> Outlet:
    """Opens the publisher's side of a transport.

    Raises:
        ConfigError: The URL cannot be used.
    """
    if url.startswith("tcp://"):
        host, port = _address(url)
        return TcpOutlet(log, host, port, token=token, rate=rate, fan_out=fan_out)
    return FolderOutlet(url, log, table, token, rate=rate)


def open_feed(url: str, token: bytes | None, *, worker: str = "", relay: str | None = None) -> Feed:
    """Opens a receiver's side of a transport.

    Raises:
        ConfigError: The URL cannot be used.
    """
    if url.startswith("tcp://"):
        host, port = _address(url)
        return TcpFeed(host, port, token=token, worker=worker, relay=relay)
    return FolderFeed(url, token)


def open_status(url: str, token: bytes | None, deadline: Deadline) -> dict[str, Any]:
    """The newest version, and version, lag, link, bytes and codec of each receiver.

    Raises:
        ConfigError: The URL cannot be used.
        WireError: Nobody answers there, or holds another token.
    """
    feed = open_feed(url, token, worker="status")
    assert isinstance(feed, TcpFeed | FolderFeed)
    try:
        return feed.status(deadline)
    finally:
        feed.close()


def _address(url: str) -> tuple[str, int]:
    try:
        return parse_address(url)
    except Exception as error:
        raise ConfigError(str(error)) from None
