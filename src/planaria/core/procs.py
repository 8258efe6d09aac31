"""Starts processes that never outlive their purpose, and proves them dead.

Each child leads a session of its own, so that its whole group can be ended at once, and is killed
by the kernel when this process dies, however it dies. Fencing kills first and then waits for proof:
only what is proven dead cannot write any more. A child is reaped last, after its group is empty:
until then the kernel cannot give its id to anything else, so no signal ever hits a stranger.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from planaria.core.deadline import Deadline
from planaria.errors import ConfigError, DeadlineError

UNKNOWN_STATUS = 255
"""Exit status reported when other code in this process reaped the child before us."""

_EXIT_SECONDS = 30.0

# Runs in the child, between this process and the program: prctl() from a preexec_fn could deadlock
# in a process with threads. 1 is PR_SET_PDEATHSIG. Python ignores SIGPIPE and SIGXFSZ, and what is
# ignored stays so across exec; in a C locale it adds LC_CTYPE to the environment. The parent may
# have died before prctl(): then nobody is waiting.
_SHIM = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(1, int(signal.SIGKILL), 0, 0, 0) != 0:
    sys.exit("prctl(PR_SET_PDEATHSIG): " + os.strerror(ctypes.get_errno()))
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that started this one is gone")
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
if sys.argv[2] == "no LC_CTYPE":
    os.environ.pop("LC_CTYPE", None)
try:
    os.execvp(sys.argv[3], sys.argv[3:])
except OSError as error:
    print(f"cannot run {sys.argv[3]}: {error.strerror}", file=sys.stderr)
    sys.exit(127)
"""


class Identity(NamedTuple):
    """What tells a process from any other before and after it, on any machine.

    A plain list in JSON; ``Identity(*items)`` reads it back.

    Attributes:
        pid: Process id.
        start: When it started, in the kernel's clock ticks since boot.
        boot: Id of the machine's boot, a slash, id of the process-id namespace.
        host: Host name.
    """

    pid: int
    start: int
    boot: str
    host: str


def identity(pid: int | None = None) -> Identity:
    """Returns the identity of a running process of this machine.

    Args:
        pid: Process id, by default this process's.

    Raises:
        ConfigError: There is no such process.
    """
    pid = os.getpid() if pid is None else pid
    stat = _stat(pid)
    if stat is None:
        raise ConfigError(f"there is no process {pid} on this machine")
    return Identity(pid, stat.start, _boot(), os.uname().nodename)


def is_alive(who: Identity) -> bool:
    """Whether the very process is still running here; a zombie is not.

    Raises:
        ConfigError: It ran on another machine or in another container, which alone can tell.
    """
    boot = _boot()
    if who.boot != boot:
        same_kernel = who.boot.partition("/")[0] == boot.partition("/")[0]
        if who.host == os.uname().nodename and not same_kernel:
            return False  # this machine has been booted since
        raise ConfigError(
            f"cannot tell from here whether process {who.pid} of host {who.host} is alive: "
            "ask on that host, in the same container"
        )
    stat = _stat(who.pid)
    return stat is not None and stat.start == who.start and stat.state not in "ZX"


def start(
    argv: Sequence[str | os.PathLike[str]],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
    pass_fds: Sequence[int] = (),
) -> Proc:
    """Starts a program as the leader of its own session, bound to this process's life.

    It gets SIGKILL when this process ends in any way; what it starts itself does not, unless it
    binds it likewise. Standard input is empty.

    Args:
        argv: Program and arguments; the program is looked up in the PATH of ``env``.
        env: The whole environment, by default this process's.
        cwd: Folder to run in.
        stdout: As for ``subprocess.Popen``: None inherits, ``subprocess.PIPE`` gives ``.stdout``.
        stderr: Likewise; ``subprocess.STDOUT`` joins it to stdout.
        pass_fds: Open file descriptors that the program inherits, under the same numbers.

    Returns:
        The process; end it with a ``with`` block, :meth:`Proc.terminate` or :meth:`Proc.fence`.

    Raises:
        ConfigError: There is no such program or folder, or the system refused to start it.
    """
    command = [os.fspath(part) for part in argv]
    _check_program(command, env, cwd)
    locale = "LC_CTYPE" if "LC_CTYPE" in (os.environ if env is None else env) else "no LC_CTYPE"
    shim = [sys.executable, "-I", "-S", "-c", _SHIM, str(os.getpid()), locale, *command]

    def spawn() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            shim,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=None if env is None else dict(env),
            cwd=cwd,
            start_new_session=True,
            pass_fds=tuple(pass_fds),
        )

    try:
        return Proc(_spawner().run(spawn), command)
    except OSError as error:
        raise ConfigError(f"cannot start {command[0]!r}: {error.strerror or error}") from error


class Proc:
    """A started process and the group it leads. Made by :func:`start`.

    Safe to use from several threads. Leaving its ``with`` block fences it.
    """

    def __init__(self, popen: subprocess.Popen[bytes], argv: list[str]) -> None:
        self.argv = argv
        self.pid = popen.pid
        self.identity = identity(popen.pid)
        self.stdout: IO[bytes] | None = popen.stdout
        self.stderr: IO[bytes] | None = popen.stderr
        self._popen = popen
        self._lock = threading.RLock()
        self._status: int | None = None
        self._reaped = False

    def poll(self) -> int | None:
        """Returns the exit status, or None while the process runs.

        The status is negative for a signal's number. The process's group ends with it: what is left
        of it then gets SIGKILL.
        """
        with self._lock:
            if self._status is None:
                self._status = self._peek()
            if self._status is not None and not self._reaped:
                self._signal(signal.SIGKILL)
                if not _group_lives(self.pid):
                    self._reap()
            return self._status

    def wait(self, deadline: Deadline) -> int:
        """Waits until the process and its group have ended, and returns the exit status.

        Raises:
            DeadlineError: They run on.
        """
        pause = 0.001
        while self.poll() is None or not self._reaped:
            deadline.check(f"the end of {self}")
            time.sleep(min(pause, deadline.remaining()))
            pause = min(2 * pause, 0.02)
        assert self._status is not None  # what poll() has just returned
        return self._status

    def signal(self, number: int) -> None:
        """Sends a signal to the whole group; does nothing once it has ended."""
        with self._lock:
            if self.poll() is None:
                self._signal(number)

    def fence(self, deadline: Deadline) -> int:
        """Kills the group at once, then waits until it is proven dead; returns the exit status.

        A process that left the group for a session of its own is not covered.

        Raises:
            DeadlineError: It is not proven dead: the kernel holds on to it (as for a device or a
                network file system that hangs). Treat what it holds as still in use.
        """
        self.signal(signal.SIGKILL)
        return self.wait(deadline)

    def terminate(self, grace: float) -> int:
        """Asks the group to end (SIGTERM), fences it after the grace; returns the exit status.

        Args:
            grace: Seconds that it has to end by itself.

        Raises:
            DeadlineError: It was killed and yet is not proven dead 30 s later.
        """
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)  # a stopped process would not see the first
        until = Deadline(grace)
        while self.poll() is None and not until.expired:
            time.sleep(min(0.01, until.remaining()))
        return self.fence(Deadline(_EXIT_SECONDS))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.fence(Deadline(_EXIT_SECONDS))
        finally:
            self.close()

    def close(self) -> None:
        """Closes this side of the process's pipes."""
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()

    def __repr__(self) -> str:
        return f"process {self.pid} ({' '.join(self.argv)[:80]})"

    def _peek(self) -> int | None:
        """Looks for the exit status, but leaves the zombie, which keeps the id taken."""
        try:
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            self._reaped = True  # by other code; the group's id may be anybody's by now
            return UNKNOWN_STATUS
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def _signal(self, number: int) -> None:
        # Not permitted, as for a program that changed its user: the wait for its end then says so.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _reap(self) -> None:
        self._popen.wait()
        self._reaped = True


class Procs:
    """Starts processes, and fences all of them when its ``with`` block ends."""

    def __init__(self) -> None:
        self._procs: list[Proc] = []

    def start(self, argv: Sequence[str | os.PathLike[str]], **options: Any) -> Proc:
        """Starts one more; arguments, result and errors as for :func:`start`."""
        proc = start(argv, **options)
        self._procs.append(proc)
        return proc

    def __iter__(self) -> Iterator[Proc]:
        return iter(list(self._procs))

    def fence(self, deadline: Deadline) -> None:
        """Kills all of them, then waits until each is proven dead.

        Raises:
            DeadlineError: Some are not; it names the first.
        """
        for proc in self._procs:
            proc.signal(signal.SIGKILL)
        failed: DeadlineError | None = None
        for proc in self._procs:
            try:
                proc.wait(deadline)
            except DeadlineError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.fence(Deadline(_EXIT_SECONDS))
        finally:
            for proc in self._procs:
                proc.close()


class _Spawner:
    """A thread that lives as long as the process and starts its children.

    The kernel's "parent" of the death signal is the thread that forked: a child started from a
    thread that ends would be killed with that thread.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="planaria-spawner", daemon=True).start()

    def run(self, job: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        future: Future[subprocess.Popen[bytes]] = Future()
        self._jobs.put((job, future))
        return future.result()

    def _work(self) -> None:
        while True:
            job, future = self._jobs.get()
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)


_spawner_lock = threading.Lock()
_the_spawner: _Spawner | None = None


def _spawner() -> _Spawner:
    global _the_spawner
    with _spawner_lock:
        if _the_spawner is None or _the_spawner.pid != os.getpid():
            _the_spawner = _Spawner()
        return _the_spawner


def _after_fork() -> None:
    global _spawner_lock
    _spawner_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def _check_program(
    command: list[str], env: Mapping[str, str] | None, cwd: str | os.PathLike[str] | None
) -> None:
    if not command or not command[0]:
        raise ConfigError("cannot start a process: the command is empty")
    if cwd is not None and not Path(cwd).is_dir():
        raise ConfigError(f"cannot start {command[0]!r}: there is no folder {os.fspath(cwd)!r}")
    program = command[0]
    if os.sep in program:
        program = os.path.join(cwd or "", program)
    path = (os.environ if env is None else env).get("PATH", os.defpath)
    if shutil.which(program, path=path) is None:
        raise ConfigError(f"cannot start {command[0]!r}: there is no such program")


def end_sessions(leaders: Collection[int], mark: str, deadline: Deadline) -> None:
    """Kills what processes that have ended left behind in the sessions that they led.

    Args:
        leaders: The process ids that they had. By now an id may be a stranger's, so what is killed
            must carry the mark, too.
        mark: ``NAME=value``, in the environment of all that they started.
        deadline: How long to wait for the end of what is killed.

    Raises:
        DeadlineError: Something is not proven dead: the kernel holds on to it.
    """
    while found := [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc")))
                    if _is_left(pid, leaders, mark)]:  # fmt: skip
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        deadline.check(f"the end of process {found[0]}")
        time.sleep(min(0.01, deadline.remaining()))


def _is_left(pid: int, leaders: Collection[int], mark: str) -> bool:
    stat = _stat(pid)
    if stat is None or stat.session not in leaders or stat.state in "ZX":
        return False
    try:
        return mark.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


class _Stat(NamedTuple):
    state: str
    group: int
    session: int
    start: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field, the program's name in brackets, may hold spaces and brackets itself.
    fields = text[text.rindex(")") + 2 :].split()
    return _Stat(fields[0], int(fields[2]), int(fields[3]), int(fields[19]))


def _group_lives(group: int) -> bool:
    """Whether the group has a member that is no zombie.

    ``killpg(group, 0)`` would not do: it counts zombies, and under an init that reaps nothing, as
    in many containers, a grandchild stays one for ever.
    """
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            stat = _stat(int(entry))
            if stat is not None and stat.group == group and stat.state not in "ZX":
                return True
    return False


def _boot() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
