"""Requests and replies over an authenticated connection, with errors that cross it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from planaria import errors
from planaria.core.byte_stream import Buffer
from planaria.core.connection import Connection, Limits, Message
from planaria.core.deadline import Deadline
from planaria.errors import PlanariaError, WireError

#: What a side takes: a batch of payloads, never a whole model at once.
LIMITS = Limits(header_bytes=1 << 20, payload_bytes=1 << 30, payloads=1 << 14)

Reply = tuple[dict[str, Any], Sequence[Buffer]]
Handler = Callable[[dict[str, Any], list[bytearray]], Reply]

#: What a handler that takes requests as they come stumbles over.
MALFORMED = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, MemoryError)

# Errors that are raised on the other side as what they are, beside those of its own kind.
_CROSSING = ("NotCommittedError", "DeadlineError", "CorruptError")


def call(
    connection: Connection,
    request: dict[str, Any],
    payloads: Sequence[Buffer] = (),
    *,
    deadline: Deadline,
    otherwise: type[PlanariaError],
    into: Sequence[memoryview[Any]] = (),
) -> Message:
    """Sends a request and waits for its reply; one thread at a time.

    Args:
        connection: The connection.
        request: What JSON can hold, with string keys.
        payloads: Contiguous buffers.
        deadline: When to give up; the other side is told.
        otherwise: What an error of the other side is raised as, if it is not one of a few that
            are known everywhere, or of this class.
        into: Where the reply's payloads go, if they fit; see `Connection.recv`.

    Raises:
        PlanariaError: What went wrong on the other side.
        WireError: The connection was lost, or the reply is malformed.
        DeadlineError: No reply in time; the connection cannot be used any more then.
    """
    connection.send({**request, "seconds": deadline.remaining()}, payloads, deadline=deadline)
    try:
        message = connection.recv(deadline, into)
    except errors.DeadlineError:
        connection.close()  # the reply may come yet, and must not be taken for another's
        raise
    failed = message.header.get("error")
    if failed is not None:
        raise crossed(message.header.get("kind"), f"{connection.peer}: {failed}", otherwise)
    return message


def crossed(kind: Any, text: str, otherwise: type[PlanariaError]) -> PlanariaError:
    """An error of the other side, as it is raised on this one; see `call`."""
    known = getattr(errors, kind, None) if isinstance(kind, str) else None
    own = isinstance(known, type) and issubclass(known, otherwise)
    return known(text) if known is not None and (own or kind in _CROSSING) else otherwise(text)


def serve(
    connection: Connection,
    handle: Handler,
    deadline: Callable[[], Deadline],
    *,
    answering: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> None:
    """Answers requests until the other side goes, or says nothing for longer than the deadline.

    Args:
        connection: The connection; closed at the end.
        handle: Answers a request; an error of Planaria's is sent instead of an answer.
        deadline: For the next request.
        answering: Entered with each request, left when its answer is on its way.

    Raises:
        WireError: The connection was lost within a message, or the peer is not of this job.
        DeadlineError: Nothing came.
    """
    with connection:
        while True:
            try:
                message = connection.recv(deadline())
            except errors.PeerClosedError:
                return
            with answering():
                answer: Reply
                try:
                    answer = handle(message.header, message.payloads)
                except PlanariaError as error:
                    answer = {"error": str(error), "kind": type(error).__name__}, ()
                except MALFORMED as error:
                    answer = {"error": f"malformed request: {error!r}", "kind": "WireError"}, ()
                connection.send(answer[0], answer[1], deadline=deadline())


def budget(header: dict[str, Any], most: float) -> Deadline:
    """The deadline that a request came with, no longer than `most` seconds.

    Raises:
        WireError: It came with none.
    """
    seconds = header.get("seconds")
    if not isinstance(seconds, int | float) or not 0 <= seconds < 1e9:
        raise WireError(f"a request without a time budget: {seconds!r}")
    return Deadline(min(float(seconds), most))
