"""Finding the processes of a job from outside, and leaving none of them behind.

Everything that a runner starts inherits a mark in its environment; what has the mark and a `RANK`
that its parent lacks is a rank.
"""

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from planaria.core.deadline import Deadline
from planaria.core.procs import Identity, identity, is_alive
from planaria.errors import ConfigError

MARK = "PLANARIA_DRILL"


@dataclass(frozen=True)
class RankProcess:
    """A rank of the job.

    Attributes:
        rank: The `RANK` of its environment.
        who: The process.
        parent: Process id of what started it: its agent.
        env: Its environment, as it was started.
    """

    rank: int
    who: Identity
    parent: int
    env: Mapping[str, str]

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.who.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs, or is stopped."""
        return is_alive(self.who)

    def signal(self, number: int) -> bool:
        """Sends it a signal; False if it is gone."""
        # A process id can be given anew between the check and the signal only if the agent reaps
        # the rank in between, and 2^22 processes are started: the pidfd rules out even that.
        try:
            fd = os.pidfd_open(self.pid)
        except OSError:
            return False
        try:
            if not self.alive:
                return False
            signal.pidfd_send_signal(fd, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(fd)
        return True


def marked(mark: str) -> dict[int, dict[str, str]]:
    """All live processes that carry a mark: process id -> environment."""
    found: dict[int, dict[str, str]] = {}
    wanted = f"{MARK}={mark}".encode()
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            raw = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
            if wanted in raw:
                pairs = (part.decode(errors="replace").partition("=") for part in raw if part)
                found[int(name)] = {key: value for key, _, value in pairs}
    return found


def ranks_of(mark: str) -> dict[int, RankProcess]:
    """The ranks of the job that carries a mark, by `RANK`; of several with one rank the newest."""
    jobs = marked(mark)
    found: dict[int, RankProcess] = {}
    for pid, env in jobs.items():
        rank, parent = env.get("RANK", ""), parent_of(pid)
        # A child of a rank, such as a data worker, has inherited its RANK.
        if not rank.isdecimal() or parent is None or "RANK" in jobs.get(parent, {}):
            continue
        # What a rank left to init, such as a snapshot process, is none either.
        if parent not in jobs and parent != os.getpid():
            continue
        with contextlib.suppress(ConfigError):
            one = RankProcess(int(rank), identity(pid), parent, env)
            if one.alive and (one.rank not in found or found[one.rank].who.start < one.who.start):
                found[one.rank] = one
    return found


def parent_of(pid: int) -> int | None:
    """The parent of a process, None if it is gone."""
    try:
        # The command, in parentheses, may hold spaces: fields are counted behind it.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def command_of(pid: int) -> str:
    """The command line of a process, "?" if it is gone."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return "?"
    return raw.replace(b"\0", b" ").decode(errors="replace").strip()[:200] or "?"


def end_all(mark: str, deadline: Deadline) -> list[str]:
    """Kills every process that carries a mark, and waits until none is left.

    Returns:
        The command lines of those that were there.

    Raises:
        DeadlineError: Some are not proven dead.
    """
    seen: dict[int, str] = {}
    while left := [pid for pid in marked(mark) if pid != os.getpid()]:
        for pid in left:
            seen.setdefault(pid, command_of(pid))
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        deadline.check(f"the end of {seen[left[0]]}")
        time.sleep(min(0.01, deadline.remaining()))
    return list(seen.values())
