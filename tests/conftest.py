"""Fixtures for every test, and the check that no test leaves a process or a thread behind."""

import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator

import psutil
import pytest
import ranks
from hypothesis import settings
from source_tree import FOLDERS

# Every program started from here inherits the mark, orphans included.
MARK = "PLANARIA_TEST_SESSION", uuid.uuid4().hex
GRACE_S = 30.0
HANDLED = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT

os.environ[MARK[0]] = MARK[1]
# Tensors are small here, and other workers of pytest have the other cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No verdict may hang on how fast the machine is; where a failure cannot be looked into at once,
# the same examples every time.
settings.register_profile("planaria", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("planaria")


@pytest.fixture
def free_port() -> Iterator[int]:
    """A TCP port on the loopback interface that nobody listens on.

    Until the test ends no other process is given it, neither to listen on nor for a connection;
    the test itself can bind it by `SO_REUSEADDR`, as servers do.
    """
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


@pytest.fixture(scope="session", autouse=True)
def _end_rank_server() -> Iterator[None]:
    yield
    ranks.stop_server()


@pytest.fixture(scope="module", autouse=True)
def _signal_handlers() -> Iterator[None]:
    """Puts back what a launcher that ran in this process has set, as torch's never does."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT interrupts, also where the tests were started as a job in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers() -> Iterator[None]:
    """Fails the module's last test if a process or a thread that blocks exit outlives it."""
    threads_before = set(threading.enumerate())
    yield
    until = time.monotonic() + GRACE_S
    while (left := [*_processes(), *_threads(threads_before)]) and time.monotonic() < until:
        time.sleep(0.05)
    wrong = sorted(set(FOLDERS) & set(sys.modules))
    assert not wrong, f"imported by itself, not as part of planaria: {wrong}"
    if left:
        text = "left behind by this module:\n" + "\n".join(map(_describe, left))
        for each in left:
            if isinstance(each, psutil.Process) and each.is_running():
                each.kill()
        pytest.fail(text, pytrace=False)


def _processes() -> list[psutil.Process]:
    """Live descendants of this process, but for the server of ranks."""
    spared = {os.getpid(), *ranks.server_pids()}
    found = {each.pid: each for each in psutil.Process().children(recursive=True)}
    for each in psutil.process_iter():
        try:
            if each.environ().get(MARK[0]) == MARK[1]:
                found[each.pid] = each
        except psutil.Error:
            continue
    return [each for pid, each in found.items() if pid not in spared and _lives(each)]


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _threads(before: set[threading.Thread]) -> list[threading.Thread]:
    """Live threads that would keep the interpreter from ending and were not there before."""
    return [each for each in threading.enumerate() if not each.daemon and each not in before]


def _describe(each: psutil.Process | threading.Thread) -> str:
    if isinstance(each, psutil.Process):
        return f"process {each.pid}: {ranks.command_line(each.pid)}"
    return f"thread {each.name}"
