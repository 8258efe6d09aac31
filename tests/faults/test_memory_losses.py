"""Every set of nodes lost at every point of a snapshot in memory: one whole snapshot is left."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from memory_losses import (
    FIRST,
    SECOND,
    THIRD,
    Loss,
    acknowledged,
    check_after,
    lose,
    subsets,
    take_what_can_be,
)
from memory_nodes import Cluster

from planaria.checkpoint.memory import images, points
from planaria.checkpoint.memory.held import State
from planaria.checkpoint.memory.holdings import Holdings
from planaria.checkpoint.memory.leader import Leader
from planaria.checkpoint.memory.memory import Key, Scheme
from planaria.checkpoint.memory.parts import Parts
from planaria.checkpoint.memory.recovery import Recovery
from planaria.core.deadline import Deadline
from planaria.core.points import armed
from planaria.errors import FaultError, PlanariaError, SaveFailedError

SMALL = [(2, 1), (3, 2), (4, 2)]


@pytest.mark.parametrize("point", points.SNAPSHOT)
def test_any_m_nodes_may_be_lost_at_any_point(point: str) -> None:
    for n, m in SMALL:
        reached = [lose(n, m, nodes, point) for nodes in subsets(n, m)]
        # With one parity there is nobody to send it to.
        assert all(reached) or (m == 1 and point == points.STORE)


@pytest.mark.parametrize("point", points.SNAPSHOT)
def test_three_of_eight_may_be_lost(point: str) -> None:
    assert lose(8, 3, (0, 3, 7), point, hit=2 if point in points.ON_ALL else 1)


@pytest.mark.soak
@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("point", points.SNAPSHOT)
def test_all_losses_at_all_points(point: str, m: int) -> None:
    for n in range(m + 1, 9):
        for hit in (1, 2, n, 2 * n) if point in points.ON_ALL else (1,):
            for nodes in subsets(n, m):
                lose(n, m, nodes, point, hit)


@pytest.mark.parametrize("point", points.SNAPSHOT)
def test_a_point_that_fails_ends_the_snapshot_and_no_more(point: str) -> None:
    cluster = Cluster(3, Scheme(2))
    cluster.take(FIRST)
    failed = threading.Event()

    def fail(name: str, step: int | None) -> None:
        if not failed.is_set():
            failed.set()
            raise FaultError("an error")

    with armed(callbacks={point: fail}):
        take_what_can_be(cluster, SECOND)
        told = acknowledged(cluster, SECOND)
    check_after(cluster, told)
    cluster.take(THIRD)
    newest = cluster.newest(1)
    assert newest is not None
    assert newest.key == THIRD
    cluster.close()


def test_a_leader_that_is_away_for_a_while_is_believed() -> None:
    cluster = Cluster(3, Scheme(1))
    cluster.take(FIRST)
    leader = cluster.members[0].uuid
    # It has committed, and nobody hears of it.
    with armed(callbacks={points.COMMIT: lambda _, __: cluster.net.silent.add(leader)}):
        cluster.take(SECOND, wait=False)
        with pytest.raises(SaveFailedError, match="not known"):
            cluster.node(1).wait(SECOND, Deadline(60))
    newest = cluster.newest(1)
    assert newest is not None
    assert newest.key == FIRST
    cluster.check(1, newest)
    cluster.net.silent.clear()
    newest = cluster.newest(1)
    assert newest is not None
    assert newest.key == SECOND
    cluster.check(1, newest)
    cluster.take(THIRD)
    cluster.close()


def test_what_was_in_doubt_is_dropped_by_those_who_are_left() -> None:
    cluster = Cluster(4, Scheme(1))
    cluster.take(FIRST)
    lost = Loss(cluster, (0,))
    with armed(callbacks={points.COMMIT: lost}):
        take_what_can_be(cluster, SECOND)
        assert not acknowledged(cluster, SECOND)
    assert {h.state for h in cluster.node(1)._holdings.all()} == {State.PREPARED, State.COMMITTED}
    cluster.members.pop(0)
    cluster.configure()
    cluster.take(THIRD)
    assert [h.key for h in cluster.node(1)._holdings.all()] == [THIRD]
    # The lost leader, back again, has nobody who would follow it.
    back = cluster.net.nodes["n0x0"]
    cluster.net.dead.clear()
    assert [s.key for s in cluster.node(1).recoverable(Deadline(60))] == [THIRD]
    assert [s.key for s in back.recoverable(Deadline(60))] == [THIRD]
    cluster.close()


def look_in_mid_exchange() -> None:
    """Nodes are lost while parity is formed, and others look before that was noticed."""
    cluster = Cluster(4, Scheme(2))
    go_on, here = threading.Event(), threading.Semaphore(0)

    def stop(name: str, step: int | None) -> None:
        here.release()
        go_on.wait(60)

    try:
        cluster.take(FIRST)
        with armed(callbacks={points.FETCH: stop}):
            cluster.take(SECOND, wait=False)
            for i in range(4):  # none is about to give up for another reason
                assert here.acquire(timeout=60)
                while not cluster.node(i)._holdings.get(SECOND).announced:
                    time.sleep(0.001)
            cluster.net.dead = {cluster.members[i].uuid for i in (0, 3)}
            for i in cluster.alive():
                newest = cluster.newest(i)
                assert newest is not None
                assert newest.key == FIRST
                cluster.check(i, newest)
            go_on.set()
            acknowledged(cluster, SECOND)
    finally:
        go_on.set()
        cluster.close()


def test_what_is_on_its_way_is_not_read() -> None:
    look_in_mid_exchange()


# Each promise broken, one at a time: what was tested above must then fail.


def ignore_the_commit_marker(monkeypatch: pytest.MonkeyPatch) -> None:
    states = Recovery._states

    def all_committed(*args: object) -> dict[str, dict[Key, State]]:
        found = states(*args)  # type: ignore[arg-type]
        return {
            uuid: {key: State.COMMITTED for key, s in held.items() if s >= State.SEALED}
            for uuid, held in found.items()
        }

    monkeypatch.setattr(Recovery, "_states", all_committed)


def use_the_slot_before_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Holdings.image

    def greedy(self: Holdings, key: Key, *args: object) -> object:
        with self.changed:
            for older in self.all():
                if older.key != key:
                    self._remove(older)
        return image(self, key, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Holdings, "image", greedy)


def do_not_wait_for_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    def hasty(self: Holdings, key: Key) -> bool:
        with self.changed:
            held = self._held.get(key)
            if held is None or held.state != State.SEALED or held.meta is None:
                return False
            held.state = State.PREPARED
            return True

    monkeypatch.setattr(Holdings, "prepare", hasty)
    # Parity that comes too late is parity that does not come.
    monkeypatch.setattr(Parts, "store", lambda *_: None)


def do_not_wait_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = Leader._wait

    def hasty(self: Leader, running: object, *args: object) -> None:
        if running.sealed.keys() != set(running.uuids):  # type: ignore[attr-defined]
            wait(self, running, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Leader, "_wait", hasty)
    monkeypatch.setattr(Holdings, "commit", commit_anything)


def commit_anything(self: Holdings, key: Key) -> None:
    with self.changed:
        self.get(key).state = State.PREPARED
        original_commit(self, key)


original_commit = Holdings.commit


def lose_in_several_ways() -> None:
    look_in_mid_exchange()
    for point in (points.FETCH, points.STORE, points.COMPLETE):
        for nodes in subsets(4, 2):
            lose(4, 2, nodes, point, go_on=False)


@pytest.mark.parametrize(
    "sabotage",
    [
        ignore_the_commit_marker,
        use_the_slot_before_the_commit,
        do_not_wait_for_parity,
        do_not_wait_for_all,
    ],
)
def test_a_broken_promise_is_noticed(
    sabotage: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch)
    with pytest.raises((AssertionError, PlanariaError)):
        lose_in_several_ways()


@pytest.fixture
def changed() -> Iterator[Cluster]:
    cluster = Cluster(3, Scheme(1))
    cluster.take(FIRST)
    node = cluster.node(1)
    for held in node._holdings.all():
        for span in held.spans():
            cluster.memories[node.uuid].view(span)[4096:] ^= 1
    yield cluster
    cluster.close()


def test_all_of_a_node_may_be_changed(changed: Cluster) -> None:
    newest = changed.newest(1)
    assert newest is not None
    for reader in range(3):
        changed.check(reader, newest)


def test_a_checksum_that_is_not_looked_at_is_noticed(
    changed: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "mismatch", lambda *_: False)
    newest = changed.newest(1)
    assert newest is not None
    with pytest.raises(AssertionError):
        changed.check(1, newest)
