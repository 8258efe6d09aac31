"""Owners and shadows of blocks: pure functions. Votes, likewise."""

from collections import Counter
from heapq import heappop
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planaria.elastic.hello import Hello, Roll, from_mask, to_mask
from planaria.elastic.membership import View
from planaria.elastic.partition import shadows
from planaria.elastic.partition.blocks import Block, cut
from planaria.elastic.partition.holders import fills, place, replace
from planaria.elastic.vote import Ballot, decide
from planaria.errors import ConfigError, StateError

RANKS = st.sets(st.integers(0, 12), min_size=1, max_size=8)


def blocks_of(count: int) -> list[Block]:
    return cut({f"layers.{i // 3}.w{i}": (i % 5 + 1, 8) for i in range(count)}, numel=16)


@settings(max_examples=60, deadline=None)
@given(RANKS, st.integers(0, 3), st.integers(1, 40), st.data())
def test_what_is_left_of_the_holders_goes_on(
    ranks: set[int], redundancy: int, count: int, data: st.DataObject
) -> None:
    blocks = blocks_of(count)
    first = place(blocks, ranks, redundancy)
    copies = min(redundancy, len(ranks) - 1)
    for i in range(len(blocks)):
        holders = first.holders(i)
        assert len(set(holders)) == len(holders) == 1 + copies
        assert set(holders) <= ranks
    lost = data.draw(st.sets(st.sampled_from(sorted(ranks)), max_size=copies))
    new = data.draw(st.sets(st.integers(20, 23), max_size=2))
    there = sorted(ranks - lost | new)
    owned = {r: first.partition.of(r) for r in ranks - lost}
    held = {r: first.of(r) for r in ranks - lost}
    spare = data.draw(st.sampled_from([[], sorted(new)]))
    second = replace(blocks, there, redundancy, owned, held, spare=spare)
    plan = fills(second, held)
    assert plan.recovered == (), "no more were lost than there are shadows"
    for move in plan.moves:
        assert move.index in held[move.source]
        assert move.target not in spare
        held.setdefault(move.target, []).append(move.index)
    for i in range(len(blocks)):
        holders = second.holders(i)
        assert len(set(holders)) == 1 + min(redundancy, len(there) - len(spare) - 1)
        assert all(i in held[r] for r in holders)
    loads = second.partition.loads()
    biggest = max(block.nbytes for block in blocks)
    fair = sum(loads.values()) / (len(there) - len(spare))
    assert max(loads.values()) <= fair + biggest


def test_the_blocks_of_a_rank_have_many_shadows() -> None:
    """So when it is lost what it had is spread already, and nothing has to be moved."""
    first = place(blocks_of(60), range(4), 1)
    for owner in range(4):
        shadows = Counter(first.shadows[i][0] for i in first.partition.of(owner))
        assert set(shadows) == set(range(4)) - {owner}
        assert max(shadows.values()) <= 2 * min(shadows.values())


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.data())
def test_a_node_is_lost_whole(
    count: int, size: int, redundancy: int, numel: int, data: st.DataObject
) -> None:
    """Ranks of a node are lost together; another node comes in its place, and is lost."""
    blocks, redundancy = blocks_of(numel), min(redundancy, count - 1)
    nodes = {rank: f"node {rank // size}" for rank in range(count * size)}
    now = place(blocks, nodes, redundancy, nodes)
    for came in range(2):
        for i in range(len(blocks)):
            assert len({nodes[rank] for rank in now.holders(i)}) == 1 + redundancy
        gone = data.draw(
            st.sets(st.sampled_from(sorted(set(nodes.values()))), max_size=redundancy, min_size=1)
        )
        left = {rank: node for rank, node in nodes.items() if node not in gone}
        new = {
            100 * (1 + came) + 10 * n + rank: f"node {came} {n}"
            for n in range(len(gone))
            for rank in range(size)
        }
        nodes = left | new
        owned, held = ({r: f(r) for r in left} for f in (now.partition.of, now.of))
        now = replace(blocks, nodes, redundancy, owned, held, nodes=nodes)
        assert fills(now, held).recovered == ()


def test_where_nodes_are_not_known_a_lost_one_loses_blocks() -> None:
    blocks = blocks_of(40)
    first = place(blocks, range(4), 1)
    left = {rank: first.of(rank) for rank in (2, 3)}
    assert fills(replace(blocks, left, 1, {}, left), left).recovered


def test_a_small_node_does_not_hold_all_copies() -> None:
    blocks = blocks_of(60)
    nodes = dict.fromkeys(range(8), "large") | {8: "small"}
    first = place(blocks, nodes, 1, nodes)
    held = [sum(b.nbytes for b, s in zip(blocks, first.shadows, strict=True) if rank in s)
            for rank in nodes]  # fmt: skip
    most = max(block.nbytes for block in blocks)
    assert 2 * sum(held) / 9 - most <= held[8] <= 2 * sum(held) / 9 + 2 * most
    assert max(held[:8]) <= sum(held) / 9 + most


@pytest.mark.parametrize(("large", "small"), [(2, 1), (4, 2), (8, 4)])
@pytest.mark.parametrize("count", [20, 200])
def test_a_node_of_twice_as_many_ranks_may_be_lost(large: int, small: int, count: int) -> None:
    blocks = blocks_of(count)
    nodes = {rank: "large" if rank < large else "small" for rank in range(large + small)}
    now = place(blocks, nodes, 1, nodes)
    assert all(len({nodes[r] for r in now.holders(i)}) == 2 for i in range(len(blocks)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 3),
       st.randoms(use_true_random=False))  # fmt: skip
def test_ranks_plan_alike_in_whatever_order_they_were_told(
    count: int, sizes: list[int], redundancy: int, random: Random
) -> None:
    blocks = blocks_of(count)
    nodes = dict(enumerate(f"node {n}" for n, size in enumerate(sizes) for _ in range(size)))
    first = place(blocks, nodes, redundancy, nodes)
    left = sorted(random.sample(sorted(nodes), (len(nodes) + 1) // 2))
    owned, held = first.partition.owned(), first.held()
    new = {100: "new", 101: "node 0"}
    there = {rank: nodes[rank] for rank in left} | new

    def plan(order: list[int]) -> object:
        claims = [{r: set(each[r]) if r % 2 else each[r][::-1] for r in order if r in left}
                  for each in (owned, held)]  # fmt: skip
        labels = {rank: there[rank] for rank in order}
        now = replace(blocks, order, redundancy, *claims, spare=new, nodes=labels)
        return now, fills(now, claims[1])

    order = [*left, *new]
    shuffled = random.sample(order, len(order))
    assert plan(order) == plan(shuffled)


@pytest.mark.parametrize("redundancy", [1, 2, 3])
@pytest.mark.parametrize("sizes", [[6], [3, 3], [4, 2, 1], [1, 1, 1, 1, 1]])
def test_where_nothing_has_changed_nothing_is_sent(sizes: list[int], redundancy: int) -> None:
    shapes = {f"layers.{i // 5}.w{i}": (1 << i % 9,) for i in range(60)}
    blocks = cut(shapes, numel=1024)
    nodes = dict(enumerate(f"node {n}" for n, size in enumerate(sizes) for _ in range(size)))
    now = place(blocks, nodes, redundancy, nodes)
    sent: list[int] = []
    before = now
    for _ in range(4):  # owners are balanced more finely at first
        before, held = now, now.held()
        now = replace(blocks, nodes, redundancy, now.partition.owned(), held, nodes=nodes)
        sent.append(fills(now, held).nbytes)
    assert sum(sent) < 0.05 * sum(block.nbytes for block in blocks)
    assert (sent[3], now) == (0, before)


@pytest.mark.parametrize("sizes", [[2] * 100, [190, 10], [120, 60, 10, 10]])
@pytest.mark.parametrize("redundancy", [1, 2])
def test_a_block_costs_the_same_however_many_ranks_there_are(
    sizes: list[int], redundancy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one node has most of the ranks, which are no use for its blocks."""
    pops: list[int] = []

    def pop(heap: list[Any]) -> Any:
        pops.append(1)
        return heappop(heap)

    monkeypatch.setattr(shadows.heapq, "heappop", pop)
    blocks = blocks_of(400)
    nodes = dict(enumerate(f"node {n}" for n, size in enumerate(sizes) for _ in range(size)))
    place(blocks, nodes, redundancy, nodes)
    assert len(pops) / len(blocks) / redundancy < 8 * shadows.NEAREST


def test_all_holders_lost_is_said() -> None:
    blocks = blocks_of(6)
    plan = fills(place(blocks, [0, 1], 0), {0: [0, 1]})
    assert {i for i, _, _ in plan.recovered} == set(range(2, len(blocks)))
    with pytest.raises(ConfigError, match="redundancy"):
        place(blocks, [0, 1], -1)


@given(st.sets(st.integers(0, 400)))
def test_masks(indices: set[int]) -> None:
    assert from_mask(to_mask(indices)) == sorted(indices)


def test_a_roll_goes_on_from_the_newest_step_that_anybody_saw() -> None:
    hellos = (Hello(1, "full", 4, 4), Hello(3, "full", 5, 5), Hello(7, "new", 0, -1))
    roll = Roll(hellos)
    assert (roll.committed, roll.witness, roll.stale, roll.spare) == (5, 1, [1], [7])
    roll.check(5)
    with pytest.raises(StateError, match="their coordinator 6"):
        roll.check(6)
    with pytest.raises(StateError, match=r"members \[1\] are more than one step behind"):
        Roll((Hello(1, "full", 3, 3), Hello(3, "full", 5, 5))).check(None)


def test_a_decision_does_not_depend_on_who_computed_what() -> None:
    rows = [(i, 1.0 + i, {"loss": 0.1 * i}) for i in range(4)]
    norms = [1e-3, 1e8, 3.0]
    view = View(1, (0, 1), 0)
    one = decide(2, View(1, (0,), 0), [Ballot(rows, [0, 2], norms)], [0, 0, 0])
    ballots = [Ballot(rows[2:], [2], [norms[1]]), Ballot(rows[:2], [0], [norms[0], norms[2]])]
    two = decide(2, view, ballots, [1, 0, 1])
    assert (one.weight, one.norm, one.touched, one.metrics) == (
        two.weight, two.norm, two.touched, two.metrics
    )  # fmt: skip
    assert type(two).from_json(two.to_json()) == two
