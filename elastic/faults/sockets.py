"""Network faults on one machine, from outside the processes and without privileges.

A process may get a duplicate of a socket of another one that it may trace (Linux 5.6,
``pidfd_getfd``). On the duplicate it can attach a filter that drops all that arrives, as a network
does that is partitioned: the sender hears nothing and sends again, so that after the filter is
removed the connection goes on. Connections that are made later are found by looking again.
"""

import contextlib
import ctypes
import os
import socket
import struct
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from planaria.errors import NotSupportedError

_PIDFD_GETFD = 438  # the same on every architecture
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_ESTABLISHED = "01"
_SCAN_S = 0.02


class Connection(NamedTuple):
    """A TCP connection as one process has it; addresses are the kernel's (hex address, port)."""

    pid: int
    fd: int
    inode: int
    local: tuple[str, int]
    remote: tuple[str, int]


def connections(pids: Collection[int]) -> list[Connection]:
    """The established TCP connections of some processes of this network namespace."""
    table = _table()
    found: list[Connection] = []
    for pid in pids:
        for fd, inode in _sockets(pid):
            ends = table.get(inode)
            if ends is not None:
                found.append(Connection(pid, fd, inode, *ends))
    return found


def take(pid: int, fd: int) -> socket.socket:
    """A duplicate of a socket of another process.

    Raises:
        NotSupportedError: The kernel does not let this process.
        ProcessLookupError: The process or its socket is gone.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(pid)
    try:
        got = libc.syscall(_PIDFD_GETFD, process, fd, 0)
    finally:
        os.close(process)
    if got >= 0:
        return socket.socket(fileno=got)
    number = ctypes.get_errno()
    if number in (1, 38):  # EPERM, ENOSYS
        raise NotSupportedError(
            f"network faults need to duplicate sockets of other processes, which this one may not "
            f"({os.strerror(number)}): run as the same user, with ptrace allowed, on Linux 5.6"
        )
    raise ProcessLookupError(number, os.strerror(number))


def may_cut() -> bool:
    """Whether network faults can be made here."""
    pid = os.getpid()
    mine = socket.socket()
    try:
        take(pid, mine.fileno()).close()
    except (NotSupportedError, OSError):
        return False
    finally:
        mine.close()
    return True


class Cut:
    """Cuts connections while it lasts, those that are made meanwhile included.

    Args:
        pick: Returns the connections to cut now; called every few milliseconds.
        reset: Whether they are ended for good, instead of being silent while it lasts.

    Raises:
        NotSupportedError: It is not possible here.
    """

    def __init__(self, pick: Callable[[], Collection[Connection]], *, reset: bool = False) -> None:
        self._pick, self._reset = pick, reset
        self._held: dict[int, socket.socket] = {}
        self.count = 0
        self._over = threading.Event()
        self._scan()
        self._thread = threading.Thread(target=self._work, name="planaria-cut", daemon=True)
        self._thread.start()

    def end(self) -> int:
        """Heals what is not ended; returns how many ends of connections were cut."""
        self._over.set()
        self._thread.join()
        for held in self._held.values():
            with contextlib.suppress(OSError):
                held.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
            held.close()
        self._held = {}
        return self.count

    def _work(self) -> None:
        while not self._over.wait(_SCAN_S):
            with contextlib.suppress(NotSupportedError):
                self._scan()

    def _scan(self) -> None:
        for each in self._pick():
            if each.inode in self._held:
                continue
            try:
                held = take(each.pid, each.fd)
            except OSError:
                continue
            try:
                # The number may have been given to another socket since it was looked at.
                if os.fstat(held.fileno()).st_ino != each.inode:
                    held.close()
                    continue
                if self._reset:
                    held.shutdown(socket.SHUT_RDWR)
                    held.close()
                else:
                    _drop(held)
                    # Kept: a process that ends meanwhile is not heard to end by the other side.
                    self._held[each.inode] = held
                self.count += 1
            except OSError:
                held.close()


def between(one: Collection[int], other: Collection[int]) -> list[Connection]:
    """Both ends of the connections between two sets of processes."""
    ours, theirs = connections(one), connections(other)
    here = {(c.local, c.remote) for c in ours}
    there = {(c.local, c.remote) for c in theirs}
    return [c for c in ours if (c.remote, c.local) in there] + [
        c for c in theirs if (c.remote, c.local) in here
    ]


def to_port(pids: Collection[int], port: int) -> list[Connection]:
    """The connections of some processes to a port of any host."""
    return [c for c in connections(pids) if c.remote[1] == port]


def _drop(held: socket.socket) -> None:
    """Attaches the filter `return 0`: no byte of any packet is kept."""
    program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    header = struct.pack("HP", 1, ctypes.addressof(program))
    held.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, header)


def _sockets(pid: int) -> Iterator[tuple[int, int]]:
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        with contextlib.suppress(OSError):
            target = os.readlink(f"{folder}/{name}")
            if target.startswith("socket:["):
                yield int(name), int(target[8:-1])


def _table() -> Mapping[int, tuple[tuple[str, int], tuple[str, int]]]:
    """Inode -> both ends of every established connection."""
    found: dict[int, tuple[tuple[str, int], tuple[str, int]]] = {}
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]:
                parts = line.split()
                if parts[3] == _ESTABLISHED:
                    found[int(parts[9])] = _end(parts[1]), _end(parts[2])
    return found


def _end(text: str) -> tuple[str, int]:
    address, _, port = text.partition(":")
    # An IPv4 address is the end of the IPv6 one that stands for it.
    mapped = address.startswith("0000000000000000FFFF0000")
    return address[-8:] if mapped else address, int(port, 16)
