"""Which side may go on: never two, whatever each knows of the dead."""

from collections.abc import Callable, Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planaria.elastic.membership.quorum import differences, has_quorum

Quorum = Callable[[Collection[int], Collection[int], Collection[int]], bool]


@st.composite
def splits(draw: st.DrawFn) -> tuple[list[int], list[tuple[set[int], set[int]]]]:
    """Members, and disjoint sides: who is there, and whom of the dead each knows to be dead."""
    members = draw(st.lists(st.integers(0, 50), min_size=1, max_size=9, unique=True))
    sides = draw(st.integers(1, 3))
    place = [draw(st.integers(0, sides)) for _ in members]  # the last number: dead
    dead = [m for m, p in zip(members, place, strict=True) if p == sides]
    known = st.sets(st.sampled_from(dead)) if dead else st.just(set[int]())
    return members, [
        ({m for m, p in zip(members, place, strict=True) if p == side}, draw(known))
        for side in range(sides)
    ]


def check_one_side(quorum: Quorum, case: tuple[list[int], list[tuple[set[int], set[int]]]]) -> None:
    members, sides = case
    going_on = [here for here, dead in sides if here and quorum(here, members, dead)]
    assert len(going_on) <= 1


@given(splits())
def test_at_most_one_side_goes_on(case: tuple[list[int], list[tuple[set[int], set[int]]]]) -> None:
    check_one_side(has_quorum, case)


@given(splits())
def test_those_left_go_on_when_all_others_are_proven_dead(
    case: tuple[list[int], list[tuple[set[int], set[int]]]],
) -> None:
    members, sides = case
    alive = set().union(*(here for here, _ in sides))
    assert has_quorum(alive, members, set(members) - alive)


@pytest.mark.parametrize(
    "broken",
    [
        lambda here, members, dead: True,
        lambda here, members, dead: 2 * len(here) >= len(set(members) - set(dead)),
        lambda here, members, dead: 2 * len(here) > len(here | set(dead)),
    ],
    ids=["ignored", "no tie-break", "only who is in reach counts"],
)
def test_a_broken_quorum_is_noticed(broken: Quorum) -> None:
    with pytest.raises(AssertionError):
        given(splits())(lambda case: check_one_side(broken, case))()


def test_two_of_four_go_on_if_the_others_are_dead_or_by_the_lowest() -> None:
    assert has_quorum({2, 3}, range(4), {0, 1})
    assert not has_quorum({2, 3}, range(4))
    assert has_quorum({0, 3}, range(4))
    assert not has_quorum({1, 2}, range(4))
    assert has_quorum({1, 2}, range(4), {0})


def test_differences_name_both_sides() -> None:
    found = differences({"a": 1, "b": [1], "c": None}, {"a": 1, "b": [2], "d": 0})
    assert found == [
        "b is [2] here and [1] in the job",
        "c is missing here and None in the job",
        "d is 0 here and missing in the job",
    ]
    assert differences({"a": None}, {}) == ["a is missing here and None in the job"]
