"""Owners and shadows of blocks: pure functions. Votes, likewise."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planaria.elastic.hello import Hello, Roll, from_mask, to_mask
from planaria.elastic.membership import View
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


def test_all_holders_lost_is_said() -> None:
    blocks = blocks_of(6)
    plan = fills(place(blocks, [0, 1], 0), {0: [0, 1]})
    assert {i for i, _, _ in plan.recovered} == set(range(2, len(blocks)))
    with pytest.raises(ConfigError, match="redundancy"):
        place(blocks, [0, 1], -1)


def test_masks() -> None:
    assert from_mask(to_mask([0, 3, 200])) == [0, 3, 200]
    assert from_mask(to_mask([])) == []


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
