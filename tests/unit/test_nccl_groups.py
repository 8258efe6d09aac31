"""NCCL groups, with a double of torch's: how they are ended, and made again afterwards."""

import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from planaria.checkpoint.memory import communicating
from planaria.checkpoint.memory.courtesy import PAGE_NBYTES, Marks, Words
from planaria.core.deadline import Deadline
from planaria.elastic.membership.groups import make_any
from planaria.elastic.membership.view import View
from planaria.elastic.reduction import nccl
from planaria.elastic.reduction.nccl import DeviceTransport, NcclGroup, NcclTransport, local_device
from planaria.elastic.reduction.transport import Alone
from planaria.errors import CollectiveError, ConfigError, DeadlineError, NotSupportedError

CUDA = torch.device("cuda", 0)
BUDGET_S = 60.0


class Work:
    """An operation on a stream: it ends when its group says so."""

    def __init__(self, group: "Nccl") -> None:
        self._group = group

    def is_completed(self) -> bool:
        return self._group.through

    def wait(self) -> None:
        assert self._group.through, "the stream of the caller was made to wait for ever"


class Nccl:
    """Stands for `ProcessGroupNCCL`: keeps what is asked of it."""

    made: ClassVar[list["Nccl"]] = []
    connecting = threading.Event()
    hangs = False

    class Options:
        _timeout: Any = None

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        assert options._timeout.total_seconds() > 0
        self.store, self.through = store, False
        self.calls: list[str] = []
        self.aborted_by: str | None = None
        self.aborted = threading.Event()
        Nccl.made.append(self)

    def eager_connect_single_device(self, device: torch.device) -> None:
        Nccl.connecting.set()
        if Nccl.hangs and not self.aborted.wait(BUDGET_S):
            return
        if self.aborted.is_set():
            raise RuntimeError("NCCL communicator was aborted")

    def abort(self) -> None:
        self.aborted_by = threading.current_thread().name
        self.aborted.set()

    def _start_coalescing(self, device: torch.device) -> None:
        self.calls.append("start")

    def _end_coalescing(self, device: torch.device) -> Work:
        self.calls.append("end")
        return Work(self)

    def send(self, tensors: Any, peer: int, tag: int) -> None:
        self.calls.append(f"send {peer}")

    def recv(self, tensors: Any, peer: int, tag: int) -> None:
        self.calls.append(f"recv {peer}")

    def allreduce(self, tensors: Any) -> Work:
        return Work(self)


class Members:
    """A membership that hears of a loss in a thread of its own."""

    def __init__(self) -> None:
        self.lost = False
        self._calls: list[Callable[[frozenset[int]], object]] = []

    def store(self, view: View, name: str) -> str:
        return f"gen{view.generation}/{name}"

    def disturbed(self) -> bool:
        return self.lost

    def gone(self) -> frozenset[int]:
        return frozenset({1} if self.lost else ())

    def on_loss(self, call: Callable[[frozenset[int]], object]) -> None:
        self._calls.append(call)

    def lose(self, when: Callable[[], object]) -> threading.Thread:
        """A loss, told once `when` returns."""

        def tell() -> None:
            when()
            self.lost = True
            for call in self._calls:
                call(frozenset({1}))

        thread = threading.Thread(target=tell, name="control")
        thread.start()
        return thread


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "_backend", lambda: Nccl)
    monkeypatch.setattr(Nccl, "made", [])
    monkeypatch.setattr(Nccl, "connecting", threading.Event())
    monkeypatch.setattr(Nccl, "hangs", False)
    for name in ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING"):
        monkeypatch.delenv(name, raising=False)


def connected(members: Members, view: View) -> NcclTransport:
    def design(store: Any, rank: int, size: int, timeout_s: float) -> NcclGroup:
        return NcclGroup(store, rank, size, timeout_s, CUDA)

    group = make_any(design, members, view, "devices", Deadline(BUDGET_S))  # pyright: ignore[reportArgumentType]
    return NcclTransport(group)


def parts(*peers: int) -> list[list[torch.Tensor]]:
    return [[torch.ones(1)] if peer in peers else [] for peer in range(3)]


def test_a_loss_aborts_and_the_next_generation_is_made_anew() -> None:
    members = Members()
    transport = connected(members, View(1, (0, 1, 2), 0))
    members.on_loss(lambda ids: transport.close())
    wait = transport.exchange(0, parts(1, 2), parts(1, 2))
    control = members.lose(lambda: time.sleep(0.05))
    with pytest.raises(CollectiveError, match="closed"):
        wait(Deadline(BUDGET_S))
    control.join()
    (first,) = Nccl.made
    assert first.aborted_by == "control"
    with pytest.raises(CollectiveError):
        transport.all_reduce(torch.ones(1))
    members.lost = False
    again = connected(members, View(2, (0, 2), 0, lost=(1,)))
    second = Nccl.made[1]
    assert (first.store, second.store) == ("gen1/devices", "gen2/devices")
    second.through = True
    again.all_reduce(torch.ones(1))(Deadline(BUDGET_S))
    assert second.aborted_by is None


def test_a_loss_while_the_group_is_made_aborts_it() -> None:
    Nccl.hangs = True
    members = Members()
    control = members.lose(lambda: Nccl.connecting.wait(BUDGET_S))
    with pytest.raises(CollectiveError, match=r"lost: 1"):
        connected(members, View(1, (0, 1, 2), 0))
    control.join()
    assert Nccl.made[0].aborted.wait(BUDGET_S)


def test_an_abort_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NcclGroup, "close", lambda self: None)
    transport = connected(Members(), View(1, (0, 1), 0))
    transport.close()
    with pytest.raises(DeadlineError):  # as it would for ever
        transport.all_reduce(torch.ones(1))(Deadline(0.05))


def test_an_exchange_is_one_launch_and_has_its_deadline() -> None:
    transport = connected(Members(), View(1, (0, 1, 2), 0))
    wait = transport.exchange(0, parts(2), parts(1))
    (group,) = Nccl.made
    assert group.calls[0] == "start"
    assert group.calls[-1] == "end"
    assert sorted(group.calls[1:-1]) == ["recv 1", "send 2"]
    with pytest.raises(DeadlineError):
        wait(Deadline(0.02))
    group.through = True
    wait(Deadline(BUDGET_S))
    transport.exchange(1, parts(), parts())(Deadline(BUDGET_S))


def test_tensors_of_the_host_go_over_gloo() -> None:
    members = Members()
    transport = DeviceTransport(Alone(), connected(members, View(1, (0, 1, 2), 0)))
    transport.exchange(0, parts(1), parts(1))(Deadline(BUDGET_S))  # no NCCL: it would hang
    transport.all_reduce(torch.ones(1))(Deadline(BUDGET_S))
    transport.close()
    assert Nccl.made[0].aborted.is_set()
    assert Nccl.made[0].calls == []


def test_a_rank_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_device(count=lambda: 2) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="there are 1"):
        local_device(count=lambda: 1)
    with pytest.raises(ConfigError, match="not cpu"):
        NcclGroup(None, 0, 2, 1.0, torch.device("cpu"))


def test_without_nccl_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if torch.distributed.is_nccl_available():
        pytest.skip("this torch has it")
    with pytest.raises(NotSupportedError, match="without NCCL"):
        NcclGroup(None, 0, 2, 1.0, CUDA).make()


def test_snapshots_in_memory_are_told_of_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    words, told = Words(np.zeros(PAGE_NBYTES, np.uint8)), list[bool]()
    marks = Marks(words, 0)
    communicating.add(marks)

    def is_completed(work: Work) -> bool:
        told.append(words.busy(60.0))
        return len(told) == 3

    monkeypatch.setattr(Work, "is_completed", is_completed)
    transport = connected(Members(), View(1, (0, 1, 2), 0))
    wait = transport.exchange(0, parts(1, 2), parts(1, 2))
    Nccl.made[0].through = True
    wait(Deadline(BUDGET_S))
    assert told == [True] * 3
    assert not words.busy(60.0)
