"""Where a snapshot process is found: a private folder for each job and node.

::

    <runtime folder>/<job>/token            of a job that has none of its own
    <runtime folder>/<job>/<node>/lock      held by who looks whether one must be started
                                  socket    mode 0600; ranks connect here
                                  info.json who listens there
                                  log       what it had to say

The runtime folder is ``PLANARIA_RUNTIME_DIR``, else ``planaria`` in ``XDG_RUNTIME_DIR``, else
``planaria-<user id>`` in the folder for temporary files. It belongs to the user and is open to
nobody else.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from planaria.core.deadline import Deadline
from planaria.core.procs import Identity, is_alive
from planaria.errors import ConfigError

ENV = "PLANARIA_RUNTIME_DIR"
_TAKE_AGAIN_S = 0.02


@dataclass(frozen=True)
class Info:
    """Who listens at a place.

    Attributes:
        process: The snapshot process.
        uuid: The node's identity.
        node: Its label.
        job: What the job is known by.
        address: Where it listens for other nodes, ``host:port``.
        budget: Bytes of its memory.
        root: Where the job's checkpoints lie, for people.
    """

    process: Identity
    uuid: str
    node: str
    job: str
    address: str
    budget: int
    root: str = ""

    @property
    def alive(self) -> bool:
        """Whether the very process still runs; True where that cannot be told from here."""
        try:
            return is_alive(self.process)
        except ConfigError:
            return True


class Place:
    """The folder of one node of one job.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, job: str, node: str) -> Place:
        """The place of a job's node; nothing is made yet.

        Args:
            job: What the job is known by.
            node: The node's label.
        """
        return cls(runtime_folder() / job / hashlib.sha256(node.encode()).hexdigest()[:12])

    @property
    def token(self) -> Path:
        """The token file of the job, for jobs that have none of their own."""
        return self.path.parent / "token"

    @property
    def log(self) -> Path:
        """What the process writes to its standard output and error."""
        return self.path / "log"

    def make(self) -> None:
        """Makes the folder, mode 0700.

        Raises:
            ConfigError: It cannot be made, or belongs to somebody else.
        """
        try:
            base = self.path.parent.parent
            base.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_private(base)
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot make the runtime folder {self.path}: {error.strerror}; name another one "
                f"in {ENV}"
            ) from error

    @contextlib.contextmanager
    def locked(self, deadline: Deadline) -> Iterator[None]:
        """Only one process at a time looks whether there is a snapshot process, and starts it.

        Raises:
            DeadlineError: Another one held on to it.
            ConfigError: The folder cannot be made.
        """
        while True:
            self.make()
            try:
                fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:  # cleared up just now
                continue
            try:
                while not _flock(fd):
                    deadline.check(f"the lock of {self.path}")
                    time.sleep(_TAKE_AGAIN_S)
                # It may have been cleared up, and made again by somebody, while we waited.
                with contextlib.suppress(FileNotFoundError):
                    if os.stat(self.path / "lock").st_ino == os.fstat(fd).st_ino:
                        yield
                        return
            finally:
                os.close(fd)

    def info(self) -> Info | None:
        """Who listens here, None where nobody has said so."""
        try:
            data = json.loads((self.path / "info.json").read_text())
            return Info(**{**data, "process": Identity(*data["process"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write_info(self, info: Info) -> None:
        """Says who listens here."""
        scratch = self.path / f".info-{os.getpid()}"
        scratch.write_text(json.dumps({**asdict(info), "process": list(info.process)}))
        os.replace(scratch, self.path / "info.json")

    def bind(self) -> tuple[socket.socket, int]:
        """Listens here, mode 0600, in place of whoever did before.

        Returns:
            The listening socket, and what `is_bound` knows its name by.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _address(self.path) as address:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path / "socket")
                # From the first moment: its folder is private, this is the second line.
                before = os.umask(0o177)
                try:
                    sock.bind(address)
                finally:
                    os.umask(before)
            sock.listen(64)
            return sock, os.stat(self.path / "socket").st_ino
        except BaseException:
            sock.close()
            raise

    def connect(self, deadline: Deadline) -> socket.socket:
        """A connection to who listens here.

        Raises:
            OSError: Nobody does.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(max(1e-3, min(deadline.timeout(), 5.0)))
            with _address(self.path) as address:
                sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return sock

    def is_bound(self, inode: int) -> bool:
        """Whether a bound socket can still be found here: somebody may have removed its name."""
        try:
            found = os.stat(self.path / "socket")
        except OSError:
            return False
        return stat.S_ISSOCK(found.st_mode) and inode == found.st_ino

    def keep_fresh(self) -> None:
        """Has what clears folders for temporary files of old ones leave these alone."""
        files = ("", "lock", "socket", "info.json", "log")
        for each in (self.token, self.path.parent, *(self.path / name for name in files)):
            with contextlib.suppress(OSError):
                os.utime(each)

    def clear(self) -> None:
        """Removes the folder and, with its last node, the job's; whoever calls it holds the lock
        or knows that nobody listens any more."""
        shutil.rmtree(self.path, ignore_errors=True)
        job = self.path.parent
        with contextlib.suppress(OSError):
            if not any(each.is_dir() for each in job.iterdir()):
                (job / "token").unlink(missing_ok=True)
                job.rmdir()


def places() -> list[Place]:
    """All places of this user on this machine, live or not.

    Raises:
        ConfigError: The runtime folder is open to others, who may have put anything there.
    """
    base = runtime_folder()
    with contextlib.suppress(FileNotFoundError):
        _check_private(base)
    return [Place(node) for job in _folders(base) for node in _folders(job)]


def runtime_folder() -> Path:
    """Where this user's snapshot processes are found."""
    if ENV in os.environ:
        return Path(os.environ[ENV]).absolute()
    own = os.environ.get("XDG_RUNTIME_DIR", "")
    if own and os.access(own, os.W_OK):
        return Path(own) / "planaria"
    return Path(tempfile.gettempdir()) / f"planaria-{os.getuid()}"


def job_id(*parts: Any) -> str:
    """A short name for a job, from what tells it from others."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _check_private(base: Path) -> None:
    seen = os.lstat(base)
    if (
        not stat.S_ISDIR(seen.st_mode)
        or seen.st_uid != os.getuid()
        or (stat.S_IMODE(seen.st_mode) & 0o077)
    ):
        raise ConfigError(
            f"{base} is not a folder of this user alone (mode "
            f"{stat.S_IMODE(seen.st_mode):04o}, owner {seen.st_uid}): chmod 700 it, or "
            f"name another one in {ENV}"
        )


def _folders(path: Path) -> list[Path]:
    """The folders in one, in order; what links lead to is not ours. None where it has just gone."""
    try:
        with os.scandir(path) as entries:
            return sorted(Path(each) for each in entries if each.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


@contextlib.contextmanager
def _address(folder: Path) -> Iterator[str]:
    """The socket's path in a form that is short enough whatever the folder is called."""
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/socket"
    finally:
        os.close(fd)


def _flock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
