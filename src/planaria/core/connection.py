"""Authenticated, length-framed messages over one connection: a JSON header and raw payloads.

Both sides send a fresh nonce and prove that they hold the job's token; each direction then has its
own keys, derived from token and nonces. Every message carries its number and is authenticated:
first the sizes with HMAC-SHA256, before a byte is allocated for them, then everything with GMAC,
which is several times as fast. So a message that was changed, cut, repeated, reordered, reflected
or recorded in another connection is refused. Nothing is encrypted, and nothing is ever unpickled or
evaluated.

On the wire, integers big-endian::

    hello    16 bytes magic, 32 bytes nonce            each side; the server answers the client's
    proof    32 bytes HMAC(direction's key, "proof")   server first, then client
    message  number u64, header bytes u32, payloads u32, payload bytes u64    (24 bytes)
             32 bytes HMAC(key, "sizes" + those 24)
             payload sizes u64 each, header, payloads
             16 bytes GMAC(key for this, number, everything since the number but the HMAC)

Without a token (on a loopback address or a socket pair alone) the same is done with an empty one:
it then shows damage, but proves nothing about who sent it.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import socket
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from planaria.core.byte_stream import Buffer, ByteStream
from planaria.core.deadline import Deadline
from planaria.core.mac import TAG_NBYTES, Gmac
from planaria.core.token import TOKEN_ENV
from planaria.errors import PeerClosedError, WireError

_MAGIC = b"planaria-wire/2\n"
_NONCE_BYTES = 32
_MAC_BYTES = 32
_SIZES = struct.Struct("!QIIQ")
_OTHER_TOKEN = f"; it may hold another {TOKEN_ENV} or token file"


class Message(NamedTuple):
    """One received message: its header, and its payloads as bytes that the receiver owns.

    A payload is a bytearray, or a view (uint8) of the buffer that the receiver gave for it.
    """

    header: dict[str, Any]
    payloads: list[Any]


class _Keys(NamedTuple):
    """Of one direction."""

    sizes: bytes
    whole: bytes


@dataclass(frozen=True)
class Limits:
    """What a side accepts and sends, in bytes a message (``payloads`` is a number of them)."""

    header_bytes: int = 1 << 20
    payload_bytes: int = 1 << 30
    payloads: int = 4096


class Connection:
    """One side of an authenticated connection.

    One thread may send while another receives; further threads wait their turn. After an error in
    the middle of a message the connection is broken for good. A :meth:`recv` that times out before
    the first byte of a message may be repeated.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        server: bool,
        token: bytes | None,
        peer: str = "",
        limits: Limits | None = None,
    ) -> None:
        """Takes over a connected stream socket; the two sides must differ in ``server``.

        Nothing is sent yet: :meth:`handshake` does so, at the latest within the first send or recv.

        Args:
            sock: Connected socket; the connection closes it.
            server: Which of the two sides this is.
            token: The job's token, the same on both sides.
            peer: Name of the other side for messages, by default its address.
            limits: Largest message to accept and to send.
        """
        self._stream = ByteStream(sock, peer)
        self.peer = self._stream.peer
        self._server = server
        self._token = token or b""
        self._limits = limits or Limits()
        self._sending = threading.Lock()
        self._receiving = threading.Lock()
        self._shaking = threading.Lock()
        self._keys: tuple[_Keys, _Keys] | None = None  # for sending, for receiving
        self._sent = 0
        self._received = 0

    def handshake(self, deadline: Deadline) -> None:
        """Proves the token to the peer and has it prove the same; does nothing when done already.

        Raises:
            WireError: The peer speaks another protocol, holds another token, or left.
            DeadlineError: It did not answer in time.
        """
        with _holding(self._shaking, deadline, f"the handshake with {self.peer}"):
            if self._keys is None:
                self._stream.check_usable()
                with self._stream.broken_by_errors():
                    self._keys = self._shake(deadline)

    def send(
        self, header: Mapping[str, Any], payloads: Sequence[Buffer] = (), *, deadline: Deadline
    ) -> None:
        """Sends one message; returns when the system has taken all of it.

        Args:
            header: What JSON can hold, with string keys.
            payloads: Contiguous buffers, sent as they are, without a copy.
            deadline: When to give up.

        Raises:
            WireError: Header or payloads are beyond JSON or the limits (nothing was sent, the
                connection stays usable), or the connection is broken.
            DeadlineError: The peer did not take it in time; the connection is broken then.
        """
        head = _encode_header(header)
        views = [_flat(payload) for payload in payloads]
        total = sum(map(len, views))
        self._check_limits(len(head), len(views), total, f"message to {self.peer}")
        self.handshake(deadline)
        with _holding(self._sending, deadline, f"another message to {self.peer} to be sent"):
            self._stream.check_usable()
            key, _ = self._need_keys()
            sizes = _SIZES.pack(self._sent, len(head), len(views), total)
            lengths = struct.pack(f"!{len(views)}Q", *map(len, views))
            what = f"{self.peer} to take a message"
            # A message that fails breaks the connection, so no number is ever used twice.
            with self._stream.broken_by_errors():
                whole = Gmac(key.whole, self._sent)
                whole.update(sizes + lengths + head)
                start = sizes + _mac(key.sizes, b"sizes", sizes) + lengths + head
                self._stream.write(start, deadline, what)
                for view in views:
                    self._stream.write(view, deadline, what, into=whole)
                self._stream.write(whole.digest(), deadline, what)
            self._sent += 1

    def recv(self, deadline: Deadline, into: Sequence[memoryview[Any]] = ()) -> Message:
        """Waits for the next message.

        Args:
            deadline: When to give up.
            into: Where payloads go, in their order, that fit; writable, contiguous bytes. What they
                hold after an error is not authentic.

        Raises:
            PeerClosedError: The peer closed the connection, between two messages.
            WireError: The message is malformed, oversized, not authentic, repeated, out of order or
                cut short, or the connection is broken.
            DeadlineError: No message, or not all of it, came in time.
        """
        self.handshake(deadline)
        with _holding(self._receiving, deadline, f"another thread that reads from {self.peer}"):
            self._stream.check_usable()
            what = f"a message from {self.peer}"
            first = bytearray(1)
            # Until the first byte is here nothing is lost, so a timeout leaves the stream usable.
            if not self._stream.read_some(memoryview(first), deadline, what):
                with self._stream.broken_by_errors():
                    raise PeerClosedError(f"{self.peer} closed the connection")
            with self._stream.broken_by_errors():
                message = self._read_message(first, into, deadline, what)
            self._received += 1
            return message

    def close(self) -> None:
        """Closes the socket; what waits in it, in any thread, ends with a WireError."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _shake(self, deadline: Deadline) -> tuple[_Keys, _Keys]:
        """Returns the keys for sending and for receiving."""
        what = f"the handshake with {self.peer}"
        mine = secrets.token_bytes(_NONCE_BYTES)
        if self._server:
            theirs = self._read_hello(deadline, what)
            self._stream.write(_MAGIC + mine, deadline, what)
            nonces = theirs + mine
        else:
            self._stream.write(_MAGIC + mine, deadline, what)
            theirs = self._read_hello(deadline, what)
            nonces = mine + theirs
        from_server = _keys(self._token, b"planaria-wire/2 server to client", nonces)
        from_client = _keys(self._token, b"planaria-wire/2 client to server", nonces)
        if self._server:
            self._stream.write(_mac(from_server.sizes, b"proof", b""), deadline, what)
            self._read_proof(from_client.sizes, deadline, what)
            return from_server, from_client
        self._read_proof(from_server.sizes, deadline, what)
        self._stream.write(_mac(from_client.sizes, b"proof", b""), deadline, what)
        return from_client, from_server

    def _read_hello(self, deadline: Deadline, what: str) -> bytes:
        size = len(_MAGIC) + _NONCE_BYTES
        hello = bytes(self._stream.read(size, deadline, what, hint=_OTHER_TOKEN))
        if not hello.startswith(_MAGIC):
            raise WireError(
                f"{self.peer} does not speak this protocol (it began with {hello[:16]!r}): "
                "check the address, and that both sides run the same version"
            )
        return hello[len(_MAGIC) :]

    def _read_proof(self, key: bytes, deadline: Deadline, what: str) -> None:
        proof = bytes(self._stream.read(_MAC_BYTES, deadline, what, hint=_OTHER_TOKEN))
        if not _same(proof, _mac(key, b"proof", b"")):
            raise WireError(
                f"{self.peer} does not hold this job's token: "
                f"give both sides the same {TOKEN_ENV} or token file"
            )

    def _read_message(
        self,
        first: bytearray,
        into: Sequence[memoryview[Any]],
        deadline: Deadline,
        what: str,
    ) -> Message:
        _, key = self._need_keys()
        sizes = bytes(first + self._stream.read(_SIZES.size - 1, deadline, what))
        mac = bytes(self._stream.read(_MAC_BYTES, deadline, what))
        if not _same(mac, _mac(key.sizes, b"sizes", sizes)):
            raise WireError(
                f"{what} is not authentic: its sizes were not sent by a holder of the "
                "token on this connection"
            )
        number, header_bytes, payloads, payload_bytes = _SIZES.unpack(sizes)
        if number != self._received:
            raise WireError(
                f"{what} is repeated or out of order: number {number} where {self._received} is due"
            )
        self._check_limits(header_bytes, payloads, payload_bytes, what)

        whole = Gmac(key.whole, number)
        whole.update(sizes)
        table = self._stream.read(8 * payloads, deadline, what, into=whole)
        lengths = struct.unpack(f"!{payloads}Q", table)
        if sum(lengths) != payload_bytes:
            raise WireError(f"{what} is malformed: its payload sizes do not add up")
        header = self._stream.read(header_bytes, deadline, what, into=whole)
        room = iter(into)
        received = [_room(length, next(room, None)) for length in lengths]
        for payload in received:
            self._stream.fill(memoryview(payload), deadline, what, into=whole)
        mac = bytes(self._stream.read(TAG_NBYTES, deadline, what))
        if not _same(mac, whole.digest()):
            raise WireError(f"{what} is not authentic: its content was changed on the way")
        return Message(_decode_header(header, what), received)

    def _check_limits(self, header: int, payloads: int, total: int, what: str) -> None:
        for got, limit, part in (
            (header, self._limits.header_bytes, "bytes of header"),
            (payloads, self._limits.payloads, "payloads"),
            (total, self._limits.payload_bytes, "bytes of payload"),
        ):
            if got > limit:
                raise WireError(f"{what} is oversized: {got} {part}, the limit is {limit}")

    def _need_keys(self) -> tuple[_Keys, _Keys]:
        assert self._keys is not None  # set by handshake()
        return self._keys


def _keys(token: bytes, label: bytes, nonces: bytes) -> _Keys:
    key = _mac(token, label, nonces)
    return _Keys(key, _mac(key, b"whole", b""))


def _mac(key: bytes, label: bytes, data: bytes) -> bytes:
    return hmac.digest(key, label + data, "sha256")


def _same(got: bytes, wanted: bytes) -> bool:
    return hmac.compare_digest(got, wanted)


def _room(nbytes: int, view: memoryview[Any] | None) -> bytearray | memoryview[Any]:
    return bytearray(nbytes) if view is None or len(view) < nbytes else view[:nbytes]


def _encode_header(header: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(dict(header), allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(f"a message's header is not JSON: {error}") from error


def _decode_header(data: bytearray, what: str) -> dict[str, Any]:
    try:
        header = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what} is malformed: its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise WireError(f"{what} is malformed: its header is no JSON object")
    return header


def _flat(payload: Buffer) -> memoryview:
    try:
        view = memoryview(payload)
        return view.cast("B") if view.nbytes else memoryview(b"")  # cast() refuses empty shapes
    except TypeError as error:
        raise WireError(f"a payload is not a contiguous buffer: {error}") from error


@contextlib.contextmanager
def _holding(lock: threading.Lock, deadline: Deadline, what: str) -> Iterator[None]:
    if not lock.acquire(timeout=deadline.timeout()):
        raise deadline.error(what)
    try:
        yield
    finally:
        lock.release()
