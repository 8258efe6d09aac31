"""Feeds over TCP: a server for any feed, and the feed at the other end of a connection.

One connection a receiver, one thread a connection: a receiver that is slow or stopped holds up
nobody else, and since receivers ask for what they can take, nothing queues up for them.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Sequence
from typing import Any

from planaria.core import rpc, wire
from planaria.core.acceptor import Acceptor
from planaria.core.connection import Connection
from planaria.core.deadline import Deadline
from planaria.core.pacing import TokenBucket
from planaria.errors import DeadlineError, PlanariaError, SyncError, WireError
from planaria.rl_sync.transports.feed import Ack, Ahead, Feed, Head, Offer, Piece

#: A receiver that asks for nothing for this long is gone.
IDLE_S = 600.0
_MOST_S = 600.0
#: In errors that trying again does not help against.
OTHER_JOB = "this job's token"
_BATCH = 1 << 12
#: So long beyond what was asked for, a relay may take to say something, and to fetch something; one
#: that is stopped is not waited for. The publisher itself is, as long as there is time.
_PATIENCE_S, _FETCHING_S = 15.0, 60.0
_WARY_S = 600.0


def link_bucket(rate: float) -> TokenBucket:
    """A bucket that behaves as a link of so many bytes a second: bursts of 10 ms at most."""
    return TokenBucket(rate, max(rate / 100, 4096))


class FeedServer:
    """Serves a feed to any number of receivers."""

    def __init__(
        self,
        feed: Feed,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        token: bytes | None = None,
        rate: float | None = None,
        fan_out: int | None = None,
    ) -> None:
        """Starts to listen.

        Args:
            feed: What to serve.
            host: Address to bind to; anything but loopback needs a token.
            port: Port, or 0 for a free one.
            token: The job's token.
            rate: Bytes of payload a second, over all receivers; None for no limit.
            fan_out: So many receivers are served; further ones are sent to relays among them.

        Raises:
            ConfigError: The address cannot be used.
        """
        self._feed, self._token, self._fan_out = feed, token, fan_out
        self._bucket = link_bucket(rate) if rate else None
        self._lock = threading.Lock()
        self._open: dict[Connection, str] = {}  # receivers, and where they relay, if they do
        self._turn = 0
        self.sent_bytes = 0
        listener = wire.listen(host, port, token=token, limits=rpc.LIMITS)
        self._acceptor = Acceptor(listener, self._serve, "planaria-rl")
        self.address = listener.address

    @property
    def url(self) -> str:
        """Where receivers connect to."""
        host, port = self.address
        return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"

    def close(self) -> None:
        """Stops listening and ends all connections."""
        self._acceptor.close()

    def _serve(self, connection: Connection) -> None:
        session = _Session(self, connection)
        try:
            with contextlib.suppress(PlanariaError, OSError):
                connection.handshake(Deadline(30.0))
                rpc.serve(connection, session.handle, lambda: Deadline(IDLE_S))
        finally:
            connection.close()
            with self._lock:
                self._open.pop(connection, None)

    def _place(self, connection: Connection, relay: str | None, served: bool) -> str | None:
        """Takes a receiver in, or says which relay it is to go to."""
        with self._lock:
            # A relay that comes again, perhaps before it was noticed that its last connection is
            # dead, is not sent to itself.
            again = [c for c in self._open if c is not connection and relay == self._open[c] != ""]
            for stale in again:
                del self._open[stale]
                stale.close()
            others = [c for c in self._open if c is not connection]
            full = self._fan_out is not None and len(others) >= self._fan_out
            relays = [url for c in others if (url := self._open[c])]
            if full and relays and not served:
                self._turn += 1
                return relays[self._turn % len(relays)]
            self._open[connection] = relay or ""
        return None

    def _pace(self, nbytes: int, deadline: Deadline) -> None:
        if self._bucket is not None:
            self._bucket.take(nbytes, deadline)
        with self._lock:
            self.sent_bytes += nbytes


class _Session:
    """One receiver's requests."""

    def __init__(self, server: FeedServer, connection: Connection) -> None:
        self._server, self._connection = server, connection
        self._feed = server._feed
        self._offers: list[Offer] = []

    def handle(self, header: dict[str, Any], payloads: list[bytearray]) -> rpc.Reply:
        deadline = rpc.budget(header, _MOST_S)
        op = header.get("op")
        if op == "hello":
            relay = header.get("relay")
            if relay is not None and not (isinstance(relay, str) and relay.startswith("tcp://")):
                raise WireError(f"{relay!r} is no relay")
            if relay is not None:
                relay = _reachable(relay, self._connection.peer)
            placed = self._server._place(self._connection, relay, bool(header.get("stay")))
            return {"go_to": placed}, ()
        if op == "head":
            after, wait = header["after"], min(max(float(header["wait"]), 0.0), 60.0)
            head = self._feed.head(None if after is None else int(after), deadline, wait)
            return ({} if head is None else {"version": head.version, "digest": head.digest}), ()
        if op == "chain":
            have = header["have"]
            if have is not None:
                number, digest = have
                have = int(number), str(digest)
            self._offers = self._feed.chain(have, int(header["shard"]), deadline)
            manifests = [offer.manifest for offer in self._offers]
            self._server._pace(sum(map(len, manifests)), deadline)
            return {}, manifests
        if op == "read":
            number = int(header["offer"])
            if not 0 <= number < len(self._offers):
                raise SyncError("there is no such offer any more; ask for the chain again")
            got = self._offers[number].read([int(n) for n in header["numbers"]], deadline)
            self._server._pace(sum(map(len, got)), deadline)
            return {}, got
        if op == "ahead":
            (version, digest), seen = header["have"], header["seen"]
            if seen is not None:
                seen = str(seen[0]), int(seen[1])
            wait, started = min(max(float(header["wait"]), 0.0), 60.0), time.monotonic()
            got = self._feed.ahead(
                (int(version), str(digest)), int(header["shard"]), seen, deadline, wait
            )
            if got.piece is None:
                return {"over": got.over}, ()
            # What a relay's own source took is no matter of the link from here, either.
            waited = time.monotonic() - started
            piece, made = got.piece.to_message()
            self._server._pace(sum(map(len, made)), deadline)
            return {**piece, "waited": waited}, made
        if op == "table":
            data = self._feed.table(str(header["key"]), deadline)
            self._server._pace(len(data), deadline)
            return {}, [data]
        if op == "ack":
            self._feed.acknowledge(Ack.from_json(header["ack"]), deadline)
            return {}, ()
        if op == "status":
            status = getattr(self._feed, "status", None)
            if status is None:
                raise SyncError("this is a relay; the publisher itself knows the status")
            return {"status": status()}, ()
        raise WireError(f"unknown request {op!r}")


class TcpFeed:
    """The feed of a server. Connects when it is needed, and again after a connection is lost."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        token: bytes | None = None,
        worker: str = "",
        relay: str | None = None,
    ) -> None:
        """Sets it up; nothing is sent yet.

        Args:
            host: The publisher's host.
            port: Its port.
            token: The job's token.
            worker: Name of this receiver.
            relay: Where this receiver serves others, if it does.
        """
        self._root = (host, port)
        self._token, self._worker, self._relay = token, worker or secrets.token_hex(4), relay
        self._lock = threading.RLock()
        self._connection: Connection | None = None
        self._closed = False
        self._wary_until = 0.0  # no relay is trusted before
        self.reconnects = -1
        #: Where the receiver was sent to.
        self.parent = f"tcp://{host}:{port}"

    def head(self, after: int | None, deadline: Deadline, wait: float | None = None) -> Head | None:
        """See `Feed.head`."""
        waiting = deadline if wait is None else deadline.sub(wait)
        while True:
            # In parts, and less than the whole: the connection is to be used again.
            part = min(waiting.remaining(), max(deadline.remaining() - 0.2, 0.0), 5.0)
            answer = self._call({"op": "head", "after": after, "wait": part}, deadline)
            if "version" in answer.header:
                h = answer.header
                return Head(int(h["version"]), tuple(map(str, h["digest"])))
            if waiting.remaining() < 0.25:
                return None

    def chain(self, have: tuple[int, str] | None, shard: int, deadline: Deadline) -> list[Offer]:
        """See `Feed.chain`."""
        with self._lock:
            request = {"op": "chain", "have": None if have is None else list(have), "shard": shard}
            answer = self._call(request, deadline)
            connection = self._connection
        return [self._offer(i, bytes(m), connection) for i, m in enumerate(answer.payloads)]

    def ahead(
        self, have: tuple[int, str], shard: int, seen: tuple[str, int] | None, deadline: Deadline,
        wait: float,
    ) -> Ahead:  # fmt: skip
        """See `Feed.ahead`."""
        # Less than the whole: the connection is to be used again.
        wait = min(wait, max(deadline.remaining() - 0.2, 0.0))
        if wait < 0.05:
            return Ahead(None, over=True)
        request = {"op": "ahead", "have": list(have), "shard": shard, "seen": seen, "wait": wait}
        answer = self._call(request, deadline, once=True)
        if "draft" not in answer.header:
            return Ahead(None, over=bool(answer.header["over"]))
        piece = Piece.from_message(answer.header, answer.payloads)
        return Ahead(piece, over=False, waited=float(answer.header["waited"]))

    def table(self, key: str, deadline: Deadline) -> bytes:
        """See `Feed.table`."""
        (data,) = self._call({"op": "table", "key": key}, deadline).payloads
        return bytes(data)

    def acknowledge(self, ack: Ack, deadline: Deadline) -> None:
        """See `Feed.acknowledge`."""
        self._call({"op": "ack", "ack": ack.to_json()}, deadline)

    def status(self, deadline: Deadline) -> dict[str, Any]:
        """The newest version and what each receiver acknowledged, see `VersionLog.status`."""
        return self._call({"op": "status"}, deadline).header["status"]

    def close(self) -> None:
        """See `Feed.close`."""
        self._closed = True
        connection = self._connection
        if connection is not None:
            connection.close()

    def _offer(self, number: int, manifest: bytes, connection: Connection | None) -> Offer:
        def read(numbers: Sequence[int], deadline: Deadline) -> list[bytes]:
            got: list[bytes] = []
            for start in range(0, len(numbers), _BATCH):
                request = {
                    "op": "read",
                    "offer": number,
                    "numbers": list(numbers[start : start + _BATCH]),
                }
                with self._lock:
                    if self._connection is not connection:
                        raise WireError("the connection was lost while a version was read; again")
                    answer = self._call(request, deadline, once=True)
                got += [bytes(p) for p in answer.payloads]
            return got

        return Offer(manifest, read)

    def _call(
        self,
        request: dict[str, Any],
        deadline: Deadline,
        once: bool = False,
    ) -> Any:
        """Calls the server; a connection that was lost is made again, with growing pauses."""
        pause = 0.02
        with self._lock:
            while True:
                try:
                    connection = self._connected(deadline)
                    patience = self._patience(request, deadline)
                    return rpc.call(connection, request, deadline=patience, otherwise=SyncError)
                except WireError as error:
                    self._drop()
                    hopeless = OTHER_JOB in str(error) or "does not speak" in str(error)
                    if self._closed or once or hopeless or deadline.remaining() < pause:
                        raise
                    time.sleep(pause)
                    pause = min(2 * pause, 1.0)
                except DeadlineError as error:
                    self._drop()
                    if self._at_root() or deadline.expired:
                        raise
                    self._wary_until = time.monotonic() + _WARY_S
                    if once:
                        raise WireError(f"{self.parent}, a relay, does not answer") from error

    def _at_root(self) -> bool:
        return parse_address(self.parent) == self._root

    def _patience(self, request: dict[str, Any], deadline: Deadline) -> Deadline:
        if self._at_root():
            return deadline
        wait = request.get("wait")
        return deadline.sub(_FETCHING_S if wait is None else wait + _PATIENCE_S)

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connected(self, deadline: Deadline) -> Connection:
        """The connection, made and placed: perhaps with a relay, else with the publisher itself."""
        if self._connection is not None:
            return self._connection
        host, port = self._root
        hops = 0
        while True:
            if self._closed:
                raise WireError("this feed was closed")
            root = (host, port) == self._root
            patience = deadline if root else deadline.sub(_PATIENCE_S)
            stay = hops >= 64 or time.monotonic() < self._wary_until
            hello = {"op": "hello", "worker": self._worker, "relay": self._relay, "stay": stay}
            try:
                made = wire.connect(
                    host, port, token=self._token, limits=rpc.LIMITS, deadline=patience
                )
                answer = rpc.call(made, hello, deadline=patience, otherwise=SyncError)
            except (WireError, DeadlineError):
                if root:
                    raise
                # The relay is gone, and the publisher may not have noticed yet: stay with itself.
                (host, port), hops = self._root, 64
                continue
            go_to = answer.header.get("go_to")
            if go_to is None:
                break
            made.close()
            host, port = parse_address(go_to)
            hops += 1
        self._connection = made
        if self._closed:  # meanwhile, by another thread, which did not see this connection
            self._drop()
            raise WireError("this feed was closed")
        self.reconnects += 1
        self.parent = f"tcp://{host}:{port}"
        return made


def _reachable(relay: str, peer: str) -> str:
    """Where others find a relay that listens on all addresses: where its connection came from."""
    host, port = parse_address(relay)
    if host not in ("0.0.0.0", "::"):
        return relay
    return f"tcp://{peer.rpartition(':')[0] or host}:{port}"


def parse_address(url: str) -> tuple[str, int]:
    """Host and port of ``tcp://host:port``.

    Raises:
        WireError: It is not of this form.
    """
    rest = url.removeprefix("tcp://")
    host, _, port = rest.rpartition(":")
    if not url.startswith("tcp://") or not host or not port.isdigit():
        raise WireError(f"{url!r} is not of the form tcp://host:port")
    return host.strip("[]"), int(port)
