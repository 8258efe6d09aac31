"""A rank joins, and one is killed while blocks are on their way to it: the bits stay the same."""

from functools import cache

import pytest
from sessions import Kind, Outcome, alone, check, run

from planaria.errors import CertificateError

#: From the boundary at which one is let in to that at which it takes part; it looks on in step 3.
#: Each with where it is reached then, by those that were there before and by the one that joins.
POINTS = {
    "elastic.session.welcome": ("hit=1", "hit=1"),
    "elastic.partition.send": ("hit=1", "hit=1"),
    "elastic.partition.under_way": ("hit=1", "hit=1"),
    "elastic.session.computed": ("step=3", "hit=1"),
    "elastic.reduction.shadow": ("hit=4", "hit=1"),
    "elastic.partition.arrived": ("hit=1", "hit=1"),
    "elastic.session.prepared": ("step=3", "hit=1"),
    "elastic.session.voting": ("hit=4", "hit=1"),
    "elastic.session.committed": ("step=3", "hit=1"),
    "elastic.optimizer.update": ("hit=4", "hit=1"),
    "elastic.optimizer.spread": ("hit=4", "hit=1"),
    "elastic.session.done": ("step=3", "hit=1"),
    "elastic.session.promote": ("hit=1", "hit=1"),
}
KIND, LATE, NEW = Kind(steps=7), 2, 3
LITTLE = "little by little"


@cache
def reference() -> Outcome:
    return alone(KIND)


def play(point: str, who: int, trick: str = "") -> None:
    faults = {who: f"kill@{point}:{POINTS[point][who == NEW]}"}
    results = run(3, KIND, faults, late=LATE, joiners=1, trick=trick)
    check(results, reference(), dead=[who], joined=[NEW])


@pytest.mark.parametrize(
    ("point", "who", "trick"),
    [
        ("elastic.partition.under_way", 1, ""),
        ("elastic.session.committed", NEW, LITTLE),
        ("elastic.session.promote", 0, ""),
    ],
)
def test_one_is_killed_while_another_joins(point: str, who: int, trick: str) -> None:
    play(point, who, trick)


@pytest.mark.soak
@pytest.mark.parametrize("trick", ["", LITTLE])
@pytest.mark.parametrize("who", [0, 1, 2, NEW])
@pytest.mark.parametrize("point", POINTS)
def test_any_is_killed_while_another_joins(point: str, who: int, trick: str) -> None:
    play(point, who, trick)


@pytest.mark.soak
@pytest.mark.parametrize("redundancy", [1, 2])
def test_a_node_is_lost_another_joins_and_a_third_is_lost(redundancy: int) -> None:
    """Shadows have gone to the new node by then: what it holds is what is left of the third."""
    kind = Kind(node_size=2, steps=8, nap_s=0.02, options={"redundancy": redundancy})
    lost = {0: 1, 1: 1, 4: 6, 5: 6}
    faults = {me: f"kill@elastic.session.backward:step={step}" for me, step in lost.items()}
    results = run(6, kind, faults, late=3, joiners=2)
    check(results, alone(kind), dead=list(lost), joined=[6, 7])


@pytest.mark.soak
@pytest.mark.parametrize("point", ["welcome", "promote"])
def test_a_node_is_lost_while_another_joins(point: str) -> None:
    kind = Kind(node_size=2, steps=7)
    faults: dict[int, str] = dict.fromkeys((2, 3), f"kill@elastic.session.{point}")
    results = run(6, kind, faults, late=2, joiners=2)
    check(results, alone(kind), dead=list(faults), joined=[6, 7])


def test_one_that_joins_is_sent_its_blocks_little_by_little() -> None:
    results = run(3, KIND, late=LATE, joiners=1, trick=LITTLE)
    check(results, reference(), joined=[NEW])


@pytest.mark.parametrize(
    "trick",
    [
        "ahead, not updated",
        pytest.param("ahead, not waited for", marks=pytest.mark.soak),
    ],
)
def test_sabotage_is_noticed(trick: str) -> None:
    results = run(3, KIND, late=LATE, joiners=1, trick=trick)
    with pytest.raises(CertificateError, match="copies differ"):
        check(results, reference(), joined=[NEW])
