"""The snapshot process's side of its Unix socket: what ranks may ask for.

A request is a message with an ``op``, answered in order on its connection. The memory's descriptor
follows the answer to ``memory`` as one raw byte, while nothing else is under way there.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from planaria.checkpoint.format import checksum
from planaria.checkpoint.memory.arena import Arena
from planaria.checkpoint.memory.courtesy import Pace, Words
from planaria.checkpoint.memory.memory import Key, Member, Scheme, Span
from planaria.checkpoint.memory.meta import Snapshot
from planaria.checkpoint.memory.persisting import Persisting
from planaria.checkpoint.memory.prefault import Prefault
from planaria.checkpoint.memory.sessions import Session, Sessions
from planaria.core.byte_stream import Buffer, shut
from planaria.core.connection import Connection, Limits, Message
from planaria.core.deadline import Deadline
from planaria.core.rpc import MALFORMED
from planaria.errors import DeadlineError, MemoryBudgetError, PlanariaError, WireError

Answer = tuple[dict[str, Any], Sequence[Buffer]]

#: Manifests of large models are long, and travel as payloads.
LIMITS = Limits(header_bytes=64 << 20)
_ANSWER_S = 60.0
_LONG_S = 3600.0
_PAUSE_S = 0.05
# Two images and their parity are at most so many images (m = k).
_IMAGES = 4


class Node(Protocol):
    """What the server needs of `planaria.checkpoint.memory.node.SnapshotNode`."""

    def configure(self, members: Sequence[Member], scheme: Scheme, local_files: int) -> None:
        """Sets who takes part."""
        ...

    def begin(self, key: Key, file: str, nbytes: int, deadline: Deadline | None = None) -> Span:
        """Room for a rank's image."""
        ...

    def seal(
        self, key: Key, file: str, checksums: Sequence[int], chunk_nbytes: int, data_start: int
    ) -> None:
        """An image is complete."""
        ...

    def leave(self, key: Key, file: str) -> None:
        """The rank of this image will not write to it any more."""
        ...

    def describe(self, key: Key, manifest: bytes) -> None:
        """Gives a snapshot its manifest, on all nodes."""
        ...

    def abort(self, key: Key, why: str) -> None:
        """Forgets an attempt everywhere."""
        ...

    def wait(self, key: Key, deadline: Deadline) -> None:
        """Returns once it is committed on all nodes."""
        ...

    def hold(self, key: Key) -> None:
        """Keeps a snapshot's memory until `let_go`."""
        ...

    def let_go(self, key: Key) -> None:
        """Ends one `hold`."""
        ...

    def recoverable(self, deadline: Deadline) -> list[Snapshot]:
        """What can be read, newest first."""
        ...

    def read(self, key: Key, file: str, offset: int, into: memoryview, deadline: Deadline) -> None:
        """Reads a part of a file of a snapshot, from wherever it is."""
        ...

    def local_span(self, key: Key, file: str) -> Span | None:
        """Where an image of this node lies."""
        ...


class Server:
    """Serves the ranks of a node. Its threads end with `close`.

    Args:
        node: Answers.
        memory: Its memory.
        persisting: Writes snapshots to storage.
        token: The job's token.
        about: What a rank is told of the node when it connects.
        stop: Called when somebody asks for the end of the process.
        prefault: Touches memory ahead of its use.
        words: Where in the memory ranks write that they are in a collective.
        pace: Waits for these.
    """

    def __init__(
        self,
        node: Node,
        memory: Arena,
        persisting: Persisting,
        token: bytes,
        about: dict[str, Any],
        stop: Callable[[], None],
        prefault: Prefault,
        words: Span,
        pace: Pace,
    ) -> None:
        self._node, self._memory, self._token = node, memory, token
        self._persisting, self._members = persisting, list[Member]()
        self._about, self._stop, self._prefault = about, stop, prefault
        self._words, self._pace = words, pace
        self.sessions = Sessions(node, memory, Words(memory.view(words)))
        self._listener: socket.socket | None = None
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()
        self._closed = False

    def listen(self, sock: socket.socket) -> None:
        """Takes a listening socket over, in place of the last one."""
        with self._lock:
            before, self._listener = self._listener, sock
        if before is not None:
            shut(before)
        threading.Thread(target=self._accept, args=(sock,), name="planaria-accept", daemon=True,
                         ).start()  # fmt: skip

    def close(self) -> None:
        """Ends all connections."""
        with self._lock:
            self._closed = True
            connections, listener = list(self._connections), self._listener
        if listener is not None:
            shut(listener)
        for connection in connections:
            connection.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                with self._lock:
                    if self._closed or listener is not self._listener:
                        return
                time.sleep(_PAUSE_S)  # out of descriptors, say: that passes
                continue
            try:
                threading.Thread(
                    target=self._serve, args=(sock,), name="planaria-rank", daemon=True
                ).start()
            except RuntimeError:  # no more threads to be had: who called may come again
                sock.close()
                time.sleep(_PAUSE_S)

    def _serve(self, sock: socket.socket) -> None:
        try:
            raw = sock.dup()  # for the descriptor, which a Connection cannot send
        except OSError:
            sock.close()
            return
        connection = Connection(sock, server=True, token=self._token, peer="a rank", limits=LIMITS)
        with self._lock:
            if self._closed:
                connection.close()
            self._connections.add(connection)
        client, main = "", False
        try:
            hello = connection.recv(Deadline(_ANSWER_S)).header
            client, main = str(hello["client"]), bool(hello.get("main"))
            name, watches = str(hello.get("name", "a rank")), bool(hello.get("watches"))
            session = self.sessions.open(client, name, main=main, watches=watches)
            connection.send(self._about, deadline=Deadline(_ANSWER_S))
            while True:
                with contextlib.suppress(DeadlineError):  # between two messages: waits on
                    request = connection.recv(Deadline(_LONG_S))
                    self._respond(connection, raw, session, request)
        except (PlanariaError, KeyError, OSError):
            pass  # it is gone, or not of this job: nobody is left to be told
        finally:
            connection.close()
            raw.close()
            with self._lock:
                self._connections.discard(connection)
            if main:
                self.sessions.close(client)

    def _respond(
        self, connection: Connection, raw: socket.socket, session: Session, request: Message
    ) -> None:
        op = request.header.get("op")
        payloads: Sequence[Buffer] = ()
        try:
            act = getattr(self, f"_op_{op}", None)
            if act is None:
                raise WireError(f"a rank asks for {op!r}, which this version does not know")
            answer, payloads = act(session, request)
        except PlanariaError as error:
            answer = {"error": [type(error).__name__, str(error)]}
        except MALFORMED as error:
            answer = {"error": ["WireError", f"a malformed request {op!r}: {error!r}"]}
        try:
            connection.send(answer, payloads, deadline=Deadline(_ANSWER_S))
            if op == "memory":
                _send_fd(raw, self._memory.fd)
        except BaseException:
            if "error" not in answer:
                self._take_back(str(op), session, request.header, answer)
            raise
        if op == "stop":
            self._stop()

    def _take_back(
        self, op: str, session: Session, request: dict[str, Any], answer: dict[str, Any]
    ) -> None:
        """A rank that waits no more does not know what it was given."""
        if op in ("begin", "hold"):
            key = Key.from_json(request["key"])
            if op == "begin":
                self._leave(session, key, str(request["file"]))
            if op == "hold" or request.get("hold"):
                self._let_go(session, key)
        elif op == "fetch" and answer["span"] is not None:
            self._free(session, Span(*answer["span"]))

    # Requests. Each gets the session and the message, and gives header and payloads.

    def _op_memory(self, session: Session, request: Message) -> Answer:
        place = [self._words.offset, self._words.nbytes]
        return {"nbytes": self._memory.nbytes, "words": place, "slot": session.slot}, ()

    def _op_configure(self, session: Session, request: Message) -> Answer:
        h = request.header
        scheme = Scheme(int(h["losses"]), int(h["group_size"]))
        members = [Member.from_json(m) for m in h["members"]]
        self._node.configure(members, scheme, int(h["files"]))
        self._members = members
        return {}, ()

    def _op_begin(self, session: Session, request: Message) -> Answer:
        h = request.header
        key, file = Key.from_json(h["key"]), str(h["file"])
        span = self._node.begin(key, file, int(h["nbytes"]), deadline=_deadline(h))
        if not session.given(session.open, (key, file)):  # it died while it waited
            self._node.leave(key, file)
            raise WireError(f"{session.name} is gone")
        # The next image and the parity of both come after this one.
        self._prefault.want(_IMAGES * self._memory.used)
        if h.get("hold"):
            self._hold(session, key)
        return {"span": [span.offset, span.nbytes]}, ()

    def _op_seal(self, session: Session, request: Message) -> Answer:
        h = request.header
        key, file = Key.from_json(h["key"]), str(h["file"])
        sums = checksum.unpack(h["checksums"])
        self._node.seal(key, file, sums, int(h["chunk_nbytes"]), int(h["data_start"]))
        session.taken(session.open, (key, file))
        self.sessions.sealed(key)
        return {}, ()

    def _op_leave(self, session: Session, request: Message) -> Answer:
        self._leave(session, Key.from_json(request.header["key"]), str(request.header["file"]))
        return {}, ()

    def _op_describe(self, session: Session, request: Message) -> Answer:
        key = Key.from_json(request.header["key"])
        manifest, root = bytes(request.payloads[0]), request.header.get("persist")
        self._node.describe(key, manifest)
        if root is not None:
            self._persisting.start(key, str(root), self._members, manifest)
        self.sessions.settled(key)
        return {}, ()

    def _op_abort(self, session: Session, request: Message) -> Answer:
        key = Key.from_json(request.header["key"])
        self._node.abort(key, str(request.header["why"]))
        self.sessions.settled(key)
        return {}, ()

    def _op_wait(self, session: Session, request: Message) -> Answer:
        key = Key.from_json(request.header["key"])
        self._node.wait(key, _deadline(request.header))
        self.sessions.settled(key)
        return {}, ()

    def _op_persisted(self, session: Session, request: Message) -> Answer:
        key = Key.from_json(request.header["key"])
        self._persisting.wait(key, _deadline(request.header))
        return {}, ()

    def _op_settle(self, session: Session, request: Message) -> Answer:
        self._persisting.settle(_deadline(request.header))
        return {}, ()

    def _op_hold(self, session: Session, request: Message) -> Answer:
        self._hold(session, Key.from_json(request.header["key"]))
        return {}, ()

    def _op_let_go(self, session: Session, request: Message) -> Answer:
        self._let_go(session, Key.from_json(request.header["key"]))
        return {}, ()

    def _op_recoverable(self, session: Session, request: Message) -> Answer:
        found = self._node.recoverable(_deadline(request.header))
        listed = [[s.key.to_json(), s.files, s.lost, s.sequence] for s in found]
        return {"snapshots": listed}, [s.manifest for s in found]

    def _op_local(self, session: Session, request: Message) -> Answer:
        h = request.header
        span = self._node.local_span(Key.from_json(h["key"]), str(h["file"]))
        return {"span": None if span is None else [span.offset, span.nbytes]}, ()

    def _op_fetch(self, session: Session, request: Message) -> Answer:
        """Reads into shared memory if there is room, else the bytes go through the socket."""
        h = request.header
        key, file, offset = Key.from_json(h["key"]), str(h["file"]), int(h["offset"])
        deadline, nbytes = _deadline(h), int(h["nbytes"])
        try:
            span = self._memory.allocate(nbytes)
        except MemoryBudgetError:
            data = bytearray(nbytes)
            self._node.read(key, file, offset, memoryview(data), deadline)
            return {"span": None}, [data]
        try:
            into = self._memory.view(span).data
            self._node.read(key, file, offset, into, deadline)
        except BaseException:
            self._memory.free(span)
            raise
        if not session.given(session.scratch, span):
            self._memory.free(span)
            raise WireError(f"{session.name} is gone")
        return {"span": [span.offset, span.nbytes]}, ()

    def _op_free(self, session: Session, request: Message) -> Answer:
        offset, nbytes = request.header["span"]
        self._free(session, Span(int(offset), int(nbytes)))
        return {}, ()

    def _op_status(self, session: Session, request: Message) -> Answer:
        used = self._memory.used - self._words.nbytes
        answer = {"used": used, "ranks": self.sessions.names, "held_s": self._pace.held_s}
        return {**self._about, **answer, "alone_s": self.sessions.alone_s}, ()

    def _op_part(self, session: Session, request: Message) -> Answer:
        session.parted = True
        return {}, ()

    def _op_stop(self, session: Session, request: Message) -> Answer:
        session.parted = True
        return {}, ()

    def _leave(self, session: Session, key: Key, file: str) -> None:
        if session.taken(session.open, (key, file)):
            self._node.leave(key, file)

    def _hold(self, session: Session, key: Key) -> None:
        self._node.hold(key)
        if not session.given(session.held, key):
            self._node.let_go(key)
            raise WireError(f"{session.name} is gone")

    def _let_go(self, session: Session, key: Key) -> None:
        if session.taken(session.held, key):
            self._node.let_go(key)

    def _free(self, session: Session, span: Span) -> None:
        if session.taken(session.scratch, span):
            self._memory.free(span)


def _deadline(header: dict[str, Any]) -> Deadline:
    return Deadline(min(float(header["timeout"]), _LONG_S))


def _send_fd(sock: socket.socket, fd: int) -> None:
    # One byte on a quiet connection: there is room for it at once.
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    poll.poll(_ANSWER_S * 1e3)
    socket.send_fds(sock, [b"\0"], [fd])
