"""Ends of processes that are seen before the kernel has taken them apart."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from planaria.core import exits
from planaria.core.deadline import Deadline
from planaria.core.exits import FirstEnd, exit_code, is_stilled
from planaria.elastic.agent import trainers
from planaria.elastic.agent.ranks import RankLogs
from planaria.elastic.agent.trainers import Trainers

WAITING = """
import sys, threading
event = threading.Event()
threads = [threading.Thread(target=event.wait, daemon=True) for _ in range(2)]
for thread in threads:
    thread.start()
print(*[thread.native_id for thread in threads], flush=True)
event.wait(float(sys.argv[1]))
sys.exit(7)
"""


class Child:
    """A process with two threads that wait as long as it lives."""

    def __init__(self, seconds: float) -> None:
        command = [sys.executable, "-c", WAITING, str(seconds)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.threads = [int(each) for each in self.process.stdout.readline().split()]
        self.pid = self.process.pid


@pytest.fixture
def children() -> Iterator[list[Child]]:
    started: list[Child] = []
    yield started
    for child in started:
        child.process.kill()
        child.process.wait()


def seen(child: Child, *, kill: bool) -> int:
    """The exit code as it was seen, after the first of the threads had ended."""
    try:
        end = FirstEnd(child.pid, child.threads)
    except OSError:
        pytest.skip("the kernel is older than 6.9")
    if kill:
        os.kill(child.pid, signal.SIGKILL)
    end.wait()
    until = Deadline(60)
    while (code := exit_code(child.pid)) is None:
        until.check("the end of all threads")
    return code


def test_a_kill_is_seen_by_threads(children: list[Child]) -> None:
    children.append(child := Child(60))
    assert exit_code(child.pid) is None
    assert not is_stilled(child.pid)
    assert seen(child, kill=True) == -signal.SIGKILL
    assert is_stilled(child.pid)


def test_an_end_is_seen_by_threads(children: list[Child]) -> None:
    children.append(child := Child(2))
    assert seen(child, kill=False) == 7


def test_threads_of_others_are_refused(children: list[Child]) -> None:
    children += [Child(60), Child(60)]
    for threads in (children[1].threads, [], [0], [1 << 40]):
        with pytest.raises(OSError):
            FirstEnd(children[0].pid, threads)
    children[1].process.kill()
    children[1].process.wait()
    assert exit_code(children[1].pid) is None  # nobody's, by now


def test_threads_that_come_and_go_prove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = exits._Task("Z", 4, 2, 0)
    monkeypatch.setattr(exits, "_task", lambda path: ended)
    monkeypatch.setattr(os, "listdir", lambda path: ["17"])
    assert exit_code(17) is None  # there are two, and one was seen


def test_what_the_kernel_holds_is_stilled_once_it_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No test can hang in a device at will, so /proc is made up."""
    tasks = {17: exits._Task("D", 0, 2, 0), 18: exits._Task("X", 4, 2, 9)}
    killed: set[int] = set()
    monkeypatch.setattr(exits, "_tasks", lambda pid: tasks)
    monkeypatch.setattr(exits, "_is_killed", lambda pid, thread: thread in killed)
    assert not is_stilled(17)
    killed.add(17)
    assert is_stilled(17)
    assert exit_code(17) is None
    tasks[17] = exits._Task("R", 0, 2, 0)
    assert not is_stilled(17)


class TestFence:
    """A process whose end is never told, though it was killed."""

    def fenced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, stilled: bool
    ) -> tuple[Any, threading.Event]:
        came = threading.Event()
        monkeypatch.setattr(trainers, "_STILLED_S", 0.05)
        monkeypatch.setattr(trainers, "is_stilled", lambda pid: stilled)
        monkeypatch.setattr(Trainers, "_await_end", lambda self, trainer: None)
        logs = RankLogs(lambda attempt: tmp_path, {}, lambda: 0)
        group = Trainers(
            ["-c", "import time; time.sleep(60)"], logs, lambda m, c: None,
            on_stilled=lambda member: came.set(),
        )  # fmt: skip
        trainer = group.start(3, 0, {"RANK": "3"})
        group.fence(3)
        return trainer, came

    def test_one_that_runs_no_more_is_told_of(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trainer, came = self.fenced(tmp_path, monkeypatch, stilled=True)
        assert came.wait(60)
        assert trainer.context.subprocess_handlers[0].proc.wait() == -signal.SIGKILL

    def test_one_that_may_run_is_not(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trainer, came = self.fenced(tmp_path, monkeypatch, stilled=False)
        assert not came.wait(0.5)
        trainer.ended.set()  # ends the watch
        assert trainer.context.subprocess_handlers[0].proc.wait() == -signal.SIGKILL
