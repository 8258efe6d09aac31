"""One writer for a root: a lock with an owner and an expiry.

On a file system the kernel's own lock (`flock`) tells at once whether the owner lives; it goes with
the process. Where that says nothing (another host's lock over a network mount, an object store)
the owner renews a lease, and who finds one waits until it has seen no renewal for its whole length;
clocks are never compared.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Collection
from typing import Any

from planaria.checkpoint.storage.base import Storage
from planaria.core.deadline import Deadline
from planaria.core.procs import Identity, identity, is_alive
from planaria.errors import ConfigError, RootLockedError

_LEASE = "lock.json"
_held: set[int] = set()


def _close_inherited() -> None:
    # A forked data loader worker would keep the lock alive after its trainer was killed.
    for fd in _held:
        with contextlib.suppress(OSError):
            os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_close_inherited)


class RootLock:
    """Holds a root for this process until `release`, or until it dies.

    Args:
        storage: The root.
        lease_s: After how many seconds without renewal the lock of a vanished host is free.
        heir_of: Marks of locks whose owners are known to be dead: theirs is free at once.

    Raises:
        RootLockedError: A live job holds it; says which.
    """

    def __init__(
        self, storage: Storage, *, lease_s: float = 30.0, heir_of: Collection[str] = ()
    ) -> None:
        self._storage, self._lease_s, self._heir_of = storage, lease_s, heir_of
        self._nonce = secrets.token_hex(8)
        self._renewals = 0
        self._fd = self._flock()
        try:
            self._wait_for_lease()
            self._renew()
        except BaseException:
            self._drop_flock()
            raise
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._keep, name="planaria-lock", daemon=True)
        self._thread.start()

    @property
    def mark(self) -> str:
        """What tells this lock from any other."""
        return self._nonce

    def check(self) -> None:
        """Makes sure that the root is still ours, just before something is committed.

        Raises:
            RootLockedError: Another job has taken it.
        """
        owner = self._read()
        if owner is None or owner.get("nonce") != self._nonce:
            raise RootLockedError(
                f"{self._storage.url} was taken over by {_describe(owner)} while this process "
                "could not renew its lock; it must not write here any more"
            )

    def release(self) -> None:
        """Gives the root free."""
        self._stop.set()
        self._thread.join(timeout=self._lease_s)
        with contextlib.suppress(Exception):
            owner = self._read()
            if owner is not None and owner.get("nonce") == self._nonce:
                self._storage.remove(_LEASE)
        self._drop_flock()

    def _flock(self) -> int | None:
        if self._storage.local is None:
            return None
        fd = os.open(
            os.path.join(self._storage.local, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644
        )
        # A job that was just killed may still be going down: its lock goes with its last thread.
        deadline = Deadline(5.0)
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _held.add(fd)
                return fd
            except BlockingIOError:
                if deadline.expired:
                    os.close(fd)
                    owner = self._read() or {}
                    here = owner.get("host") == socket.gethostname()
                    if owner.get("nonce") in self._heir_of and not here:
                        return None  # a host that is gone: its file server will notice in time
                    raise RootLockedError(
                        f"{self._storage.url} is in use by {_describe(owner or None)}; stop that "
                        "job, or give this one a folder of its own"
                    ) from None
                time.sleep(0.05)
            except OSError:  # the file system has no such locks: the lease must do
                os.close(fd)
                return None

    def _drop_flock(self) -> None:
        if self._fd is not None:
            _held.discard(self._fd)
            os.close(self._fd)
            self._fd = None

    def _wait_for_lease(self) -> None:
        first = self._read()
        if first is None or first["nonce"] in self._heir_of or self._is_dead(first):
            return
        lease_s = first.get("lease_s")
        if not isinstance(lease_s, int | float) or not self._lease_s < lease_s < 3600:
            lease_s = self._lease_s
        deadline = Deadline(lease_s)
        while not deadline.expired:
            time.sleep(min(0.2, deadline.remaining()))
            now = self._read()
            if now is None:
                return
            if (now.get("nonce"), now.get("renewals")) != (first["nonce"], first.get("renewals")):
                raise RootLockedError(
                    f"{self._storage.url} is in use by {_describe(now)}; stop that job, or give "
                    "this one a folder of its own"
                )

    def _is_dead(self, owner: dict[str, Any]) -> bool:
        if owner.get("host") != socket.gethostname():
            return False
        if self._fd is not None:  # we hold the kernel's lock, so its owner does not
            return True
        try:
            return not is_alive(Identity(*owner["process"]))
        except (KeyError, TypeError, ConfigError):  # it cannot be told from here
            return False

    def _read(self) -> dict[str, Any] | None:
        try:
            owner = json.loads(self._storage.read(_LEASE))
            return owner if isinstance(owner, dict) and "nonce" in owner else None
        except (FileNotFoundError, ValueError):
            return None

    def _renew(self) -> None:
        owner = {
            "nonce": self._nonce,
            "host": socket.gethostname(),
            "process": list(identity(os.getpid())),
            "renewals": self._renewals,
            "lease_s": self._lease_s,
        }
        self._storage.put(_LEASE, json.dumps(owner).encode())
        self._renewals += 1

    def _keep(self) -> None:
        while not self._stop.wait(self._lease_s / 3):
            # A failed renewal is found out by check(): nothing is committed without the lock.
            with contextlib.suppress(Exception):
                owner = self._read()
                if owner is not None and owner.get("nonce") == self._nonce:
                    self._renew()


def _describe(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "another process"
    process = owner.get("process") or ["?"]
    return f"process {process[0]} on host {owner.get('host', '?')}"
