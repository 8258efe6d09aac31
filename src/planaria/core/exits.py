"""The end of a process, seen before the kernel has taken it apart.

A process that was killed is a zombie, and reported to its parent, only after its memory was given
back: 50 ms for a few hundred MB, seconds for hundreds of GB. Long before that, first of all, each
of its threads was marked as exiting, from where no way leads back: it runs no code of the program
any more and begins no system call. `/proc` shows these marks.
"""

from __future__ import annotations

import os
import select
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from planaria.core.procs import UNKNOWN_STATUS

# PF_EXITING of the kernel, unchanged since 2.6; the bit of SIGKILL in a mask of pending signals.
_EXITING = 0x4
_SIGKILL = 1 << 8
# More than the kernel ever has (PID_MAX_LIMIT).
_MOST_IDS = 1 << 22
# Linux 6.9; the value is that of O_EXCL.
_PIDFD_THREAD = os.O_EXCL


class _Task(NamedTuple):
    state: str
    flags: int
    threads: int
    status: int

    @property
    def exiting(self) -> bool:
        return self.state in "ZX" or bool(self.flags & _EXITING)


def exit_code(pid: int) -> int | None:
    """The exit code of a process none of whose threads runs any code of its own any more.

    It is negative for a signal's number, and not known for certain: the parent's wait tells.

    Args:
        pid: A child that was not reaped: its id is its own.

    Returns:
        None while some thread may run.
    """
    tasks = _tasks(pid)
    if tasks is None or not all(task.exiting for task in tasks.values()):
        return None
    status = max((task.status for task in tasks.values()), default=0)
    try:
        return os.waitstatus_to_exitcode(status)
    except ValueError:
        return UNKNOWN_STATUS


def is_stilled(pid: int) -> bool:
    """Whether a process that got SIGKILL runs no code of its own any more, dead or not.

    Some call of the kernel's may keep a thread for ever, as for a device or a network file system
    that hangs. It does not return to the program: the signal waits there. All that is left to it is
    that call.

    Args:
        pid: A child that was not reaped.
    """
    tasks = _tasks(pid)
    if tasks is None:
        return False
    return all(
        task.exiting or (task.state == "D" and _is_killed(pid, tid)) for tid, task in tasks.items()
    )


class FirstEnd:
    """The end of the first of some threads of a child, which can be waited for.

    Threads end at once when their process is killed, but for the last of them: it gives back the
    process's memory before it counts as ended. So it takes two to see one end before that. The
    first thread of a process does not serve: its end is not told before that of all others.

    Args:
        pid: The child.
        threads: The kernel's ids of threads, of Python threads their `native_id`.

    Raises:
        OSError: There are no such threads in it, or the kernel is older than 6.9.
    """

    def __init__(self, pid: int, threads: Collection[int]) -> None:
        self._fds: list[int] = []
        if not threads:
            raise ProcessLookupError(f"no threads of process {pid} to wait for")
        try:
            for thread in threads:
                if not 0 < thread < _MOST_IDS:
                    raise ProcessLookupError(f"{thread} is no thread's id")
                self._fds.append(os.pidfd_open(thread, _PIDFD_THREAD))
                if not os.path.exists(f"/proc/{pid}/task/{thread}"):
                    raise ProcessLookupError(f"process {pid} has no thread {thread}")
        except OSError:
            self._close()
            raise

    def wait(self) -> None:
        """Waits for it, and closes this."""
        poll = select.poll()
        for fd in self._fds:
            poll.register(fd, select.POLLIN)
        try:
            poll.poll()
        finally:
            self._close()

    def _close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


def _tasks(pid: int) -> dict[int, _Task] | None:
    """The threads of a process; None where some were missed because they came or went meanwhile."""
    found: dict[int, _Task] = {}
    try:
        for name in os.listdir(f"/proc/{pid}/task"):
            task = _task(f"/proc/{pid}/task/{name}/stat")
            if task is not None:
                found[int(name)] = task
    except OSError:
        return None
    leader = _task(f"/proc/{pid}/stat")
    if leader is None or leader.threads != len(found):
        return None
    return found


def _task(path: str) -> _Task | None:
    try:
        text = Path(path).read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return _Task(fields[0], int(fields[6]), int(fields[17]), int(fields[49]))


def _is_killed(pid: int, thread: int) -> bool:
    try:
        lines = Path(f"/proc/{pid}/task/{thread}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return True
    pending = next((line.split()[1] for line in lines if line.startswith("SigPnd:")), "0")
    return bool(int(pending, 16) & _SIGKILL)
