"""`planaria` in processes that are forked with torch loaded: the same code, seconds sooner.

A launcher is forked from the server of `ranks`, its ranks from a helper of the launcher that it
forks before it has threads. To the launcher they are what they would be had it started them by
`subprocess`: its own children, with their own session, environment and log, that it waits for and
that die with it. What they lack is their own environment in /proc: who looks for ranks by that
needs real ones.
"""

import atexit
import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_PR_SET_CHILD_SUBREAPER = 36
_MOST_NBYTES = 1 << 17
_WORKER = ["-P", "-m", "planaria.launch.worker"]


class Forked:
    """A launcher, with what `subprocess.Popen` has that tests use.

    Args:
        args: Arguments of `planaria`.
        cwd: Its working folder.
        env: Its whole environment.
    """

    def __init__(self, args: Sequence[str], cwd: Path, env: Mapping[str, str]) -> None:
        import ranks

        self._folder = tempfile.mkdtemp(prefix="launch-")
        context = ranks._server()
        plan = (list(args), str(cwd), dict(env), self._folder, os.getpid())
        self._process = context.Process(target=_launch, args=plan, name="launcher")
        with ranks._hidden_main():
            self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("planaria", timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self._text("out"), self._text("err")

    def _text(self, name: str) -> str:
        return Path(self._folder, name).read_text(errors="replace")

    def close(self) -> None:
        """Kills it if it runs, and forgets what it wrote."""
        self.kill()
        self.wait(60)
        shutil.rmtree(self._folder, ignore_errors=True)


def _launch(args: list[str], cwd: str, env: dict[str, str], folder: str, caller: int) -> None:
    os.setsid()
    out, err = (os.open(Path(folder, name), os.O_CREAT | os.O_WRONLY) for name in ("out", "err"))
    _become(args, env, out, err)
    os.chdir(cwd)
    forks = _Forks()
    threading.Thread(target=_end_with, args=(caller,), name="caller", daemon=True).start()

    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    from planaria.launch.cli import main

    subprocess_handler.Popen = forks.popen  # pyright: ignore[reportAttributeAccessIssue]
    sys.exit(main(args))


def _become(args: list[str], env: dict[str, str], out: int, err: int) -> None:
    """What a new program would have found."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, standard in ((nothing, 0), (out, 1), (err, 2)):
        os.dup2(fd, standard)
        os.close(fd)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["planaria", *args]

    from planaria.core import points

    points.arm(env.get(points.ENV, ""))


def _end_with(caller: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        select.select([os.pidfd_open(caller)], [], [])
    os.kill(os.getpid(), signal.SIGKILL)


class _Forks:
    """Makes ranks of a process that has no threads, as children of this one."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        launcher = os.getpid()
        if os.fork() == 0:
            self._ours.close()
            _serve(theirs, launcher)
        theirs.close()

    def popen(self, args: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """`subprocess.Popen`, as the elastic agent of torch calls it."""
        _, *words = args
        assert words[: len(_WORKER)] == _WORKER, f"not a rank: {args}"
        assert options["start_new_session"]
        outputs = [options[name].fileno() for name in ("stdout", "stderr")]
        request = json.dumps([words[len(_WORKER) :], options["env"]]).encode()
        assert len(request) < _MOST_NBYTES
        return _Popen(lambda: self._fork(request, outputs), args, **options)

    def _fork(self, request: bytes, outputs: list[int]) -> int:
        with self._lock:
            # Whoever is left by its parent meanwhile is this process's child.
            _prctl(_PR_SET_CHILD_SUBREAPER, 1)
            try:
                socket.send_fds(self._ours, [request], outputs)
                answer = self._ours.recv(64)
            finally:
                _prctl(_PR_SET_CHILD_SUBREAPER, 0)
        return int(answer)


class _Popen(subprocess.Popen[bytes]):
    """All of it but the start."""

    def __init__(self, start: Callable[[], int], args: Sequence[str], **options: Any) -> None:
        self._start = start
        super().__init__(args, **options)

    def _execute_child(self, *_args: Any) -> None:
        self.pid = self._start()
        self._child_created = True


def _serve(requests: socket.socket, launcher: int) -> None:
    """Forks ranks until the launcher is gone; never returns."""
    while True:
        data, fds, _, _ = socket.recv_fds(requests, _MOST_NBYTES, 2)
        if not data:
            os._exit(0)
        reading, writing = os.pipe()
        middle = os.fork()
        if middle == 0:
            parent = os.getpid()
            rank = os.fork()
            if rank == 0:
                _be_rank(data, fds, parent)
            os.write(writing, str(rank).encode())
            os._exit(0)
        os.waitpid(middle, 0)
        # The rank is the launcher's child now.
        requests.send(os.read(reading, 64))
        for fd in (reading, writing, *fds):
            os.close(fd)


def _be_rank(data: bytes, fds: list[int], parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.0005)
    code: Any = 1
    try:
        args, env = json.loads(data)
        os.setsid()
        _become(args, env, *fds)
        os.closerange(3, 1 << 12)

        from planaria.launch import worker

        code = worker.main(args)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
