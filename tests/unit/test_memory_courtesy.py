"""The forming of parity gives way to collectives, and is not kept from ending by them."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from memory_jobs import eventually, runtime_folder
from memory_nodes import Cluster
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from planaria.checkpoint import communicating, mark_communication
from planaria.checkpoint.format.checksum import checksum
from planaria.checkpoint.memory import communicating as module
from planaria.checkpoint.memory.client import NodeClient
from planaria.checkpoint.memory.courtesy import PAGE_NBYTES, Marks, Pace, Words
from planaria.checkpoint.memory.memory import Key, Scheme
from planaria.checkpoint.memory.process import Options
from planaria.checkpoint.memory.starting import connect_or_start
from planaria.core.deadline import Deadline

KEY = Key(3, "aa")


def make_words() -> Words:
    return Words(np.zeros(PAGE_NBYTES, np.uint8))


class Watched(Pace):
    """Notes whether a collective was under way when something went out."""

    def __init__(self, words: Words, patience_s: float, *, blind: bool) -> None:
        super().__init__(words=None if blind else words, patience_s=patience_s)
        self.asked, self.went, self._looked = threading.Event(), list[bool](), words

    def give_way(self, deadline: Deadline) -> None:
        self.asked.set()
        super().give_way(deadline)
        self.went.append(self._looked.busy(60.0))


def take(*, blind: bool, ends: bool, patience_s: float) -> list[bool]:
    """A snapshot of three nodes that begins in a collective; what went out meanwhile."""
    cluster = Cluster(3, Scheme(1), sizes=[9000] * 3)
    words = make_words()
    paces = [Watched(words, patience_s, blind=blind) for _ in range(3)]
    try:
        for i, pace in enumerate(paces):
            cluster.node(i)._links.pace = pace
        words.begin(5)
        thread = threading.Thread(target=cluster.take, args=(KEY,))
        thread.start()
        for pace in paces:
            assert pace.asked.wait(60)
        if ends:
            if blind:
                eventually(lambda: any(pace.went for pace in paces), "something that goes out")
            else:
                time.sleep(0.05)
            words.end(5)
        thread.join(60)
        newest = cluster.newest(0)
        assert newest is not None
        assert newest.key == KEY
        cluster.check(1, newest)
    finally:
        cluster.close()
    return [each for pace in paces for each in pace.went]


def test_nothing_goes_out_in_a_collective() -> None:
    went = take(blind=False, ends=True, patience_s=60.0)
    assert went
    assert not any(went)


def test_a_node_that_does_not_look_is_noticed() -> None:
    """The test before would fail."""
    assert any(take(blind=True, ends=True, patience_s=60.0))


def test_a_rank_that_is_stuck_in_a_collective_holds_up_nothing_for_long() -> None:
    assert all(take(blind=False, ends=False, patience_s=0.01))


def test_a_word_counts_while_one_of_its_collectives_is_under_way() -> None:
    words = make_words()
    one, other = Marks(words, 1), Marks(words, 513)
    one.begin()
    one.begin()
    one.end()
    assert words.busy(60.0)
    one.end()
    assert not words.busy(60.0)
    other.begin()
    assert words.busy(60.0)
    assert not words.busy(0.0)  # it began too long ago
    other.end()
    assert not words.busy(60.0)


def test_ranks_that_are_always_in_a_collective_take_half_of_the_time_at_most() -> None:
    """Else a snapshot of many batches would never be finished in time."""
    looked: list[bool] = []

    class Short(Words):
        """The collective ends while it is waited for."""

        def busy(self, patience_s: float) -> bool:
            looked.append(super().busy(patience_s))
            if len(looked) == 3:
                self.end(1)
            return looked[-1]

    words, now = Short(np.zeros(PAGE_NBYTES, np.uint8)), [0.0]
    words.begin(1)
    pace, budget = Pace(words=words, patience_s=60.0), Deadline(100.0, clock=lambda: now[0])
    now[0] = 50.5
    pace.take(1, budget)
    assert pace.held_s == 0
    assert not looked
    now[0] = 49.5
    pace.take(1, budget)
    assert pace.held_s > 0
    assert looked == [True, True, True, False]


def test_who_asks_says_whether_there_is_time_to_give_way() -> None:
    cluster = Cluster(3, Scheme(1), sizes=[9000] * 3)
    asked: list[bool] = []

    class Asked(Pace):
        def take(self, n: int, deadline: Deadline, *, yields: bool = True) -> None:
            asked.append(yields)

    for i in range(3):
        cluster.node(i)._links.pace = Asked()
    cluster.take(KEY)
    request = {"op": "fetch", "key": KEY.to_json(), "stripe": 0, "start": 0, "stop": 100,
               "paced": True}  # fmt: skip
    assert asked
    assert all(asked)
    cluster.node(1).serve({**request, "yields": False}, ())
    assert not asked[-1]
    cluster.close()


def test_a_word_of_another_clock_does_not_count() -> None:
    page = np.zeros(PAGE_NBYTES, np.uint8)
    words = Words(page)
    page.view(np.int64)[3] = time.monotonic_ns() + 10**12
    assert not words.busy(60.0)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[NodeClient]]:
    with runtime_folder(tmp_path / "runtime"):
        made = [
            connect_or_start(Options("job", f"n{i}", 4 << 20, timeout_s=60.0), f"rank {i}",
                             Deadline(60))
            for i in range(3)
        ]  # fmt: skip
        yield made
        for client in made:
            client.close()


def snapshot(nodes: list[NodeClient], key: Key) -> None:
    for i, node in enumerate(nodes):
        image = node.begin(key, f"f{i}", 8192, Deadline(30))
        image[:] = i + key.step
        node.seal(key, f"f{i}", [checksum(image[4096:])], 4096, 4096)
    nodes[0].describe(key, b"manifest", Deadline(30))
    nodes[0].wait(key, Deadline(60))


def test_ranks_tell_and_nodes_mend_by_themselves(
    nodes: list[NodeClient],
) -> None:
    for node in nodes:
        node.configure([each.member for each in nodes], Scheme(1), 1)
    snapshot(nodes, Key(1, "aa"))
    assert [node.status()["held_s"] for node in nodes] == [0.0] * 3
    with communicating():
        snapshot(nodes, Key(2, "bb"))
    assert all(node.status()["held_s"] > 0 for node in nodes)
    held = [node.status()["held_s"] for node in nodes]
    snapshot(nodes, Key(3, "cc"))
    assert [node.status()["held_s"] for node in nodes] == held
    # A node ends, and nobody takes its place: the others make the snapshot whole by themselves.
    nodes[1].stop()
    left = [nodes[0], nodes[2]]
    for node in left:
        node.configure([each.member for each in left], Scheme(1), 1)

    def whole() -> bool:
        return [(s.key.step, s.lost) for s in left[1].recoverable(Deadline(30))] == [(3, [])]

    eventually(whole, "the snapshot to be whole")
    for i, name in enumerate(("f0", "f1", "f2")):
        found = np.zeros(8192, np.uint8)
        left[1].fetch(Key(3, "cc"), name, 0, found.data, Deadline(30))
        assert np.all(found == i + 3)


def test_gradients_of_ddp_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = make_words()
    marks = Marks(words, 0)
    seen: list[bool] = []
    module.add(marks)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        plain = torch.nn.Linear(3, 2)
        model = DistributedDataParallel(plain)

        def hook(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future:
            seen.append(words.busy(60.0))
            return allreduce_hook(group, bucket)

        mark_communication(model, hook)
        model(torch.ones(4, 3)).sum().backward()
        assert seen == [True]
        assert not words.busy(60.0)
        assert plain.weight.grad is not None
        assert torch.equal(plain.weight.grad, torch.full((2, 3), 4.0))
    finally:
        dist.destroy_process_group()
