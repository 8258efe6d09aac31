"""After a change of members the newest snapshot is made whole again, without any rank."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from memory_losses import Loss
from memory_nodes import Cluster, file_of, manifest_of

from planaria.checkpoint.memory import points
from planaria.checkpoint.memory.courtesy import Pace
from planaria.checkpoint.memory.memory import Key, Member, Scheme
from planaria.checkpoint.memory.mending import share
from planaria.checkpoint.memory.meta import ImageFile, Meta, NodeFiles, Snapshot
from planaria.checkpoint.memory.restoring import find_steps
from planaria.core.deadline import Deadline
from planaria.core.points import armed
from planaria.errors import SaveFailedError

KEY = Key(3, "aa")
SIZES = [5000, 9000, 700, 3100]


@pytest.fixture
def clusters() -> Iterator[list[Cluster]]:
    made: list[Cluster] = []
    yield made
    for cluster in made:
        cluster.close()


def make(clusters: list[Cluster], m: int = 1, after_s: float | None = 0.01) -> Cluster:
    cluster = Cluster(4, Scheme(m), sizes=SIZES)
    clusters.append(cluster)
    cluster._options["mend_after_s"] = after_s
    for uuid in list(cluster.net.nodes):
        cluster.net.nodes[uuid].mending._after_s = after_s
    cluster.take(KEY)
    return cluster


def shrink(cluster: Cluster, *lost: int) -> None:
    """Nodes are gone, nobody takes their place."""
    cluster.net.dead |= {cluster.members[i].uuid for i in lost}
    cluster.members = [member for i, member in enumerate(cluster.members) if i not in lost]
    cluster.configure()


def check(cluster: Cluster, snapshot: Snapshot) -> None:
    """Reads all of a snapshot of what `KEY` was."""
    assert snapshot.manifest == manifest_of(KEY)
    for name, nbytes in snapshot.files.items():
        got = cluster.read(cluster.node(cluster.alive()[0]), snapshot.key, name, 0, nbytes)
        assert got.tobytes() == cluster.images[name].tobytes()


def mended(cluster: Cluster) -> Snapshot | None:
    """The snapshot once no node of it is lost; None if it is not made whole."""
    within = Deadline(30)
    while not within.expired:
        newest = cluster.newest(cluster.alive()[0])
        assert newest is not None
        held = [cluster.node(i)._holdings for i in cluster.alive()]
        if not newest.lost and not any(each.unfinished() for each in held):
            return newest
        if cluster.node(0).mending._after_s is None:
            return None
    return None


@pytest.mark.parametrize("how", ["replaced", "fewer", "leader replaced"])
def test_a_further_node_may_be_lost(how: str, clusters: list[Cluster]) -> None:
    cluster = make(clusters)
    if how == "fewer":
        shrink(cluster, 2)
    else:
        cluster.replace(0 if how == "leader replaced" else 2)
    newest = mended(cluster)
    assert newest is not None
    assert newest.key.step == KEY.step
    check(cluster, newest)
    for i in cluster.alive():
        dead = set(cluster.net.dead)
        cluster.net.dead |= {cluster.members[i].uuid}
        for reader in cluster.alive():
            found = cluster.newest(reader)
            assert found is not None
            assert found.key == newest.key
        check(cluster, newest)
        cluster.net.dead = dead


def test_without_it_a_further_loss_is_one_too_many(clusters: list[Cluster]) -> None:
    """The test before would fail."""
    cluster = make(clusters, after_s=None)
    cluster.replace(2)
    assert mended(cluster) is None
    cluster.net.dead |= {cluster.members[1].uuid}
    assert cluster.newest(0) is None


def test_two_lost_at_once_are_made_up_for(clusters: list[Cluster]) -> None:
    cluster = make(clusters, m=2)
    shrink(cluster, 1, 3)
    newest = mended(cluster)
    assert newest is not None
    cluster.net.dead |= {cluster.members[0].uuid}
    check(cluster, newest)


def test_who_reads_the_old_one_is_led_to_the_new_one(clusters: list[Cluster]) -> None:
    cluster = make(clusters)
    old = cluster.newest(0)
    assert old is not None
    cluster.node(0).hold(KEY)
    span = cluster.node(0).local_span(KEY, file_of(0, KEY))
    assert span is not None
    cluster.replace(2)
    newest = mended(cluster)
    assert newest is not None
    assert newest.key != old.key
    for i in cluster.alive():
        cluster.check(i, old)
        cluster.node(i).hold(KEY)
        assert cluster.node(i).local_span(KEY, file_of(i, KEY)) is not None
        cluster.node(i).let_go(KEY)
    # What was held before is as it was.
    memory = cluster.memories[cluster.node(0).uuid]
    assert memory.view(span).tobytes() == cluster.images[file_of(0, KEY)].tobytes()
    cluster.node(0).let_go(KEY)


def test_a_snapshot_of_the_ranks_comes_first(
    clusters: list[Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = make(clusters)
    begun, go_on = threading.Event(), threading.Event()
    cluster.replace(2, tell=False)
    node = cluster.node(1)
    read = node._reading.read

    def slow(*args: Any) -> None:
        begun.set()
        assert go_on.wait(60)
        read(*args)

    monkeypatch.setattr(node._reading, "read", slow)
    cluster.configure()
    assert begun.wait(60)
    late = Key(4, "bb")
    cluster.take(late)
    go_on.set()
    for i in range(4):
        newest = cluster.newest(i)
        assert newest is not None
        assert (newest.key, newest.lost) == (late, [])
        cluster.check(i, newest)
        assert [h.key for h in cluster.node(i)._holdings.all()] == [late]


def lose(cluster: Cluster, lost: int, where: str) -> None:
    """Replaces node 3, and loses another one once the snapshot is being made whole again."""
    loss = Loss(cluster, (lost,))
    with armed(callbacks={where: loss}):
        cluster.replace(3)
        within = Deadline(30)
        while not loss.happened and not within.expired:
            threading.Event().wait(0.005)
    assert loss.happened


@pytest.mark.parametrize("where", points.SNAPSHOT[1:])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_node_lost_meanwhile_costs_nothing(
    where: str, lost: int, clusters: list[Cluster]
) -> None:
    """Two of m = 2 are gone then: the old snapshot, or the new one, can still be read."""
    cluster = make(clusters, m=2)
    lose(cluster, lost, where)
    for i in cluster.alive():
        newest = cluster.newest(i)
        assert newest is not None
        check(cluster, newest)


def test_a_change_without_a_loss_changes_nothing(clusters: list[Cluster]) -> None:
    cluster = make(clusters)
    cluster.sizes.append(100)
    cluster.domains.append("")
    cluster.members.append(cluster.start(4))
    cluster.configure()
    threading.Event().wait(0.1)
    newest = cluster.newest(4)
    assert newest is not None
    assert newest.key == KEY


def test_what_is_shared_out_goes_to_new_nodes_or_to_who_has_least() -> None:
    def node(uuid: str, *sizes: int) -> NodeFiles:
        files = tuple(
            ImageFile(f"{uuid}{i}", size, 1, 1 << 30, (0, 0)) for i, size in enumerate(sizes)
        )
        return NodeFiles(Member(uuid), files)

    nodes = (node("a", 9000), node("b", 5000, 20000, 6000), node("c", 100))
    meta = Meta(KEY, 1, Scheme(1), nodes, 1024)
    assert share(meta, ["a", "new", "c"])["new"] == ["b1", "b2", "b0"]
    split = share(meta, ["a", "c"])
    assert sorted(split["a"] + split["c"]) == ["a0", "b0", "b1", "b2", "c0"]
    assert split["c"][:2] == ["c0", "b1"]


@pytest.mark.parametrize("where", [points.PREPARE, points.DECIDED, points.COMMIT])
def test_a_leader_lost_in_the_middle_leaves_nothing_in_doubt(
    where: str, clusters: list[Cluster]
) -> None:
    """The others are prepared, and nobody but the next leader asks them how it ended."""
    cluster = make(clusters, m=2)
    lose(cluster, 0, where)
    shrink(cluster, 0)
    newest = mended(cluster)
    assert newest is not None
    cluster.net.dead |= {cluster.members[1].uuid}
    check(cluster, newest)


def test_a_node_that_was_told_of_other_members_takes_no_part(clusters: list[Cluster]) -> None:
    """It has another leader already, who would wait for all the others in vain."""
    cluster = make(clusters, after_s=None)
    cluster.replace(2)
    before, leader = [member.uuid for member in cluster.members], cluster.node(0)
    cluster.replace(0, tell=False)
    cluster.net.dead.discard(before[0])
    for i in (0, 1):
        cluster.node(i).configure(cluster.members, cluster.scheme, 1)
    with pytest.raises(SaveFailedError, match="n1x1 was told of other members"):
        leader.mending._mend(before)
    assert [held.key for held in cluster.node(1)._holdings.all()] == [KEY]


def test_a_snapshot_of_the_ranks_does_not_wait_for_a_silent_leader(
    clusters: list[Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = make(clusters, after_s=None)
    node, over = cluster.node(1), threading.Event()
    monkeypatch.setattr(node._follower, "give_up", lambda *_: over.wait(60))
    begin_mending(cluster, 1)
    late = Key(4, "bb")
    node.begin(late, file_of(1, late), 5000, Deadline(60))
    assert [held.key for held in node._holdings.unfinished()] == [late]
    over.set()


def begin_mending(cluster: Cluster, i: int) -> None:
    """One node is asked for its part, of no files."""
    node = cluster.node(i)
    meta = node._recovery.meta(KEY, Deadline(60))
    uuids = [member.uuid for member in cluster.members]
    node.mending.take_again(KEY.copy(), meta, manifest_of(KEY), [], uuids)


def test_it_does_not_begin_beside_a_snapshot_of_the_ranks(
    clusters: list[Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Committed last, it would take the place of the newer one."""
    cluster = make(clusters, after_s=None)
    node, began = cluster.node(1), threading.Event()
    allocate = node._holdings.allocate

    def slow(*args: Any) -> Any:
        span = allocate(*args)
        if not began.is_set():
            began.set()
            begin_mending(cluster, 1)
        return span

    monkeypatch.setattr(node._holdings, "allocate", slow)
    late = Key(4, "bb")
    node.begin(late, file_of(1, late), 5000, Deadline(60))
    assert began.is_set()
    assert [held.key for held in node._holdings.unfinished()] == [late]


def test_it_gives_way_to_collectives(clusters: list[Cluster]) -> None:
    cluster = make(clusters)
    gave_way: list[str] = []

    class Pacing(Pace):
        def give_way(self, deadline: Deadline) -> None:
            gave_way.append(threading.current_thread().name)

    cluster.node(1)._links.pace = Pacing()
    cluster.replace(2)
    assert mended(cluster) is not None
    assert any(name.endswith("take-again") for name in gave_way)


@pytest.mark.parametrize("rank_0_is_late", [False, True])
def test_a_rank_that_finds_the_copy_knows_that_it_is_the_same(rank_0_is_late: bool) -> None:
    files = {"rank-00000-aa.safetensors": 5000}
    old = Snapshot(KEY, b"manifest", files, ["gone"], 1)
    new = Snapshot(KEY.copy(), b"manifest", files, [], 2)
    theirs, mine = (new, old) if rank_0_is_late else (old, new)

    class Alone:
        """Rank 1, as far as `find_steps` asks."""

        rank, timeout_s = 1, 60.0

        def all_gather(self, value: Any) -> list[Any]:
            return [value, value]

        def broadcast(self, value: Any) -> Any:
            return [[theirs.key.to_json()], [], None]

        def report(self) -> dict[str, Any]:
            return {}

        def meet(self, *_: object) -> None:
            pass

        def recoverable(self, _: Deadline) -> list[Snapshot]:
            return [mine]

        @property
        def client(self) -> Any:
            return self

    sink: Any = Alone()
    found = find_steps(sink, sink)
    assert found.steps == [3]
    assert found.root is not None
    assert found.root.storage.size("step-00000003/rank-00000-aa.safetensors") == 5000
