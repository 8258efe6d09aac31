"""The sockets below a gloo group: what ends a wait in it, from any thread.

gloo keeps its connections as long as anything refers to the group or to an operation in it, and
has no call that ends a wait. A rank that gives up has to break its connections all the same: ranks
that wait for it would wait for ever. So the group's sockets are looked up when it is made, and shut
down when it is given up: all waits in the group then end with an error, here and on the others.
"""

import contextlib
import os
import socket
from collections.abc import Sequence
from typing import Any

from planaria.core.deadline import Deadline
from planaria.elastic.reduction.messages import MESSAGES_TAG, share_json
from planaria.elastic.reduction.transport import Transport

SOCKETS_TAG = MESSAGES_TAG - 2


def open_sockets() -> set[tuple[int, str]]:
    """The sockets of this process, as (descriptor, inode); none where they are hidden."""
    found: set[tuple[int, str]] = set()
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:
        return found
    for name in names:
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add((int(name), target))
    return found


class GroupSockets:
    """Connections of a group. They are told from others of this process by their other ends.

    Args:
        before: The sockets that there were before the group was made.
        transport: The ranks, over the group.
        deadline: Until when they must have told each other.

    Raises:
        CollectiveError: A rank is gone.
        DeadlineError: A rank sent nothing in time.
    """

    def __init__(
        self, before: set[tuple[int, str]], transport: Transport, deadline: Deadline
    ) -> None:
        candidates: list[tuple[socket.socket, list[Any]]] = []
        try:
            for fd, _ in open_sockets() - before:
                candidates += _look(fd)
            ends = [names for _, names in candidates]
            told = share_json(transport, ends, deadline, tag=SOCKETS_TAG)
            theirs = {_key(b, a) for rank, ends in enumerate(told) if rank != transport.rank
                      for a, b in ends}  # fmt: skip
            self._sockets = [s for s, (a, b) in candidates if _key(a, b) in theirs]
        finally:
            kept = getattr(self, "_sockets", [])
            for each, _ in candidates:
                if each not in kept:
                    each.close()

    def __len__(self) -> int:
        return len(self._sockets)

    def shut(self) -> None:
        """Breaks the connections. It may be called again, by any thread."""
        found, self._sockets = self._sockets, []
        for each in found:
            with contextlib.suppress(OSError):  # broken already
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def _look(fd: int) -> list[tuple[socket.socket, list[Any]]]:
    """A second handle of a connected TCP socket, and the names of its two ends."""
    try:
        copy = socket.socket(fileno=os.dup(fd))
    except OSError:
        return []
    try:
        if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
            return [(copy, [list(copy.getsockname()[:2]), list(copy.getpeername()[:2])])]
    except OSError:
        pass  # not connected
    copy.close()
    return []


def _key(a: Sequence[Any], b: Sequence[Any]) -> tuple[Any, ...]:
    return (*a, *b)
