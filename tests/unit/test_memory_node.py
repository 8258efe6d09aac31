"""Snapshots in memory without parity: one node, several nodes, commit and failure."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from memory_nodes import HEADER, Cluster, file_of, manifest_of

from planaria.checkpoint.memory.memory import Key, Scheme
from planaria.core.deadline import Deadline
from planaria.errors import (
    ConfigError,
    CorruptError,
    DeadlineError,
    MemoryBudgetError,
    NotCommittedError,
    SaveFailedError,
)


@pytest.fixture(params=[1, 3])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    made = Cluster(request.param, ranks=2)
    yield made
    made.close()


def soon() -> Deadline:
    return Deadline(60)


def test_a_snapshot_is_read_back(cluster: Cluster) -> None:
    key = Key(7, "aa")
    cluster.take(key)
    for i in range(len(cluster.members)):
        newest = cluster.newest(i)
        assert newest is not None
        assert (newest.key, newest.lost) == (key, [])
        cluster.check(i, newest)


def test_a_part_of_a_file_is_read(cluster: Cluster) -> None:
    key = Key(7, "aa")
    cluster.take(key)
    name = file_of(len(cluster.members) - 1, key, 1)
    got = cluster.read(cluster.node(0), key, name, 4000, 1234)
    assert np.array_equal(got, cluster.images[name][4000:5234])
    assert len(cluster.read(cluster.node(0), key, name, 4000, 0)) == 0


def test_the_newest_takes_the_memory_of_the_one_before(cluster: Cluster) -> None:
    used = []
    for step in range(5):
        cluster.take(Key(step, f"a{step}"))
        used.append(cluster.memories[cluster.members[0].uuid].used)
        found = cluster.node(0).recoverable(soon())
        assert [snapshot.key.step for snapshot in found] == [step]
    assert len(set(used)) == 1


def test_a_run_may_be_rewound(cluster: Cluster) -> None:
    cluster.take(Key(10, "aa"))
    cluster.take(Key(5, "bb"))
    newest = cluster.newest(0)
    assert newest is not None
    assert newest.key == Key(5, "bb")


def test_nothing_is_there_before_the_first(cluster: Cluster) -> None:
    assert cluster.newest(0) is None
    with pytest.raises(NotCommittedError):
        cluster.read(cluster.node(0), Key(1, "aa"), "x", 0, 1)
    with pytest.raises(NotCommittedError):
        cluster.node(0).wait(Key(1, "aa"), soon())
    with pytest.raises(NotCommittedError):
        cluster.node(0).hold(Key(1, "aa"))


def test_the_one_before_stays_until_the_next_is_committed(cluster: Cluster) -> None:
    cluster.take(Key(1, "aa"))
    for i in range(len(cluster.members)):
        cluster.capture(i, Key(2, "bb"))
    newest = cluster.newest(0)
    assert newest is not None
    assert newest.key == Key(1, "aa")
    cluster.check(0, newest)
    cluster.node(0).describe(Key(2, "bb"), manifest_of(Key(2, "bb")))
    cluster.node(0).wait(Key(2, "bb"), soon())
    newest = cluster.newest(0)
    assert newest is not None
    assert newest.key == Key(2, "bb")
    cluster.check(0, newest)


def test_what_is_given_up_is_forgotten_everywhere(cluster: Cluster) -> None:
    cluster.take(Key(1, "aa"))
    used = [memory.used for memory in cluster.memories.values()]
    for i in range(len(cluster.members)):
        cluster.capture(i, Key(2, "bb"))
    cluster.node(-1).abort(Key(2, "bb"), "a rank ran out of luck")
    for i in range(len(cluster.members)):
        with pytest.raises(SaveFailedError, match="out of luck"):
            cluster.node(i).wait(Key(2, "bb"), soon())
    with pytest.raises(SaveFailedError, match="out of luck"):
        cluster.node(0).describe(Key(2, "bb"), b"")
    assert [memory.used for memory in cluster.memories.values()] == used
    newest = cluster.newest(0)
    assert newest is not None
    cluster.check(0, newest)
    cluster.take(Key(2, "cc"))


def test_memory_that_a_rank_may_write_to_is_not_used_again() -> None:
    image = HEADER + 3000
    cluster = Cluster(1, budget=2 * 8192)
    node = cluster.node(0)
    cluster.take(Key(1, "aa"))
    node.begin(Key(2, "bb"), "late", image)
    node.abort(Key(2, "bb"), "it takes too long")
    with pytest.raises(DeadlineError, match="writers of step 2"):
        node.begin(Key(3, "cc"), "next", image, Deadline(0.2))
    node.leave(Key(2, "bb"), "late")
    node.leave(Key(2, "bb"), "late")
    node.begin(Key(3, "cc"), "next", image)
    cluster.close()


def test_a_rank_that_leaves_before_its_seal_fails_the_snapshot(cluster: Cluster) -> None:
    key = Key(1, "aa")
    cluster.node(0).begin(key, file_of(0, key), 9000)
    cluster.node(0).leave(key, file_of(0, key))
    with pytest.raises(SaveFailedError, match="has gone"):
        cluster.node(0).wait(key, soon())
    assert cluster.memories[cluster.members[0].uuid].used == 0


def test_memory_that_is_held_stays(cluster: Cluster) -> None:
    first, node = Key(1, "aa"), cluster.node(0)
    cluster.take(first)
    span = node.local_span(first, file_of(0, first))
    assert span is not None
    node.hold(first)
    cluster.take(Key(2, "bb"))
    view = cluster.memories[node.uuid].view(span)
    assert np.array_equal(view, cluster.images[file_of(0, first)])
    assert node.local_span(first, file_of(0, first)) == span
    node.let_go(first)
    node.let_go(first)
    assert node.local_span(first, file_of(0, first)) is None
    with pytest.raises(KeyError):
        cluster.memories[node.uuid].view(span)


def test_the_next_waits_for_a_reader() -> None:
    cluster = Cluster(1, budget=3 * 8192)
    node = cluster.node(0)
    cluster.take(Key(1, "aa"))
    node.hold(Key(1, "aa"))
    cluster.take(Key(2, "bb"))
    timer = threading.Timer(0.2, node.let_go, [Key(1, "aa")])
    timer.start()
    cluster.take(Key(3, "cc"))
    cluster.take(Key(4, "dd"))
    timer.join()
    cluster.close()


def test_no_room_is_said(cluster: Cluster) -> None:
    small = Cluster(1, budget=10000)
    with pytest.raises(MemoryBudgetError, match="no room"):
        small.node(0).begin(Key(1, "aa"), "a", 20000)
    small.close()


def test_a_file_is_begun_once(cluster: Cluster) -> None:
    node, key = cluster.node(0), Key(1, "aa")
    span = node.begin(key, "a", 5000)
    assert node.begin(key, "a", 5000) == span
    with pytest.raises(ConfigError, match="begun already"):
        node.begin(key, "a", 6000)
    node.leave(key, "a")


def test_changed_bytes_are_not_handed_out(cluster: Cluster) -> None:
    key = Key(1, "aa")
    cluster.take(key)
    last = len(cluster.members) - 1
    name = file_of(last, key)
    span = cluster.node(last).local_span(key, name)
    assert span is not None
    cluster.memories[cluster.members[last].uuid].view(span)[5000] ^= 4
    with pytest.raises(CorruptError, match="changed"):
        cluster.read(cluster.node(0), key, name, 4200, 1000)
    good = cluster.read(cluster.node(0), key, name, 0, 4096)
    assert np.array_equal(good, cluster.images[name][:4096])


def test_nodes_that_were_told_otherwise_are_refused() -> None:
    cluster = Cluster(2)
    cluster.node(1).configure(cluster.members, Scheme(0, 7), 1)
    key = Key(1, "aa")
    cluster.capture(0, key)
    cluster.capture(1, key)
    with pytest.raises(SaveFailedError, match="other members or another scheme"):
        cluster.node(1).wait(key, soon())
    cluster.node(1).abort(key, "told otherwise")
    cluster.close()


def test_a_node_that_does_not_seal_is_named() -> None:
    cluster = Cluster(2, timeout_s=0.3)
    key = Key(1, "aa")
    cluster.capture(0, key)
    with pytest.raises(SaveFailedError, match=f"sealed: node {cluster.members[1].uuid}"):
        cluster.node(0).wait(key, soon())
    cluster.close()


def test_a_change_of_members_ends_what_is_on_its_way() -> None:
    cluster = Cluster(3)
    cluster.take(Key(1, "aa"))
    cluster.capture(0, Key(2, "bb"))
    cluster.configure()  # told the same again
    cluster.capture(1, Key(2, "bb"))
    cluster.members.pop()
    cluster.configure()
    with pytest.raises(SaveFailedError, match="members of the job have changed"):
        cluster.node(0).wait(Key(2, "bb"), soon())
    cluster.take(Key(2, "cc"))
    newest = cluster.newest(0)
    assert newest is not None
    cluster.check(0, newest)
    cluster.close()


def test_what_has_its_manifest_needs_its_ranks_no_more(cluster: Cluster) -> None:
    key = Key(1, "aa")
    cluster.take(key, wait=False)
    cluster.node(0).abort(key, "its ranks have gone")
    cluster.node(0).wait(key, soon())
