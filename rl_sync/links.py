"""How the trainer's ranks agree on a version: rank 0 collects, decides and tells.

Each other rank holds two connections to rank 0: over one it says what it has prepared and hears
whether that counts, over the other rank 0 asks for what it keeps (folded deltas, full versions).
Nothing of this is a collective, so it may run beside those of the training.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from planaria.core import rpc, wire
from planaria.core.connection import Connection
from planaria.core.deadline import Deadline
from planaria.errors import DeadlineError, PlanariaError, SyncError, WireError
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
        return [(int(n), str(h)) for n, h in header["models"]], _entries(header["entries"])

    def full(self, version: int) -> list[Entry]:
        """See `Owner.full`."""
        return _entries(self._call({"op": "full", "version": version})[0]["entries"])

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
        self._said: dict[tuple[str, int], tuple[dict[str, Any], list[bytearray]]] = {}
        self._decisions: OrderedDict[str, _Decision] = OrderedDict()
        self._answering = 0
        self._open: list[Connection] = []
        self._closed = False
        self.owners = {rank: RemoteOwner(rank, timeout) for rank in range(1, world)}
        self._listener = wire.listen(host, 0, token=token, limits=rpc.LIMITS)
        self.address = self._listener.address
        threading.Thread(target=self._accept, name="planaria-rl-ranks", daemon=True).start()

    def collect(
        self, what: str, deadline: Deadline
    ) -> dict[int, tuple[dict[str, Any], list[bytearray]]]:
        """Waits for what every other rank says of something.

        Raises:
            SyncError: A rank failed.
            DeadlineError: A rank said nothing in time.
        """

        def missing() -> list[int]:
            return [r for r in self.owners if (what, r) not in self._said]

        def failed() -> str | None:
            for (about, rank), (header, _) in self._said.items():
                if about == what and "failed" in header:
                    return f"trainer rank {rank}: {header['failed']}"
            return None

        with self._changed:
            self._changed.wait_for(lambda: failed() or not missing(), timeout=deadline.timeout())
            problem = failed()
            if problem:
                raise SyncError(problem)
            if missing():
                raise deadline.error(f"trainer ranks {missing()} to prepare {what}")
            return {r: self._said.pop((what, r)) for r in self.owners}

    def decide(self, what: str, answer: dict[str, Any]) -> None:
        """Tells every rank that prepared it, now or later, what became of it."""
        with self._changed:
            self._decisions[what] = _Decision(answer)
            self._decisions.move_to_end(what)
            while len(self._decisions) > _KEPT:
                self._decisions.popitem(last=False)
            self._said = {key: v for key, v in self._said.items() if key[0] != what}
            self._changed.notify_all()

    def close(self) -> None:
        """Ends it, once the ranks that wait for a decision were told."""
        with self._changed:
            self._closed = True
        self._listener.close()
        with self._changed:
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._answering, timeout=self._timeout)
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
                    time.sleep(0.05)  # out of descriptors, say
                continue
            with self._changed:
                if self._closed:
                    connection.close()
                    return
                self._open.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        with contextlib.suppress(PlanariaError, OSError, KeyError, TypeError, ValueError):
            hello = connection.recv(Deadline(self._timeout)).header
            rank = int(hello["rank"])
            if hello["service"]:
                self.owners[rank].connected(connection)
                connection.send({}, deadline=Deadline(self._timeout))
                return
            connection.send({}, deadline=Deadline(self._timeout))
            rpc.serve(
                connection,
                lambda h, p: self._said_by(rank, h, p),
                lambda: Deadline(_IDLE_S),
                answering=self._count,
            )

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

        def decision() -> _Decision | None:
            made = self._decisions.get(what)
            return None if made is None or rank in made.told else made

        with self._changed:
            if decision() is None:
                self._said[what, rank] = header, payloads
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
                return {"models": models, "entries": [_listed(e) for e in entries]}, ()
            if header["op"] == "full":
                return {"entries": [_listed(e) for e in owner.full(header["version"])]}, ()
            return {}, owner.read(header["base"], header["version"], header["numbers"])

        def work() -> None:
            with contextlib.suppress(PlanariaError, OSError):
                rpc.serve(self._service, handle, lambda: Deadline(_IDLE_S))

        threading.Thread(target=work, name="planaria-rl-owner", daemon=True).start()

    def say(
        self, what: str, header: dict[str, Any], payloads: Sequence[bytes], deadline: Deadline
    ) -> dict[str, Any]:
        """Says what was prepared and waits for the decision.

        Raises:
            SyncError: It does not count: another rank failed.
            DeadlineError: There was no decision in time.
        """
        answer = rpc.call(
            self._control,
            {"what": what, **header},
            payloads,
            deadline=deadline,
            otherwise=SyncError,
        ).header
        if "refused" in answer:
            raise SyncError(f"{what} was not published: {answer['refused']}")
        return answer

    def close(self) -> None:
        """Ends it."""
        self._control.close()
        self._service.close()


def _listed(entry: Entry) -> list[Any]:
    return [entry.block, entry.codec, entry.model, entry.nbytes, entry.changed, entry.hash]


def _entries(raw: Any) -> list[Entry]:
    return [Entry(*each) for each in raw]


def part_to_json(models: list[bytes], entries: list[Entry]) -> dict[str, Any]:
    """A rank's part of a version, for a message; models and payloads go beside it."""
    return {"models": len(models), "entries": [_listed(e) for e in entries]}


def part_from_json(raw: dict[str, Any]) -> tuple[int, list[Entry]]:
    """How many of the message's payloads are models, and the entries of the others."""
    return int(raw["models"]), _entries(raw["entries"])
