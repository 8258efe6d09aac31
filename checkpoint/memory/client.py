"""A rank's side of its node's snapshot process."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planaria import errors
from planaria.checkpoint.format import checksum
from planaria.checkpoint.memory import communicating
from planaria.checkpoint.memory.arena import Mapping
from planaria.checkpoint.memory.courtesy import Marks, Words
from planaria.checkpoint.memory.memory import Key, Member, Scheme, Span
from planaria.checkpoint.memory.meta import Snapshot
from planaria.checkpoint.memory.runtime import Place
from planaria.checkpoint.memory.server import LIMITS
from planaria.core.byte_stream import Buffer
from planaria.core.connection import Connection, Message
from planaria.core.deadline import Deadline
from planaria.errors import PlanariaError, WireError

#: What a short request may take: the process answers at once, unless it is stuck or stopped.
ANSWER_S = 20.0
_GRACE_S = 5.0


class NodeClient:
    """A connection to a snapshot process, and a view of its memory. Thread-safe.

    Requests that are under way at a time go over connections of their own, so that one that waits
    holds up nobody.

    Args:
        place: Where the process is found.
        token: The job's token.
        name: How this rank is called in messages.
        deadline: When to give up.
        watches: Whether it only looks: then it is no rank, for which the process would stay.

    Raises:
        OSError: Nobody listens there.
        WireError: It is not of this job, or left.
        DeadlineError: It does not answer.
    """

    def __init__(
        self, place: Place, token: bytes, name: str, deadline: Deadline, *, watches: bool = False
    ) -> None:
        self._place, self._token, self._name = place, token, name
        self._watches = watches
        self._id = secrets.token_hex(8)
        self._all: set[Connection] = set()
        self._idle: list[Connection] = []
        self._closed = False
        self._lock = threading.Lock()
        self._main, raw, about = self._connect(deadline, main=True)
        self.uuid = str(about["uuid"])
        self.member = Member.from_json(about["member"])
        self.pid = int(about["pid"])
        try:
            memory = _checked(_ask(self._main, {"op": "memory"}, (), deadline)).header
            self.memory = Mapping(_receive_fd(raw, deadline))
            words = Words(self.memory.view(Span(*memory["words"])))
            self.marks = Marks(words, int(memory["slot"]))
            if not watches:
                communicating.add(self.marks)
        except BaseException:
            self.close()
            raise
        finally:
            raw.close()

    def configure(self, members: Sequence[Member], scheme: Scheme, files: int) -> None:
        """See `SnapshotNode.configure`."""
        self._request(
            {
                "op": "configure",
                "members": [m.to_json() for m in members],
                "losses": scheme.losses,
                "group_size": scheme.group_size,
                "files": files,
            }
        )

    def begin(
        self, key: Key, file: str, nbytes: int, deadline: Deadline, *, hold: bool = False
    ) -> NDArray[np.uint8]:
        """Room for this rank's image, uint8[nbytes].

        Args:
            key: The snapshot.
            file: The image's name.
            nbytes: Its length.
            deadline: How long to wait for the memory of an older one.
            hold: Whether to keep it until `let_go`, also when newer ones are there.

        Raises:
            MemoryBudgetError: There is no room.
        """
        request = {"op": "begin", "key": key.to_json(), "file": file, "nbytes": nbytes}
        answer = self._request({**request, "hold": hold}, wait=deadline).header
        return self.memory.view(Span(*answer["span"]))

    def seal(
        self, key: Key, file: str, checksums: Sequence[int], chunk_nbytes: int, data_start: int
    ) -> None:
        """The image is complete; nothing is written to it any more."""
        packed = checksum.pack(list(checksums))
        self._request(
            {"op": "seal", "key": key.to_json(), "file": file, "checksums": packed,
             "chunk_nbytes": chunk_nbytes, "data_start": data_start}
        )  # fmt: skip

    def leave(self, key: Key, file: str) -> None:
        """This rank does not write to its image any more, and has not completed it."""
        self._request({"op": "leave", "key": key.to_json(), "file": file})

    def describe(
        self, key: Key, manifest: bytes, deadline: Deadline, *, persist: str | None = None
    ) -> None:
        """Gives the snapshot its manifest, on all nodes: from here on ranks are not needed.

        Args:
            key: The snapshot.
            manifest: Its manifest.
            deadline: When to give up.
            persist: Root to which the nodes write it, too, once they have it.
        """
        request = {"op": "describe", "key": key.to_json(), "persist": persist}
        self._request(request, [manifest], wait=deadline)

    def persisted(self, key: Key, deadline: Deadline) -> None:
        """Returns once the nodes have written and committed it; of the node of rank 0.

        Raises:
            SaveFailedError: They could not; says why.
        """
        self._request({"op": "persisted", "key": key.to_json()}, wait=deadline)

    def settle(self, deadline: Deadline) -> None:
        """Returns once the node writes nothing any more that an earlier life of the job left."""
        self._request({"op": "settle"}, wait=deadline)

    def abort(self, key: Key, why: str) -> None:
        """Forgets the attempt on all nodes."""
        self._request({"op": "abort", "key": key.to_json(), "why": why})

    def wait(self, key: Key, deadline: Deadline) -> None:
        """Returns once the snapshot is committed on all nodes.

        Raises:
            SaveFailedError: It will not be; says why.
        """
        self._request({"op": "wait", "key": key.to_json()}, wait=deadline)

    def hold(self, key: Key) -> None:
        """Keeps the snapshot's memory until `let_go`, or until this process ends."""
        self._request({"op": "hold", "key": key.to_json()})

    def let_go(self, key: Key) -> None:
        """Ends one `hold`."""
        self._request({"op": "let_go", "key": key.to_json()})

    def recoverable(self, deadline: Deadline) -> list[Snapshot]:
        """The snapshots that can be read, the newest first."""
        answer = self._request({"op": "recoverable"}, wait=deadline)
        return [
            Snapshot(Key.from_json(key), bytes(manifest), files, lost, sequence)
            for (key, files, lost, sequence), manifest in zip(
                answer.header["snapshots"], answer.payloads, strict=True
            )
        ]

    def local(self, key: Key, file: str) -> NDArray[np.uint8] | None:
        """An image that lies in this node's memory; to be held while it is looked at."""
        span = self._request({"op": "local", "key": key.to_json(), "file": file}).header["span"]
        return None if span is None else self.memory.view(Span(*span))

    def fetch(self, key: Key, file: str, offset: int, into: memoryview, deadline: Deadline) -> None:
        """Reads a part of a file of a snapshot, from other nodes or what is left of them.

        Raises:
            CorruptError: Too much of it is lost.
        """
        answer = self._request(
            {"op": "fetch", "key": key.to_json(), "file": file, "offset": offset,
             "nbytes": len(into)},
            wait=deadline,
        )  # fmt: skip
        span = answer.header["span"]
        if span is None:
            into[:] = answer.payloads[0]
            return
        np.copyto(np.frombuffer(into, dtype=np.uint8), self.memory.view(Span(*span)))
        self._request({"op": "free", "span": span})

    def status(self, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """What the process says of itself, if it does so in time."""
        return self._request({"op": "status"}, limit=Deadline(timeout_s)).header

    def stop(self) -> None:
        """Asks the process to end; what it holds is lost."""
        with contextlib.suppress(WireError):
            self._request({"op": "stop"})

    def close(self, *, part: bool = False) -> None:
        """Ends the session.

        Args:
            part: Whether the job ends here: the process ends once all of its ranks have said so.
        """
        if part:
            with contextlib.suppress(PlanariaError):
                _ask(self._main, {"op": "part"}, (), Deadline(ANSWER_S))
        with self._lock:
            connections, self._all, self._idle = self._all, set(), []
            self._closed = True
        for connection in connections:
            connection.close()
        if hasattr(self, "memory"):
            self.memory.close()

    def _request(
        self,
        header: dict[str, Any],
        payloads: Sequence[Buffer] = (),
        wait: Deadline | None = None,
        limit: Deadline | None = None,
    ) -> Message:
        """Asks, and raises here what went wrong there.

        Args:
            header: The request.
            payloads: Its payloads.
            wait: How long it may take there, where it has something to wait for.
            limit: When to give up here, where it has not.
        """
        if limit is None:
            limit = Deadline(ANSWER_S if wait is None else wait.remaining() + _GRACE_S)
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            connection, raw, _ = self._connect(limit, main=False)
            raw.close()
        if wait is not None:
            header = {**header, "timeout": wait.remaining()}
        try:
            answer = _ask(connection, header, payloads, limit)
        except BaseException:  # what is asked next must not get the answer to this
            connection.close()
            with self._lock:
                self._all.discard(connection)
            raise
        with self._lock:
            self._idle.append(connection)
        return _checked(answer)

    def _connect(
        self, deadline: Deadline, *, main: bool
    ) -> tuple[Connection, socket.socket, dict[str, Any]]:
        try:
            sock = self._place.connect(deadline)
        except OSError as error:
            if main:
                raise
            raise WireError(f"{self._name}: its snapshot process is gone ({error})") from error
        raw = sock.dup()
        connection = Connection(
            sock, server=False, token=self._token, peer="the snapshot process", limits=LIMITS
        )
        try:
            hello = {"client": self._id, "main": main, "name": self._name,
                     "watches": self._watches}  # fmt: skip
            about = _checked(_ask(connection, hello, (), deadline)).header
        except BaseException:
            raw.close()
            connection.close()
            raise
        with self._lock:
            self._all.add(connection)
            closed = self._closed
        if closed:
            raw.close()
            connection.close()
            raise WireError(f"{self._name}: its connection to the snapshot process was closed")
        return connection, raw, about


def _ask(
    connection: Connection, header: dict[str, Any], payloads: Sequence[Buffer], deadline: Deadline
) -> Message:
    connection.send(header, payloads, deadline=deadline)
    return connection.recv(deadline)


def _checked(answer: Message) -> Message:
    """Raises here what went wrong there."""
    if "error" in answer.header:
        kind, message = answer.header["error"]
        known = getattr(errors, str(kind), PlanariaError)
        is_ours = isinstance(known, type) and issubclass(known, PlanariaError)
        raise known(message) if is_ours else PlanariaError(message)
    return answer


def _receive_fd(sock: socket.socket, deadline: Deadline) -> int:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    if not poll.poll(deadline.timeout() * 1e3):
        raise deadline.error("the memory of the snapshot process")
    _, fds, _, _ = socket.recv_fds(sock, 1, 1)
    if len(fds) != 1:
        raise WireError("the snapshot process sent no memory")
    os.set_inheritable(fds[0], False)
    return fds[0]
