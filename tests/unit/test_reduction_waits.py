"""Groups that are given up: all waits in them end, in whatever state their connections were."""

import contextlib
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from planaria.checkpoint.memory import communicating
from planaria.checkpoint.memory.courtesy import PAGE_NBYTES, Marks, Words
from planaria.core.deadline import Deadline
from planaria.elastic.reduction import transport as transport_module
from planaria.elastic.reduction import waiting
from planaria.elastic.reduction.gloo import GlooGroup
from planaria.elastic.reduction.transport import GroupTransport
from planaria.errors import CollectiveError, DeadlineError

LARGE = 1 << 26
BUDGET_S = 20.0


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def pair() -> list[GroupTransport]:
    """Two ranks, in threads of this process."""
    store, made = dist.HashStore(), dict[int, GroupTransport]()

    def make(rank: int) -> None:
        group = GlooGroup(dist.PrefixStore("g", store), rank, 2, BUDGET_S)
        made[rank] = GroupTransport(group.make())

    in_threads([lambda: make(0), lambda: make(1)])
    return [made[0], made[1]]


def in_threads(calls: list[Callable[[], object]]) -> list[BaseException | None]:
    """Runs them beside each other; returns what each has raised."""
    errors: list[BaseException | None] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            calls[index]()
        except Exception as error:
            errors[index] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def cut_in_the_middle() -> list[BaseException | None]:
    """Gives a group up, on one side, while a large message is under way; how the waits ended."""
    sender, receiver = pair()
    into = torch.zeros(LARGE, dtype=torch.uint8)
    # Nothing of it arrives at an end before it was cut: the sender has its buffers full by then.
    wait_in = receiver.exchange(3, [[], []], [[into], []])
    wait_out = sender.exchange(3, [[], [torch.ones(LARGE, dtype=torch.uint8)]], [[], []])

    def cut() -> None:
        until = Deadline(BUDGET_S)
        while not into[0] and not until.expired:
            time.sleep(0.0001)
        receiver.close()
        sender.close()

    return in_threads(
        [lambda: wait_in(Deadline(BUDGET_S)), lambda: wait_out(Deadline(BUDGET_S)), cut]
    )[:2]


def test_a_message_that_is_cut_in_the_middle_is_not_waited_for() -> None:
    for error in cut_in_the_middle():
        # One that was through by then has none.
        assert error is None or isinstance(error, CollectiveError)


def test_waiting_for_gloo_itself_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(self: Any, works: list[Any], seconds: float) -> None:
        for work in works:
            work.wait(timedelta(seconds=2.0))

    monkeypatch.setattr(waiting.Waits, "wait", wait)
    until = Deadline(60)
    while not until.expired:  # it takes one that is hit in the middle
        errors = cut_in_the_middle()
        if any("Timed out" in str(error) for error in errors):
            return
    raise AssertionError("gloo has woken all: `Waits` is not needed any more")


def test_what_arrives_is_there_and_errors_are_told() -> None:
    first, second = pair()
    into = torch.zeros(3)
    errors = in_threads([
        lambda: first.exchange(1, [[], [torch.arange(3.0)]], [[], []])(Deadline(BUDGET_S)),
        lambda: second.exchange(1, [[], []], [[into], []])(Deadline(BUDGET_S)),
    ])  # fmt: skip
    assert errors == [None, None]
    assert into.tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(DeadlineError):
        second.exchange(2, [[], []], [[into], []])(Deadline(0.05))
    first.close()
    second.close()
    with pytest.raises(CollectiveError, match="closed"):
        first.exchange(4, [[], [into]], [[], []])
    waiting.settle(BUDGET_S)


class Counted:
    """Waits as long as gloo would: whole milliseconds, the rest is dropped."""

    ends = 0.0

    def wait(self, limit: timedelta) -> None:
        self.ends = time.monotonic() + limit // timedelta(milliseconds=1) / 1000


def test_gloo_does_not_give_up_before_the_deadline() -> None:
    # A wait that was over before it would look like a broken connection, not like a timeout.
    waits, work = waiting.Waits(), Counted()
    for _ in range(50):
        until = time.monotonic() + 0.5 + 0.0007
        waits.wait([work], until - time.monotonic())
        assert work.ends >= until
    waits.close()


class Odd:
    """Fails as torch does not."""

    def wait(self, limit: timedelta) -> None:
        raise TypeError("odd")


def test_errors_of_whatever_kind_leave_nothing_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = waiting.Waits()
    with pytest.raises(TypeError, match="odd"):
        waits.wait([Odd()], BUDGET_S)

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    full = waiting.Waits()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="new thread"):
        full.wait([Counted()], BUDGET_S)
    monkeypatch.undo()
    until = Deadline(BUDGET_S)
    while not (waits.settled and full.settled):
        until.check("helpers to be free")


def test_a_group_that_is_given_up_in_the_making() -> None:
    group = GlooGroup(dist.HashStore(), 0, 2, 1.0)
    group.close()
    with pytest.raises(CollectiveError):
        group.make()


def told_in_waits(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether snapshots in memory are told, in waits for an exchange and for an all-reduce."""
    words, told = Words(np.zeros(PAGE_NBYTES, np.uint8)), list[bool]()
    marks = Marks(words, 0)
    communicating.add(marks)
    really = waiting.Waits.wait

    def wait(self: waiting.Waits, works: Any, seconds: float) -> None:
        told.append(words.busy(60.0))
        really(self, works, seconds)

    monkeypatch.setattr(waiting.Waits, "wait", wait)
    left, right = pair()
    taken, total = torch.zeros(3), [torch.ones(2), torch.ones(2)]
    waits = [
        left.exchange(1, [[], [torch.ones(3)]], [[], []]),
        right.exchange(1, [[], []], [[taken], []]),
        left.all_reduce(total[0]),
        right.all_reduce(total[1]),
    ]
    for each in waits:
        each(Deadline(BUDGET_S))
    assert taken.tolist() == [1.0] * 3
    assert [each.tolist() for each in total] == [[2.0, 2.0]] * 2
    assert not words.busy(60.0)
    left.close()
    right.close()
    return told


def test_snapshots_in_memory_are_told_of_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told_in_waits(monkeypatch) == [True] * 4


def test_waits_that_are_not_told_of_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "communicating", contextlib.nullcontext)
    assert told_in_waits(monkeypatch) == [False] * 4
