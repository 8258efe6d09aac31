"""Ranks of a session are killed, anywhere in a step: the others go on with the same bits."""

from functools import cache

import pytest
from sessions import STEPS, Kind, Outcome, alone, check, run

from planaria.errors import CertificateError, StateError

#: Each with where it is reached in step 2.
POINTS = {
    "elastic.session.forward": "step=2",
    "elastic.session.backward": "step=2,hit=2",
    "elastic.session.computed": "step=2",
    "elastic.reduction.scatter": "hit=3",
    "elastic.reduction.combine": "hit=3",
    "elastic.reduction.shadow": "hit=3",
    "elastic.session.prepared": "step=2",
    "elastic.session.voting": "hit=3",
    "elastic.session.committed": "step=2",
    "elastic.optimizer.update": "hit=3",
    "elastic.optimizer.spread": "hit=3",
    "elastic.optimizer.write": "hit=3",
    "elastic.session.done": "step=2",
}
KIND = Kind()
TWICE = Kind(options={"redundancy": 2})


@cache
def reference() -> Outcome:
    return alone(KIND)


@pytest.mark.parametrize(("point", "rank"), [(p, i % 3) for i, p in enumerate(POINTS)])
def test_killed_in_a_step(point: str, rank: int) -> None:
    results = run(3, KIND, {rank: f"kill@{point}:{POINTS[point]}"})
    check(results, reference(), dead=[rank])


@pytest.mark.soak
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("world", [2, 3, 4, 5, 7, 8])
def test_killed_in_a_step_at_any_rank(point: str, world: int) -> None:
    for rank in range(world):
        for hit in (1, 2, 4):
            results = run(world, KIND, {rank: f"kill@{point}:hit={hit}"})
            dead = [me for me, result in results.items() if result.exitcode]
            check(results, reference(), dead=dead)


@pytest.mark.parametrize(
    "faults",
    [
        # At once.
        {0: "kill@elastic.session.backward:step=2", 1: "kill@elastic.session.backward:step=2"},
        {1: "kill@elastic.session.committed:hit=3", 3: "kill@elastic.optimizer.spread:hit=3"},
        # One in the recovery of another.
        {0: "kill@elastic.session.committed:hit=2", 4: "kill@elastic.session.regrouped:hit=2"},
        {0: "kill@elastic.session.backward:step=2", 1: "kill@elastic.session.caught_up:hit=1"},
        {2: "kill@elastic.session.committed:hit=2", 3: "kill@elastic.partition.send:hit=1"},
    ],
)
def test_two_are_killed(faults: dict[int, str]) -> None:
    check(run(5, TWICE, faults), reference(), dead=list(faults))


def test_one_after_the_other_is_killed() -> None:
    """Shadows are there again after each recovery: one loss at a time is survived for ever."""
    faults = {me: f"kill@elastic.session.backward:step={me}" for me in (1, 2, 3)}
    check(run(4, KIND, faults), reference(), dead=list(faults))


@pytest.mark.parametrize("node", [(0, 1), (2, 3)])
def test_a_node_is_lost_with_all_its_ranks(node: tuple[int, ...]) -> None:
    """One shadow is enough, for it is on the other node."""
    faults = dict.fromkeys(node, "kill@elastic.session.backward:step=2")
    check(run(4, Kind(node_size=2), faults), reference(), dead=node)


def test_sabotage_nobody_knows_of_nodes() -> None:
    """The second is killed before it could hand on anything of the first, however late it is."""
    faults = {0: "kill@elastic.session.backward:step=2", 1: "kill@elastic.session.regrouped:hit=2"}
    check(run(4, Kind(node_size=2), faults), reference(), dead=(0, 1))
    with pytest.raises(StateError, match="were lost with all their holders"):
        check(run(4, KIND, faults), reference(), dead=(0, 1))


def test_more_are_lost_than_there_are_shadows() -> None:
    """Without a checkpoint to go back to that ends the run, with an error that says why."""
    kind = Kind(options={"redundancy": 0})
    results = run(3, kind, {1: "kill@elastic.session.backward:step=2"})
    with pytest.raises(StateError, match="were lost with all their holders"):
        check(results, reference(), dead=[1])


def test_one_that_did_not_hear_the_vote_applies_the_step_all_the_same() -> None:
    results = run(3, KIND, trick="deaf")
    check(results, reference())
    assert len(results[2].value.attempts) == STEPS, "nothing was repeated"


@pytest.mark.parametrize(
    ("trick", "faults"),
    [
        ("deaf, vote ignored", {}),
        ("rng by rank", {}),
        ("tree reordered", {}),
        ("state not put back", {1: "kill@elastic.session.backward:step=2"}),
        ("shadows not updated", {1: "kill@elastic.session.backward:hit=6"}),
    ],
)
def test_sabotage_is_noticed(trick: str, faults: dict[int, str]) -> None:
    results = run(3, KIND, faults, trick=trick)
    # Copies that differ are noticed by the run itself.
    with pytest.raises((AssertionError, CertificateError)):
        check(results, reference(), dead=list(faults))
