"""Snapshots in memory with parity: losses, changed bytes, unequal sizes, changed members."""

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from memory_nodes import HEADER, Cluster, file_of

from planaria.checkpoint.memory.courtesy import Pace
from planaria.checkpoint.memory.memory import Key, Scheme
from planaria.core.deadline import Deadline
from planaria.errors import CorruptError, PlanariaError, SaveFailedError

KEY = Key(3, "aa")


def soon() -> Deadline:
    return Deadline(60)


@pytest.fixture
def clusters() -> Iterator[list[Cluster]]:
    made: list[Cluster] = []
    yield made
    for cluster in made:
        cluster.close()


@pytest.mark.parametrize(("n", "m"), [(2, 1), (3, 1), (3, 2), (4, 2), (5, 3), (8, 3)])
def test_any_m_nodes_may_be_lost(n: int, m: int, clusters: list[Cluster]) -> None:
    cluster = Cluster(n, Scheme(m), sizes=[5000 + 1700 * i for i in range(n)])
    clusters.append(cluster)
    cluster.take(KEY)
    for lost in itertools.combinations(range(n), m):
        cluster.net.dead = {cluster.members[i].uuid for i in lost}
        reader = next(i for i in range(n) if i not in lost)
        newest = cluster.newest(reader)
        assert newest is not None
        assert set(newest.lost) == cluster.net.dead
        cluster.check(reader, newest)


def test_more_than_m_are_too_many(clusters: list[Cluster]) -> None:
    cluster = Cluster(4, Scheme(2))
    clusters.append(cluster)
    cluster.take(KEY)
    cluster.net.dead = {cluster.members[i].uuid for i in (1, 2, 3)}
    assert cluster.newest(0) is None
    with pytest.raises(CorruptError, match="1 of the 2 parts needed"):
        cluster.read(cluster.node(0), KEY, file_of(1, KEY), 0, HEADER)


def test_sizes_may_differ_a_lot(clusters: list[Cluster]) -> None:
    cluster = Cluster(4, Scheme(2), sizes=[1, 30000, 0, 777], ranks=2)
    clusters.append(cluster)
    cluster.take(KEY)
    for lost in itertools.combinations(range(4), 2):
        cluster.net.dead = {cluster.members[i].uuid for i in lost}
        reader = next(i for i in range(4) if i not in lost)
        newest = cluster.newest(reader)
        assert newest is not None
        cluster.check(reader, newest)


def test_groups_bear_losses_each(clusters: list[Cluster]) -> None:
    cluster = Cluster(6, Scheme(1, group_size=3), domains=["a", "a", "b", "b", "c", "c"])
    clusters.append(cluster)
    cluster.take(KEY)
    # A whole rack: one of each group.
    cluster.net.dead = {cluster.members[2].uuid, cluster.members[3].uuid}
    newest = cluster.newest(0)
    assert newest is not None
    cluster.check(0, newest)
    cluster.net.dead = {cluster.members[2].uuid, cluster.members[4].uuid}
    assert cluster.newest(0) is None


def test_parts_of_files_are_decoded(clusters: list[Cluster]) -> None:
    cluster = Cluster(4, Scheme(1), sizes=[20000] * 4)
    clusters.append(cluster)
    cluster.take(KEY)
    cluster.net.dead = {cluster.members[2].uuid}
    name = file_of(2, KEY)
    whole = cluster.images[name]
    for start, nbytes in [(0, 1), (4095, 2), (5000, 7000), (len(whole) - 3, 3), (8191, 9000)]:
        got = cluster.read(cluster.node(0), KEY, name, start, nbytes)
        assert np.array_equal(got, whole[start : start + nbytes])


def flip(cluster: Cluster, i: int, at: int, key: Key = KEY) -> None:
    node = cluster.node(i)
    span = node.local_span(key, file_of(i, key))
    assert span is not None
    cluster.memories[node.uuid].view(span)[at] ^= 1


def flip_parity(cluster: Cluster, i: int, key: Key = KEY) -> None:
    held = cluster.node(i)._holdings.get(key)
    for parity in held.parity.values():
        cluster.memories[cluster.node(i).uuid].view(parity.span)[::512] ^= 1


def test_changed_bytes_count_as_lost(clusters: list[Cluster]) -> None:
    cluster = Cluster(4, Scheme(2), sizes=[9000] * 4)
    clusters.append(cluster)
    cluster.take(KEY)
    flip(cluster, 1, 5000)
    flip_parity(cluster, 2)
    for i in range(4):
        newest = cluster.newest(i)
        assert newest is not None
        cluster.check(i, newest)
    # One more in the same stripes is too much.
    cluster.net.dead = {cluster.members[3].uuid}
    with pytest.raises(CorruptError, match="cannot be decoded"):
        cluster.read(cluster.node(0), KEY, file_of(1, KEY), 4096, 9000)


def test_bytes_changed_before_the_exchange_fail_the_snapshot(clusters: list[Cluster]) -> None:
    cluster = Cluster(3, Scheme(1))
    clusters.append(cluster)
    cluster.take(KEY)
    late = Key(4, "bb")
    cluster.capture(0, late)
    cluster.capture(1, late)
    flip(cluster, 0, 5000, late)
    cluster.capture(2, late)
    with pytest.raises(SaveFailedError, match="were changed in memory"):
        cluster.node(1).wait(late, soon())
    newest = cluster.newest(0)
    assert newest is not None
    assert newest.key == KEY
    cluster.check(0, newest)


def encoded(cluster: Cluster) -> list[tuple[int, int]]:
    nodes = (cluster.node(i) for i in range(len(cluster.members)))
    return [(n.exchange.encoded_blocks, n.exchange.copied_blocks) for n in nodes]


def test_what_has_not_changed_is_not_encoded_again(clusters: list[Cluster]) -> None:
    cluster = Cluster(4, Scheme(2), sizes=[9000] * 4)
    clusters.append(cluster)
    cluster.take(KEY)
    assert all(copied == 0 for _, copied in encoded(cluster))
    cluster.net.sent.clear()
    cluster.take(Key(4, "bb"), content=3)
    assert all(done == 0 and copied > 0 for done, copied in encoded(cluster))
    assert sum(cluster.net.sent.values()) < 20000  # meta and manifest
    cluster.take(Key(5, "cc"))
    assert all(done > 0 for done, _ in encoded(cluster))
    for lost in itertools.combinations(range(4), 2):
        cluster.net.dead = {cluster.members[i].uuid for i in lost}
        reader = next(i for i in range(4) if i not in lost)
        newest = cluster.newest(reader)
        assert newest is not None
        cluster.check(reader, newest)


def test_only_blocks_that_changed_are_encoded(clusters: list[Cluster]) -> None:
    cluster = Cluster(3, Scheme(1), sizes=[40000] * 3, chunk_nbytes=1024)
    clusters.append(cluster)
    cluster.take(KEY)
    name, later = file_of(1, Key(4, "bb")), Key(4, "bb")
    image = cluster.images[file_of(1, KEY)].copy()
    image[10000] ^= 7
    cluster.take_images(later, {name: image}, like=KEY)
    assert sum(done for done, _ in encoded(cluster)) == 1
    for lost in range(3):
        cluster.net.dead = {cluster.members[lost].uuid}
        newest = cluster.newest((lost + 1) % 3)
        assert newest is not None
        assert newest.key == later
        cluster.check((lost + 1) % 3, newest)


def test_parity_that_was_changed_in_memory_is_not_copied(clusters: list[Cluster]) -> None:
    cluster = Cluster(4, Scheme(2), sizes=[9000] * 4)
    clusters.append(cluster)
    cluster.take(KEY)
    flip_parity(cluster, 1)
    cluster.take(Key(4, "bb"), content=3)
    assert sum(done for done, _ in encoded(cluster)) > 0
    for lost in itertools.combinations(range(4), 2):
        cluster.net.dead = {cluster.members[i].uuid for i in lost}
        reader = next(i for i in range(4) if i not in lost)
        newest = cluster.newest(reader)
        assert newest is not None
        cluster.check(reader, newest)


def test_traffic_is_at_the_bound(clusters: list[Cluster]) -> None:
    n, m = 4, 2
    cluster = Cluster(n, Scheme(m), sizes=[16 * 4096 - HEADER] * n)
    clusters.append(cluster)
    cluster.take(KEY)
    chunk = 16 * 4096 // (n - m)
    payload = sum(cluster.net.sent.values())
    bound = n * (n - m) * chunk + n * (m - 1) * chunk
    assert bound <= payload <= bound + 20000  # meta and manifest


def test_memory_is_as_promised(clusters: list[Cluster]) -> None:
    n, m = 4, 2
    cluster = Cluster(n, Scheme(m), sizes=[16 * 4096 - HEADER] * n)
    clusters.append(cluster)
    for step in range(3):
        cluster.take(Key(step, f"a{step}"))
        used = {memory.used for memory in cluster.memories.values()}
        assert used == {16 * 4096 + m * 16 * 4096 // (n - m)}


def test_a_node_is_replaced(clusters: list[Cluster]) -> None:
    cluster = Cluster(4, Scheme(1), sizes=[9000] * 4)
    clusters.append(cluster)
    cluster.take(KEY)
    cluster.replace(2)
    newest = cluster.newest(2)  # the new one, which holds nothing
    assert newest is not None
    assert newest.key == KEY
    cluster.check(2, newest)
    cluster.take(Key(2, "bb"))  # rewound
    newest = cluster.newest(2)
    assert newest is not None
    assert newest.key == Key(2, "bb")
    assert newest.lost == []
    cluster.net.dead.add(cluster.members[0].uuid)
    cluster.check(2, newest)


def test_fewer_nodes_go_on(clusters: list[Cluster]) -> None:
    cluster = Cluster(4, Scheme(1), sizes=[9000] * 4)
    clusters.append(cluster)
    cluster.take(KEY)
    cluster.net.dead.add(cluster.members.pop().uuid)
    cluster.configure()
    newest = cluster.newest(1)
    assert newest is not None
    cluster.check(1, newest)
    cluster.take(Key(4, "bb"))
    cluster.net.dead.add(cluster.members[0].uuid)
    newest = cluster.newest(1)
    assert newest is not None
    assert newest.key == Key(4, "bb")
    cluster.check(1, newest)


def test_a_node_that_comes_back_with_an_old_snapshot_does_not_mislead(
    clusters: list[Cluster],
) -> None:
    cluster = Cluster(3, Scheme(1), sizes=[9000] * 3)
    clusters.append(cluster)
    cluster.take(Key(100, "aa"))
    away = cluster.members[2]
    cluster.net.dead.add(away.uuid)
    cluster.members.pop()
    cluster.configure()
    cluster.take(Key(60, "bb"))  # the run was rewound meanwhile
    cluster.net.dead.clear()
    for reader in (cluster.node(0), cluster.net.nodes[away.uuid]):
        newest = reader.recoverable(soon())
        assert [s.key for s in newest] == [Key(60, "bb")]
    # It is told of the new members, and finds what they have.
    back = cluster.net.nodes[away.uuid]
    cluster.members.append(away)
    cluster.configure()
    (newest,) = back.recoverable(soon())
    assert newest.key == Key(60, "bb")
    cluster.check(back, newest)
    cluster.take(Key(61, "cc"))
    cluster.net.dead.add(cluster.members[1].uuid)
    (newest,) = back.recoverable(soon())
    assert newest.key == Key(61, "cc")
    cluster.check(back, newest)


class Purse(Pace):
    """Counts what is taken; all is to be had."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = 0
        self._counting = threading.Lock()

    def take(self, n: int, deadline: Deadline, *, yields: bool = True) -> None:
        with self._counting:
            self.taken += n


def test_what_is_sent_for_parity_is_paced(clusters: list[Cluster]) -> None:
    n, m = 4, 2
    cluster = Cluster(n, Scheme(m), sizes=[16 * 4096 - HEADER] * n)
    clusters.append(cluster)
    purses = [Purse() for _ in range(n)]
    for i, purse in enumerate(purses):
        cluster.node(i)._links.pace = purse
    cluster.take(KEY)
    chunk = 16 * 4096 // (n - m)
    assert [purse.taken for purse in purses] == [(n - m) * chunk + (m - 1) * chunk] * n
    # Who recovers does not wait.
    cluster.net.dead = {cluster.members[1].uuid}
    newest = cluster.newest(0)
    assert newest is not None
    cluster.check(0, newest)
    assert sum(purse.taken for purse in purses) == n * (n - m + m - 1) * chunk


@pytest.mark.parametrize(
    "request_",
    [
        {"op": "nothing"},
        {"op": "read"},
        {"op": "read", "key": [1]},
        {"op": "read", "key": [3, "aa"], "file": "x", "start": 0, "nbytes": 5},
        {"op": "read", "key": [3, "aa"], "file": "", "start": 0, "nbytes": 1 << 40},
        {"op": "read", "key": [3, "aa"], "file": "", "start": 0, "nbytes": -1},
        {"op": "fetch", "key": [3, "aa"], "stripe": 99, "start": 0, "stop": 5},
        {"op": "fetch", "key": [3, "aa"], "stripe": 1, "start": 5, "stop": 0},
        {"op": "fetch", "key": [3, "aa"], "stripe": 1, "start": 0, "stop": 1 << 20},
        {"op": "store", "key": [3, "aa"], "stripe": 0, "first": -1, "checksums": [1]},
        {"op": "store", "key": [3, "aa"], "stripe": 1, "first": 0, "checksums": [1]},
        {"op": "exchange", "key": [3, "aa"], "base": None},
        {"op": "commit", "key": [3, "aa"], "node": "somebody"},
        {"op": "abort", "key": [3, "aa"], "node": "somebody", "why": "malice"},
    ],
)
def test_requests_that_make_no_sense_are_refused(
    request_: dict[str, Any], clusters: list[Cluster]
) -> None:
    cluster = Cluster(3, Scheme(1))
    clusters.append(cluster)
    cluster.take(KEY)
    with pytest.raises((PlanariaError, KeyError, TypeError, ValueError)):
        cluster.node(1).serve(request_, [b"{}"])
    newest = cluster.newest(1)
    assert newest is not None
    cluster.check(1, newest)
