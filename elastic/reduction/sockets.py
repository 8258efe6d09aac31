"""The sockets below a gloo group: what ends a wait in it, from any thread.

gloo keeps its connections as long as anything refers to the group or to an operation in it, and
has no call that ends a wait. A rank that gives up has to break its connections all the same: ranks
that wait for it would wait for ever. So the group's sockets are looked up when it is made, and shut
down when it is given up: all waits in the group then end with an error, here and on the others.
"""

import contextlib
import os
import socket
from collections.abc import Collection


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
    """Connections of a group, told from others of this process by the ports of their ends.

    Make it before the group; a gloo device listens on a port of its own, and whatever connects two
    ranks has such a port at one end.
    """

    def __init__(self) -> None:
        self._before = open_sockets()
        self._found: list[socket.socket] = []
        self._shut = False
        self.ports: list[int] = []

    def __len__(self) -> int:
        return len(self._found)

    def note_device(self) -> None:
        """Learns the ports of devices; call it once they are made, before anything connects."""
        for fd, _ in open_sockets() - self._before:
            each = _copy(fd)
            if each is not None:
                if each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    self.ports.append(each.getsockname()[1])
                each.close()

    def find(self, theirs: Collection[int] = ()) -> None:
        """Finds the connections that there are by now.

        Args:
            theirs: Ports of the other ranks' devices.
        """
        ours = frozenset(self.ports)
        for fd, _ in open_sockets() - self._before:
            each = _copy(fd)
            if each is None:
                continue
            with contextlib.suppress(OSError):  # not connected
                if each.getpeername()[1] in theirs or each.getsockname()[1] in ours:
                    self._found.append(each)
                    continue
            each.close()
        if self._shut:
            self.shut()  # given up meanwhile

    def shut(self) -> None:
        """Breaks the connections. It may be called again, by any thread."""
        self._shut = True
        found, self._found = self._found, []
        for each in found:
            with contextlib.suppress(OSError):  # broken already
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def _copy(fd: int) -> socket.socket | None:
    """A second handle of a TCP socket."""
    try:
        copy = socket.socket(fileno=os.dup(fd))
    except OSError:
        return None
    if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
        return copy
    copy.close()
    return None
