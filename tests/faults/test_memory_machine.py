"""Snapshots, losses, absences and returns in any order: what was promised can be read, bit for bit.

The promise: a snapshot of which all nodes said that it is committed can be read, or a newer one, by
any node that is in touch with the others, while of every group no more than m nodes are lost.
"""

import threading
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from memory_losses import Loss, acknowledged, take_what_can_be
from memory_nodes import Cluster

from planaria.checkpoint.memory import points
from planaria.checkpoint.memory.memory import Key, Scheme
from planaria.core.deadline import Deadline
from planaria.core.points import armed
from planaria.errors import PlanariaError

NODES = st.integers(0, 100)


class Losses(RuleBasedStateMachine):
    """One job of 5 nodes in groups that bear 2 losses."""

    scheme = Scheme(2)
    nodes = 5

    def __init__(self) -> None:
        super().__init__()
        sizes = [1500 + 900 * i for i in range(self.nodes)]
        self.cluster = Cluster(self.nodes, self.scheme, sizes=sizes, timeout_s=2.0)
        self.promised: Key | None = None
        self.order: list[Key] = []  # of the attempts
        self.harmed: set[str] = set()  # nodes of the promised snapshot that have lost something
        self.group: list[str] = []
        self.number = 0

    def teardown(self) -> None:
        self.cluster.close()

    def bearable(self) -> int:
        """So many more may be lost."""
        if self.promised is None:
            return 0
        return self.scheme.losses - len(self.harmed)

    def harm(self, pick: int) -> str | None:
        """Another node of the promised snapshot that may lose something, if one may."""
        if self.bearable() < 1:
            return None
        there = [u for u in self.group if u not in self.harmed]
        self.harmed.add(there[pick % len(there)])
        return there[pick % len(there)]

    def attempt(self, step: int | None = None) -> Key:
        self.number += 1
        key = Key(self.number if step is None else step, f"a{self.number}")
        self.order.append(key)
        return key

    def snapshot(self, key: Key) -> None:
        take_what_can_be(self.cluster, key)
        if acknowledged(self.cluster, key):
            self.promised = key
            self.group = [m.uuid for m in self.cluster.members]
            self.harmed = {u for u in self.group if u in self.away()}

    def away(self) -> set[str]:
        return self.cluster.net.dead | self.cluster.net.silent

    @rule(rewind=st.integers(0, 3))
    def take(self, rewind: int) -> None:
        self.snapshot(self.attempt(self.number // rewind if rewind else None))

    @rule(point=st.sampled_from(points.SNAPSHOT), hit=st.integers(1, 8), pick=NODES)
    def take_and_lose(self, point: str, hit: int, pick: int) -> None:
        lost = self.harm(pick)
        if lost is None:
            return
        members = [m.uuid for m in self.cluster.members]
        numbers = tuple(i for i, u in enumerate(members) if u == lost)
        with armed(callbacks={point: Loss(self.cluster, numbers, hit)}):
            self.snapshot(self.attempt())
        if lost in self.group and lost not in self.away():
            self.harmed.discard(lost)  # the point was not reached so often

    @rule(point=st.sampled_from(points.SNAPSHOT), hit=st.integers(1, 8), pick=NODES)
    def take_and_cut_off(self, point: str, hit: int, pick: int) -> None:
        gone = self.harm(pick)
        if gone is None:
            return
        left = [hit]
        lock = threading.Lock()

        def cut(name: str, step: int | None) -> None:
            with lock:
                left[0] -= 1
                if left[0] == 0:
                    self.cluster.net.silent.add(gone)

        with armed(callbacks={point: cut}):
            self.snapshot(self.attempt())
        if gone in self.group and gone not in self.away():
            self.harmed.discard(gone)

    @rule(pick=NODES)
    def lose(self, pick: int) -> None:
        lost = self.harm(pick)
        if lost is not None:
            self.cluster.net.dead.add(lost)

    @rule(pick=NODES)
    def cut_off(self, pick: int) -> None:
        gone = self.harm(pick)
        if gone is not None:
            self.cluster.net.silent.add(gone)

    @rule()
    def come_back(self) -> None:
        back, self.cluster.net.silent = self.cluster.net.silent, set()
        self.harmed -= back - self.cluster.net.dead

    @rule()
    def replace(self) -> None:
        """All that are away get a successor; the job goes on with those."""
        for i, member in enumerate(self.cluster.members):
            if member.uuid in self.away():
                self.cluster.replace(i, tell=False)
        self.cluster.configure()

    @rule(pick=NODES, at=st.integers(4096, 5000))
    @precondition(lambda self: self.promised is not None)
    def change_a_byte(self, pick: int, at: int) -> None:
        flipped = self.harm(pick)
        if flipped is None:
            return
        for held in self.cluster.net.nodes[flipped]._holdings.all():
            for span in held.spans():
                view = self.cluster.memories[flipped].view(span)
                view[at % len(view)] ^= 1

    @invariant()
    def what_was_promised_can_be_read(self) -> None:
        cluster = self.cluster
        if self.promised is None:
            return
        for member in cluster.members:
            if member.uuid in self.away():
                continue
            node = cluster.net.nodes[member.uuid]
            found = node.recoverable(Deadline(60))
            assert found, f"{self.promised} was promised, nothing is there"
            assert self.order.index(found[0].key) >= self.order.index(self.promised)
            cluster.check(node, found[0])


def run(examples: int, steps: int, **change: Any) -> None:
    machine = type("Machine", (Losses,), change)
    machine.TestCase.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        database=None,
    )
    machine.TestCase().runTest()


def test_any_order_of_losses_and_returns() -> None:
    run(12, 10)


def test_any_order_in_small_groups() -> None:
    run(6, 10, scheme=Scheme(1), nodes=3)


@pytest.mark.soak
@pytest.mark.parametrize("n", [2, 3, 5, 7])
@pytest.mark.parametrize("m", [1, 2, 3])
def test_any_order_for_long(n: int, m: int) -> None:
    if m < n:
        run(40, 25, scheme=Scheme(m), nodes=n)


def test_a_lost_promise_is_noticed() -> None:
    cluster = Losses()
    cluster.take(0)
    for node in list(cluster.cluster.net.nodes.values()):
        node._holdings.clear()
    with pytest.raises((AssertionError, PlanariaError)):
        cluster.what_was_promised_can_be_read()
    cluster.teardown()
