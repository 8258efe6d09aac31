"""One snapshot in which nodes are lost at a named point, and what must hold then."""

import contextlib
import itertools
import threading
from collections.abc import Iterator

from memory_nodes import Cluster, manifest_of

from planaria.checkpoint.memory.memory import Key, Scheme
from planaria.core.deadline import Deadline
from planaria.core.points import armed
from planaria.errors import FaultError, NotCommittedError, PlanariaError, SaveFailedError

FIRST, SECOND, THIRD = Key(1, "aa"), Key(2, "bb"), Key(3, "cc")


class Loss:
    """Has nodes be lost when a point is reached for the n-th time, by whichever node."""

    def __init__(self, cluster: Cluster, nodes: tuple[int, ...], hit: int = 1) -> None:
        self._net = cluster.net
        self._lost = {cluster.members[i].uuid for i in nodes}
        self._lock = threading.Lock()
        self._left = hit
        self.happened = False

    def __call__(self, name: str, step: int | None) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._net.dead |= self._lost
                self.happened = True
        if self._net.running_on() in self._net.dead:
            raise FaultError(f"lost at {name}")


def subsets(n: int, most: int) -> Iterator[tuple[int, ...]]:
    for size in range(1, most + 1):
        yield from itertools.combinations(range(n), size)


def take_what_can_be(cluster: Cluster, key: Key) -> None:
    """A snapshot in which nodes may be lost: the other ranks notice, and give up."""
    alive = cluster.alive()
    try:
        for i in range(len(cluster.members)):
            cluster.capture(i, key)
        cluster.net.on(
            cluster.node(0).uuid, lambda: cluster.node(0).describe(key, manifest_of(key))
        )
    except PlanariaError as error:
        for i in alive:
            if i in cluster.alive():
                cluster.give_up(i, key, str(error))


def acknowledged(cluster: Cluster, key: Key) -> bool:
    """Waits on all nodes that are left; whether any was told that all have committed."""
    told = False
    for i in cluster.alive():
        # Said before the deadline, whose error would go on from here.
        with contextlib.suppress(SaveFailedError, NotCommittedError):
            cluster.node(i).wait(key, Deadline(60))
            told = True
    return told


def check_after(cluster: Cluster, told: bool) -> Key:
    """One of both snapshots is there on all nodes that are left, the newer one if it was said."""
    found = set()
    for i in cluster.alive():
        newest = cluster.newest(i)
        assert newest is not None, "nothing can be read any more"
        found.add(newest.key)
        assert newest.key == SECOND or (newest.key == FIRST and not told), newest.key
        cluster.check(i, newest)
    assert len(found) == 1
    return found.pop()


def lose(
    n: int, m: int, nodes: tuple[int, ...], point: str, hit: int = 1, *, go_on: bool = True
) -> bool:
    """The whole case; whether the point was reached so often."""
    cluster = Cluster(n, Scheme(m), sizes=[2000 + 700 * i for i in range(n)])
    try:
        cluster.take(FIRST)
        loss = Loss(cluster, nodes, hit)
        with armed(callbacks={point: loss}):
            take_what_can_be(cluster, SECOND)
            told = acknowledged(cluster, SECOND)
        if not loss.happened:
            assert told
            return False
        check_after(cluster, told)
        if go_on:
            for i in nodes:
                cluster.replace(i, tell=False)
            cluster.configure()
            check_after(cluster, told)
            cluster.take(THIRD)
            newest = cluster.newest(nodes[0])
            assert newest is not None
            assert newest.key == THIRD
            cluster.check(nodes[0], newest)
        return True
    finally:
        cluster.close()
