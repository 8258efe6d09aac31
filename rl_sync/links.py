"""How the trainer's ranks agree on a version: rank 0 collects, decides and tells.

Each other rank holds two connections to rank 0: over one it says what it has prepared and hears
whether that counts, over the other rank 0 asks for what it keeps (folded deltas, full versions).
Nothing of this is a collective, so it may run beside those of the training.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from planaria.core import rpc, wire
from planaria.core.acceptor import Acceptor
from planaria.core.connection import Connection
from planaria.core.deadline import Deadline
from planaria.errors import PlanariaError, SyncError
from planaria.rl_sync.versions.encoding import Encoded
from planaria.rl_sync.versions.manifest import Entry
from planaria.rl_sync.versions.owner import LocalOwner

_IDLE_S = 7 * 86400.0
_KEPT = 8


class RemoteOwner:
    """Another rank's part, asked for over its connection; deltas as published are kept here."""

    def __init__(self, rank: int, timeout: float) -> None:
        self.rank, self._timeout = rank, timeout
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._published: OrderedDict[tuple[int, int], list[bytes]] = OrderedDict()

    def connected(self, connection: Connection) -> None:
        """Takes the connection over which the rank answers."""
        self._connection = connection

    def keep(self, base: int, version: int, payloads: list[bytes]) -> None:
        """Keeps a published delta's payloads, models first."""
        with self._lock:
            self._published[base, version] = payloads
            while len(self._published) > _KEPT:
                self._published.popitem(last=False)

    def delta(self, base: int, version: int) -> tuple[list[tuple[int, str]], list[Entry]]:
        """See `Owner.delta`."""
        header = self._call({"op": "delta", "base": base, "version": version})[0]
        entries = [Entry.from_json(e) for e in header["entries"]]
        return [(int(n), str(h)) for n, h in header["models"]], entries

    def full(self, version: int) -> list[Entry]:
        """See `Owner.full`."""
        found = self._call({"op": "full", "version": version})[0]["entries"]
        return [Entry.from_json(e) for e in found]

    def read(self, base: int | None, version: int, numbers: Sequence[int]) -> list[bytes]:
        """See `Owner.read`."""
        if base is not None:
            with self._lock:
                kept = self._published.get((base, version))
            if kept is not None:
                return [kept[n] for n in numbers]
        request = {"op": "read", "base": base, "version": version, "numbers": list(numbers)}
        return [bytes(p) for p in self._call(request)[1]]

    def _call(self, request: dict[str, Any]) -> tuple[dict[str, Any], list[bytearray]]:
        with self._lock:
            if self._connection is None:
                raise SyncError(f"trainer rank {self.rank} is not connected")
            deadline = Deadline(self._timeout)
            message = rpc.call(self._connection, request, deadline=deadline, otherwise=SyncError)
            return message.header, message.payloads


@dataclass
class _Decision:
    """What became of an attempt; a rank that was told asks about its next attempt."""

    answer: dict[str, Any]
    told: set[int] = field(default_factory=set)


class RankHub:
    """Rank 0's side."""

    def __init__(self, world: int, host: str, token: bytes | None, timeout: float) -> None:
        self._timeout = timeout
        self._changed = threading.Condition()
        self._said: dict[tuple[str, int], tuple[dict[str, Any], list[Encoded]]] = {}
        self._parts: dict[int, tuple[str, list[Encoded]]] = {}
        self._following: tuple[str, Callable[[Encoded], None]] | None = None
        self._gone: set[int] = set()
        self._decisions: OrderedDict[str, _Decision] = OrderedDict()
        self._answering = 0
        self._services: list[Connection] = []
        self._closed = False
        self.owners = {rank: RemoteOwner(rank, timeout) for rank in range(1, world)}
        listener = wire.listen(host, 0, token=token, limits=rpc.LIMITS)
        self.address = listener.address
        self._acceptor = Acceptor(listener, self._serve, "planaria-rl-ranks")

    def collect(self, what: str, deadline: Deadline) -> dict[int, tuple[dict[str, Any], Encoded]]:
        """Waits for what every other rank says of something, and gives its parts put together.

        Raises:
            SyncError: A rank failed, or is gone.
            DeadlineError: A rank said nothing in time.
        """

        def missing() -> list[int]:
            return [r for r in self.owners if (what, r) not in self._said]

        def failed() -> str | None:
            for (about, rank), (header, _) in self._said.items():
                if about == what and "failed" in header:
                    return f"trainer rank {rank}: {header['failed']}"
            lost = self._gone.intersection(missing())
            return f"trainer rank {min(lost)} is gone; see its log" if lost else None

        with self._changed:
            self._changed.wait_for(lambda: failed() or not missing(), timeout=deadline.timeout())
            problem = failed()
            if problem:
                raise SyncError(problem)
            if missing():
                raise deadline.error(f"trainer ranks {missing()} to prepare {what}")
            said = {r: self._said.pop((what, r)) for r in self.owners}
        found = {}
        for rank, (header, parts) in said.items():
            whole = Encoded()
            for part in parts:
                whole.extend(part)
            found[rank] = header, whole
        return found

    def follow(self, what: str, taken: Callable[[Encoded], None]) -> None:
        """Hands on the parts that other ranks have of something, now and as they come."""
        with self._changed:
            self._following = what, taken
            ready = [*self._parts.values(), *((k[0], said[1]) for k, said in self._said.items())]
            for about, parts in ready:
                for part in parts if about == what else ():
                    taken(part)

    def decide(self, what: str, answer: dict[str, Any]) -> None:
        """Tells every rank that prepared it, now or later, what became of it."""
        with self._changed:
            self._decisions[what] = _Decision(answer)
            self._decisions.move_to_end(what)
            while len(self._decisions) > _KEPT:
                self._decisions.popitem(last=False)
            if self._following is not None and self._following[0] == what:
                self._following = None
            self._said = {key: v for key, v in self._said.items() if key[0] != what}
            self._changed.notify_all()

    def close(self) -> None:
        """Ends it, once the ranks that wait for a decision were told."""
        with self._changed:
            self._closed = True
        self._acceptor.stop()
        with self._changed:
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._answering, timeout=self._timeout)
            services = list(self._services)
        self._acceptor.close()
        for connection in services:
            connection.close()

    def _serve(self, connection: Connection) -> None:
        rank = -1
        with contextlib.suppress(PlanariaError, OSError, KeyError, TypeError, ValueError):
            hello = connection.recv(Deadline(self._timeout)).header
            if hello["service"]:
                with self._changed:
                    self._services.append(connection)
                self.owners[int(hello["rank"])].connected(connection)
                connection.send({}, deadline=Deadline(self._timeout))
                return
            rank = int(hello["rank"])
            connection.send({}, deadline=Deadline(self._timeout))
            rpc.serve(
                connection,
                lambda h, p: self._said_by(rank, h, p),
                lambda: Deadline(_IDLE_S),
                answering=self._count,
            )
        connection.close()
        with self._changed:
            self._gone.add(rank)
            self._changed.notify_all()

    @contextlib.contextmanager
    def _count(self) -> Iterator[None]:
        with self._changed:
            self._answering += 1
        try:
            yield
        finally:
            with self._changed:
                self._answering -= 1
                self._changed.notify_all()

    def _said_by(self, rank: int, header: dict[str, Any], payloads: list[bytearray]) -> rpc.Reply:
        what, deadline = str(header["what"]), rpc.budget(header, 3600.0)
        if "part" in header:
            return self._part_of(rank, what, int(header["part"]), part_of(header, payloads))

        def decision() -> _Decision | None:
            made = self._decisions.get(what)
            return None if made is None or rank in made.told else made

        with self._changed:
            about, parts = self._parts.pop(rank, (what, []))
            if decision() is None:
                if about != what or len(parts) != header.get("parts", 0):
                    header, parts = {"failed": f"not all of its parts of {what} came"}, []
                self._said[what, rank] = header, parts
                self._changed.notify_all()
                self._changed.wait_for(lambda: decision() or self._closed, deadline.timeout())
            made = decision()
            if made is not None:
                made.told.add(rank)
                return made.answer, ()
            self._said.pop((what, rank), None)
            if self._closed:
                raise SyncError(f"rank 0 closed its publisher before it decided on {what}")
            raise deadline.error(f"rank 0 to decide on {what}")

    def _part_of(self, rank: int, what: str, number: int, part: Encoded) -> rpc.Reply:
        with self._changed:
            if number == 0:
                self._parts[rank] = what, []
            about, parts = self._parts.get(rank, (what, []))
            if about == what and number == len(parts):
                parts.append(part)
                if self._following is not None and self._following[0] == what:
                    self._following[1](part)
        return {}, ()


class RankLink:
    """Another rank's side."""

    def __init__(
        self, rank: int, address: tuple[str, int], token: bytes | None, deadline: Deadline
    ) -> None:
        self.rank = rank
        self._control, self._service = (
            wire.connect(*address, token=token, deadline=deadline, limits=rpc.LIMITS)
            for _ in range(2)
        )
        for connection, service in ((self._control, False), (self._service, True)):
            connection.send({"rank": rank, "service": service}, deadline=deadline)
            connection.recv(deadline)

    def serve(self, owner: LocalOwner) -> None:
        """Answers rank 0 in the background from now on."""

        def handle(header: dict[str, Any], payloads: list[bytearray]) -> rpc.Reply:
            if header["op"] == "delta":
                models, entries = owner.delta(header["base"], header["version"])
                return {"models": models, "entries": [e.to_json() for e in entries]}, ()
            if header["op"] == "full":
                return {"entries": [e.to_json() for e in owner.full(header["version"])]}, ()
            return {}, owner.read(header["base"], header["version"], header["numbers"])

        def work() -> None:
            with contextlib.suppress(PlanariaError, OSError):
                rpc.serve(self._service, handle, lambda: Deadline(_IDLE_S))

        threading.Thread(target=work, name="planaria-rl-owner", daemon=True).start()

    def say(self, what: str, header: dict[str, Any], deadline: Deadline) -> dict[str, Any]:
        """Says that all was prepared, and in how many `parts`, and waits for the decision.

        Raises:
            SyncError: It does not count: another rank failed.
            DeadlineError: There was no decision in time.
        """
        answer = rpc.call(
            self._control,
            {"what": what, **header},
            deadline=deadline,
            otherwise=SyncError,
        ).header
        if "refused" in answer:
            raise SyncError(f"{what} was not published: {answer['refused']}")
        return answer

    def part(self, what: str, number: int, part: Encoded, deadline: Deadline) -> None:
        """Hands over a part of what is being prepared; the first has number 0."""
        header = {
            "what": what, "part": number, "models": len(part.models),
            "entries": [e.to_json() for e in part.entries],
        }  # fmt: skip
        payloads = [*part.models, *part.payloads]
        rpc.call(self._control, header, payloads, deadline=deadline, otherwise=SyncError)

    def close(self) -> None:
        """Ends it."""
        self._control.close()
        self._service.close()


def part_of(header: dict[str, Any], payloads: Sequence[bytes | bytearray]) -> Encoded:
    """A rank's part of a version, from its message.

    Raises:
        ValueError: It is not one.
    """
    models, data = int(header["models"]), [bytes(p) for p in payloads]
    entries = [Entry.from_json(e) for e in header["entries"]]
    if not 0 <= models <= len(data) == models + len(entries):
        raise ValueError("a part has other payloads than it says")
    return Encoded(data[:models], entries, data[models:])
