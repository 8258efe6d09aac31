"""A node's calls to others and to itself, several at a time, and its background threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from planaria.checkpoint.memory.courtesy import Pace
from planaria.checkpoint.memory.memory import Peers, Reply
from planaria.core.byte_stream import Buffer
from planaria.core.deadline import Deadline
from planaria.errors import PlanariaError, WireError

Serve = Callable[[dict[str, Any], Sequence[Buffer]], Reply]

_AT_A_TIME = 32
# Whoever waits for another node's word asks for it after so long without any.
_ASK_AFTER_S = 0.5


class Links:
    """How one node reaches all, itself included. Thread-safe."""

    def __init__(
        self,
        uuid: str,
        peers: Peers,
        serve: Serve,
        timeout_s: float,
        pace: Pace | None = None,
    ) -> None:
        self.uuid = uuid
        self.peers = peers
        self.timeout_s = timeout_s
        self.pace = pace or Pace()
        self.ask_after_s = _ASK_AFTER_S
        self.closed = False
        self._serve = serve
        self._pool = ThreadPoolExecutor(_AT_A_TIME, f"planaria-memory-{uuid}-call")

    def deadline(self) -> Deadline:
        """The budget of one phase of the protocol."""
        return Deadline(self.timeout_s)

    def call(
        self,
        uuid: str,
        request: dict[str, Any],
        payloads: Sequence[Buffer] = (),
        *,
        deadline: Deadline,
        paced: bool = False,
        into: Sequence[memoryview[Any]] = (),
    ) -> Reply:
        """Has a node answer a request; see `Peers.call` for the errors."""
        if paced:
            self.pace.take(sum(memoryview(each).nbytes for each in payloads), deadline)
        if self.closed:
            raise WireError(f"node {self.uuid} is closed")
        if uuid == self.uuid:
            return self._serve(request, payloads)
        return self.peers.call(uuid, request, payloads, deadline, into)

    def submit(
        self,
        uuid: str,
        request: dict[str, Any],
        payloads: Sequence[Buffer] = (),
        *,
        deadline: Deadline,
        paced: bool = False,
        into: Sequence[memoryview[Any]] = (),
    ) -> Future[Reply]:
        """As `call`, in the background."""
        work = partial(
            self.call, uuid, request, payloads, deadline=deadline, paced=paced, into=into
        )
        return self.run(work)

    def run(self, work: Callable[[], Reply]) -> Future[Reply]:
        """Does in the background what a call is answered by."""
        try:
            return self._pool.submit(work)
        except RuntimeError:  # the pool is shut down
            refused: Future[Reply] = Future()
            refused.set_exception(WireError(f"node {self.uuid} is closed"))
            return refused

    def ask(
        self,
        uuids: Iterable[str],
        request: dict[str, Any],
        payloads: Sequence[Buffer] = (),
        *,
        deadline: Deadline,
    ) -> dict[str, Reply | PlanariaError]:
        """Asks several nodes at the same time; one that fails has its error for an answer."""
        others = list(dict.fromkeys(uuids))
        waiting = {
            uuid: self.submit(uuid, request, payloads, deadline=deadline)
            for uuid in others
            if uuid != self.uuid
        }
        answers: dict[str, Reply | PlanariaError] = {}
        if self.uuid in others:  # itself meanwhile
            try:
                answers[self.uuid] = self.call(self.uuid, request, payloads, deadline=deadline)
            except PlanariaError as error:
                answers[self.uuid] = error
        answers |= settled(waiting)
        return {uuid: answers[uuid] for uuid in others}

    def spawn(self, name: str, work: Callable[..., object], *args: Any) -> None:
        """Runs something in a thread of its own."""
        label = f"planaria-memory-{self.uuid}-{name}"
        threading.Thread(target=work, args=args, name=label, daemon=True).start()

    def close(self) -> None:
        """Makes no further calls; those under way end by their deadlines."""
        self.closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)


def answer_of(coming: Future[Reply]) -> Reply:
    """Waits for an answer; see `Peers.call` for the errors."""
    try:
        return coming.result()
    except CancelledError:
        raise WireError("this node was closed") from None


def settled(coming: dict[str, Future[Reply]]) -> dict[str, Reply | PlanariaError]:
    """Waits for several answers; one that fails has its error for an answer."""
    answers: dict[str, Reply | PlanariaError] = {}
    for uuid, future in coming.items():
        try:
            answers[uuid] = answer_of(future)
        except PlanariaError as error:
            answers[uuid] = error
    return answers


def failures(answers: dict[str, Reply | PlanariaError]) -> str:
    """What went wrong at whom, as one text; empty if nothing did."""
    wrong = {uuid: each for uuid, each in answers.items() if isinstance(each, PlanariaError)}
    return "; ".join(f"node {uuid}: {error}" for uuid, error in wrong.items())
