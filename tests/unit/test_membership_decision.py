"""The rules of generations: what is decided, and when, on a clock of the test's own."""

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planaria.elastic.membership import decision
from planaria.elastic.membership.decision import Decider, Past
from planaria.elastic.membership.rules import Action, Fence, Note, Publish, Rules, Start, Stop, Tell
from planaria.elastic.membership.view import Standing, View
from planaria.elastic.membership.watching import Beat
from planaria.errors import ConfigError


def founded(world: int = 4, **rules: Any) -> Decider:
    """A decider in generation 1, at time 0."""
    decider = Decider(Rules(world, **rules), 0.0)
    acts: list[Action] = []
    for member in decider.new_ids(world, 0.0):
        acts += decider.join(member, {}, 0.0)
    assert views(acts) == [View(1, tuple(range(world)), 0)]
    return decider


def views(acts: list[Action]) -> list[View]:
    return [act.view for act in acts if isinstance(act, Publish)]


def told(acts: list[Action], member: int) -> list[str]:
    return [str(a.message["type"]) for a in acts if isinstance(a, Tell) and a.member == member]


def stand(decider: Decider, member: int, committed: int, now: float) -> list[Action]:
    return decider.stand(member, Standing(decider.generation, committed), now)


def stops(acts: list[Action]) -> list[str]:
    return [act.reason for act in acts if isinstance(act, Stop)]


def test_survivors_hear_of_a_loss_at_once_and_agree_on_the_newest_step() -> None:
    decider = founded(3)
    acts = decider.dead([1], 5.0)
    assert told(acts, 0) == told(acts, 2) == ["lost"]
    assert not views(stand(decider, 0, 7, 5.1))
    (view,) = views(stand(decider, 2, 8, 5.2))
    assert view == View(2, (0, 2), 0, lost=(1,), step=8)


def test_one_that_dies_in_the_recovery_of_another_has_no_say() -> None:
    decider = founded(4)
    decider.dead([1], 1.0)
    stand(decider, 0, 5, 1.0)
    stand(decider, 2, 9, 1.0)
    decider.dead([2], 1.1)
    (view,) = views(stand(decider, 3, 5, 1.2))
    assert (view.members, view.lost, view.step) == ((0, 3), (1, 2), 5)


def test_two_of_four_lost_at_once() -> None:
    decider = founded(4)
    decider.dead([0, 1], 1.0)
    stand(decider, 2, 3, 1.0)
    (view,) = views(stand(decider, 3, 3, 1.0))
    assert view.members == (2, 3)


def test_members_out_of_reach_are_waited_for_and_gone_on_without_by_quorum() -> None:
    decider = founded(3, hang_s=10.0, recovery_s=60.0)
    decider.reach([2], False, 1.0)
    stand(decider, 0, 4, 2.0)
    assert not views(stand(decider, 1, 4, 2.0))
    assert not views(decider.tick(10.9))
    (view,) = views(decider.tick(11.1))
    assert view.members == (0, 1)
    # When it is back it is told, and does no harm.
    acts = decider.stand(2, Standing(1, 9), 12.0)
    assert told(acts, 2) == ["stopped"]
    assert decider.members == (0, 1)


def test_whoever_waits_for_members_out_of_reach_is_woken() -> None:
    decider = founded(4, hang_s=10.0)
    decider.reach([3], False, 1.0)
    assert not told(decider.tick(10.0), 0)
    acts = decider.tick(11.5)
    assert [told(acts, member) for member in range(4)] == [["lost"]] * 4
    stand(decider, 0, 5, 11.5)
    stand(decider, 1, 5, 11.5)
    (view,) = views(stand(decider, 2, 5, 11.5))
    assert view.members == (0, 1, 2)


def test_a_side_without_quorum_waits_and_stops() -> None:
    decider = founded(4, hang_s=10.0, recovery_s=60.0)
    decider.reach([0, 1], False, 1.0)
    stand(decider, 2, 4, 2.0)
    stand(decider, 3, 4, 2.0)
    assert not views(decider.tick(30.0))
    acts = decider.tick(63.0)
    assert not views(acts)
    assert stops(acts) == ["no quorum: 2 of 4 members are in reach"]


def test_an_ignored_quorum_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision, "has_quorum", lambda *_: True)
    with pytest.raises(AssertionError):
        test_a_side_without_quorum_waits_and_stops()


def test_a_joiner_is_admitted_when_all_regroup() -> None:
    decider = founded(2, maximum=3)
    (joiner,) = decider.new_ids(1, 0.0)
    acts = decider.join(joiner, {}, 1.0)
    assert told(acts, 0) == told(acts, 1) == ["wanted"]
    stand(decider, 0, 6, 2.0)
    (view,) = views(stand(decider, 1, 6, 2.0))
    assert view == View(2, (0, 1, 2), 0, joined=(2,), step=6)


def test_a_joiner_that_dies_before_it_is_admitted_is_forgotten() -> None:
    decider = founded(2, maximum=3)
    (joiner,) = decider.new_ids(1, 0.0)
    decider.join(joiner, {}, 1.0)
    decider.dead([joiner], 1.5)
    stand(decider, 0, 6, 2.0)
    (view,) = views(stand(decider, 1, 6, 2.0))
    assert view.members == (0, 1)


def test_a_joiner_with_other_facts_is_refused() -> None:
    decider = Decider(Rules(1, maximum=2), 0.0)
    decider.join(decider.new_ids(1, 0.0)[0], {"code": "a"}, 0.0)
    acts = decider.join(decider.new_ids(1, 0.0)[0], {"code": "b"}, 1.0)
    assert told(acts, 1) == ["refused"]
    assert told(decider.tick(2.0), 0) == []


def test_full_jobs_let_joiners_wait() -> None:
    decider = founded(2)
    acts = decider.join(decider.new_ids(1, 0.0)[0], {}, 1.0)
    assert told(acts, 0) == []
    decider.dead([0], 2.0)
    (view,) = views(stand(decider, 1, 6, 2.0))
    assert view.members == (1, 2)


@pytest.mark.parametrize("policy", ["replace", "replace_then_shrink"])
def test_survivors_wait_for_a_replacement(policy: str) -> None:
    decider = founded(2, policy=policy, recovery_s=60.0)
    acts = decider.dead([0], 1.0)
    assert [a for a in acts if isinstance(a, Start)] == [Start(2, 0)]
    assert not views(stand(decider, 1, 4, 1.0))
    (view,) = views(decider.join(2, {}, 9.0))
    assert view == View(2, (1, 2), 1, joined=(2,), lost=(0,), step=4)


def test_a_replacement_that_does_not_come() -> None:
    patient = founded(2, policy="replace_then_shrink", recovery_s=60.0)
    patient.dead([0], 1.0)
    stand(patient, 1, 4, 1.0)
    (view,) = views(patient.tick(32.0))
    assert view.members == (1,)
    strict = founded(2, policy="replace", recovery_s=60.0)
    strict.dead([0], 1.0)
    stand(strict, 1, 4, 1.0)
    (view,) = views(strict.tick(32.0))
    assert "were not replaced" in view.last


def test_replacements_that_die_are_not_started_for_ever() -> None:
    decider = founded(2, policy="shrink_then_replace", starts=3)
    acts = decider.dead([0], 1.0)
    started = 0
    while starts := [a.member for a in acts if isinstance(a, Start)]:
        started += len(starts)
        acts = decider.dead(starts, 2.0)
    assert started == 3


def test_losses_at_the_same_step_end_it() -> None:
    decider = founded(4, repeats=2)
    acts: list[Action] = []
    for lost in (0, 1, 2):
        decider.dead([lost], float(lost + 1))
        for member in set(decider.members) - {lost}:
            acts = stand(decider, member, 5, lost + 1.5)
    (view,) = views(acts)
    assert view.members == (3,)
    assert "2 times in a row" in view.last


def test_too_few_have_a_last_generation_to_save_in() -> None:
    decider = founded(4, minimum=3, wait_for_joiners=False)
    decider.dead([0, 1], 1.0)
    stand(decider, 2, 5, 1.0)
    (view,) = views(stand(decider, 3, 6, 1.0))
    assert view == View(2, (2, 3), 2, lost=(0, 1), step=6, last=view.last)
    assert "2 of 4 members are left, 3 are the least" in view.last
    assert not told(decider.join(7, {}, 2.0), 2)  # nobody joins it
    acts = decider.finish(2, 3.0)
    assert not stops(acts)
    # One more is lost while it saves: as if it had not been there.
    assert decider.stopped is None
    assert stops(decider.dead([3], 4.0)) == [view.last]
    assert decider.over


def test_a_loss_in_the_last_generation_makes_another_one() -> None:
    decider = founded(3, minimum=3, wait_for_joiners=False)
    decider.dead([0], 1.0)
    stand(decider, 1, 5, 1.0)
    (view,) = views(stand(decider, 2, 5, 1.0))
    decider.dead([1], 2.0)
    (again,) = views(stand(decider, 2, 5, 2.0))
    assert (again.members, again.last) == ((2,), view.last)
    # A coordinator that takes over then keeps to it.
    past = Past(again.generation, again.members, last=again.last)
    heir = Decider(decider.rules, 3.0, past)
    heir.reach([2], True, 3.0)
    (third,) = views(heir.stand(2, Standing(again.generation, 5), 3.0))
    assert third.last == view.last
    assert stops(heir.finish(2, 4.0)) == [view.last]


def test_a_run_that_is_complete_in_its_last_generation_is_done() -> None:
    decider = founded(3, minimum=3, wait_for_joiners=False)
    decider.dead([0], 1.0)
    stand(decider, 1, 5, 1.0)
    stand(decider, 2, 5, 1.0)
    assert decider.generation == 2
    assert not stops(decider.finish(1, 2.0, complete=True) + decider.finish(2, 2.0, complete=True))
    assert decider.over
    assert decider.stopped is None


def test_a_side_without_quorum_saves_nothing() -> None:
    decider = founded(4, minimum=3, recovery_s=10.0)
    decider.reach([0, 1], False, 1.0)
    stand(decider, 2, 5, 1.0)
    assert not views(stand(decider, 3, 6, 1.0))
    acts = decider.tick(20.0)
    assert stops(acts)
    assert not views(acts)


def test_replacements_that_die_now_and_then_are_not_counted_for_ever() -> None:
    decider = founded(2, policy="shrink_then_replace", starts=2)
    now, victim = 1.0, 1
    for _ in range(5):
        (first,) = [a.member for a in decider.dead([victim], now) if isinstance(a, Start)]
        assert views(stand(decider, 0, 1, now))
        (second,) = [a.member for a in decider.dead([first], now) if isinstance(a, Start)]
        decider.join(second, {}, now)
        assert views(stand(decider, 0, 1, now))[0].members == (0, second)
        now, victim = now + 1.0, second


def test_survivors_in_code_of_their_own_are_waited_for_until_one_of_them_waits() -> None:
    """A rank is lost while all evaluate, which takes longer than a recovery may."""
    decider = founded(3, hang_s=10.0, recovery_s=20.0)
    decider.dead([2], 1.0)
    for now in range(2, 100):
        for member in (0, 1):
            decider.beat(member, Beat(5, "idle", now - 1.0), float(now))
        assert not decider.tick(float(now))
    stand(decider, 0, 5, 100.0)
    decider.beat(1, Beat(5, "idle", 104.0), 105.0)
    assert not [a for a in decider.tick(105.0) if isinstance(a, Fence)]
    (view,) = views(stand(decider, 1, 5, 106.0))
    assert view.members == (0, 1)


def test_a_survivor_that_keeps_another_waiting_in_a_recovery_is_killed() -> None:
    decider = founded(3, hang_s=10.0, recovery_s=40.0)
    decider.dead([2], 1.0)
    stand(decider, 0, 5, 50.0)
    fenced: list[int] = []
    for now in range(51, 62):
        for member in (0, 1):
            decider.beat(member, Beat(5, "idle", now - 1.0), float(now))
        fenced += [a.member for a in decider.tick(float(now)) if isinstance(a, Fence)]
    assert fenced == [1]
    assert views(decider.dead([1], 62.0))[0].members == (0,)


def test_nobody_goes_on_beside_one_that_was_killed_and_may_still_write() -> None:
    decider = founded(3, hang_s=5.0, recovery_s=20.0)
    decider.dead([2], 1.0)
    stand(decider, 0, 5, 1.0)
    acts: list[Action] = []
    for now in range(2, 23):
        decider.beat(0, Beat(5, "idle", 0.0), float(now))
        acts += decider.tick(float(now))
    assert [a.member for a in acts if isinstance(a, Fence)] == [1]
    assert not views(acts)
    assert "killed, and is not proven to have stopped" in stops(acts)[0]


def test_all_lost_and_replaced_begin_again() -> None:
    decider = founded(1, policy="replace")
    decider.dead([0], 1.0)
    (view,) = views(decider.join(1, {}, 2.0))
    assert view == View(2, (1,), 1, lost=(0,), step=None)


def test_one_that_leaves_is_not_missed() -> None:
    decider = founded(3, policy="replace")
    decider.stand(1, Standing(1, 8, leaving=True), 1.0)
    assert not [a for a in decider.dead([1], 1.1) if isinstance(a, Start)]
    stand(decider, 0, 8, 1.2)
    (view,) = views(stand(decider, 2, 8, 1.2))
    assert view.members == (0, 2)


def test_after_the_run_is_done_nothing_is_a_loss() -> None:
    decider = founded(2, policy="replace")
    decider.finish(0, 1.0)
    acts = decider.dead([0], 1.1)
    decider.finish(1, 1.2)
    acts += decider.dead([1], 1.3)
    assert not [a for a in acts if isinstance(a, Start | Stop)]
    assert told(acts, 1) == []
    assert decider.over


def test_a_new_coordinator_takes_over_where_the_old_one_was() -> None:
    past = Past(7, (0, 2, 5), frozenset({0}), next_id=9, facts={"code": "a"})
    decider = Decider(Rules(3), 100.0, past)
    decider.reach([2, 5], True, 100.1)
    stand(decider, 2, 40, 100.2)
    (view,) = views(stand(decider, 5, 41, 100.3))
    assert (view.generation, view.members, view.step) == (8, (2, 5), 41)
    assert told(decider.join(decider.new_ids(1, 0.0)[0], {"code": "b"}, 101.0), 9) == ["refused"]


def test_a_hung_member_is_killed_before_anything_is_decided() -> None:
    decider = founded(3, hang_s=10.0)
    for now in (9.0, 9.5):
        for member in (0, 1):
            decider.beat(member, Beat(3, "reduce", now - 1.0), now)
    acts = [act for second in range(1, 11) for act in decider.tick(float(second))]
    assert [a.member for a in acts if isinstance(a, Fence)] == [2]
    assert not views(acts)
    stand(decider, 0, 3, 10.1)
    assert not views(stand(decider, 1, 3, 10.1))
    assert views(decider.dead([2], 10.2))


def test_what_is_started_and_never_comes_is_killed() -> None:
    decider = founded(2, policy="shrink_then_replace", start_s=20.0)
    (start,) = [a for a in decider.dead([0], 1.0) if isinstance(a, Start)]
    stand(decider, 1, 4, 1.0)
    acts: list[Action] = []
    for second in range(2, 30):
        decider.beat(1, Beat(5, "compute", 0.0), float(second))
        acts += decider.tick(float(second))
    assert [a.member for a in acts if isinstance(a, Fence)] == [start.member]
    assert [a for a in decider.dead([start.member], 30.0) if isinstance(a, Start)]


def test_one_that_hangs_after_it_has_finished_is_killed() -> None:
    decider = founded(3, hang_s=5.0)
    for member in range(3):
        decider.finish(member, 1.0)
    decider.hang_up(0)  # it may take its time
    decider.dead([1], 1.5)
    acts = [act for second in range(2, 12) for act in decider.tick(float(second))]
    assert [a.member for a in acts if isinstance(a, Fence)] == [2]


def test_a_joiner_that_falls_silent_is_killed() -> None:
    decider = founded(1, hang_s=5.0)
    (joiner,) = decider.new_ids(1, 1.0)
    decider.join(joiner, {}, 1.0)
    acts: list[Action] = []
    for second in range(2, 12):
        decider.beat(0, Beat(5, "compute", 0.0), float(second))
        acts += decider.tick(float(second))
    assert [a.member for a in acts if isinstance(a, Fence)] == [joiner]


def test_a_decision_without_the_proof_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def hasty(self: Decider) -> set[int]:
        """Takes those that are to be killed for dead."""
        return {m for m in self.members if m in self._table and not self._table[m].fencing}

    monkeypatch.setattr(Decider, "_entitled", hasty)
    with pytest.raises(AssertionError):
        test_a_hung_member_is_killed_before_anything_is_decided()


def test_a_fence_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision, "to_blame", lambda *_: {})
    with pytest.raises(AssertionError):
        test_a_hung_member_is_killed_before_anything_is_decided()


def test_a_coordinator_that_stood_still_blames_nobody() -> None:
    decider = founded(2, hang_s=10.0)
    decider.tick(1.0)
    assert not [a for a in decider.tick(60.0) if isinstance(a, Fence)]


RULES = Rules(4, hang_s=10.0, recovery_s=60.0)


def test_one_is_called_slow_once_it_has_been_for_a_while() -> None:
    decider = founded(3)
    calls = []
    for tenth in range(1, 100):
        now, step = tenth / 10, tenth // 5
        for member in range(3):
            long = member == 2 and (tenth < 8 or tenth > 40)
            decider.beat(member, Beat(step, "compute", 0.0, 2.0 if long else 0.5), now)
        calls += [(now, a) for a in decider.tick(now) if isinstance(a, Note)]
    ((when, note),) = calls
    assert note.content["member"] == 2
    assert 6.0 <= when <= 7.0


def test_rules_are_checked() -> None:
    for wrong in (
        *({"minimum": 5}, {"maximum": 3}, {"policy": "hope"}, {"hang_s": 0.0}),
        *({"recovery_s": math.inf}, {"lease_s": 0.0}, {"replace_s": -1.0}, {"rest_s": -1.0}),
        *({"starts": -1}, {"repeats": 0}, {"slow_factor": 1.0}, {"join_s": math.nan}),
    ):
        with pytest.raises(ConfigError):
            Rules(4, **wrong)  # pyright: ignore[reportArgumentType]
    assert dataclasses.asdict(RULES)["world"] == 4
    assert Rules(**dataclasses.asdict(RULES)) == RULES


events = st.lists(
    st.tuples(
        st.sampled_from(["dead", "stand", "join", "away", "near", "tick", "leave", "finish"]),
        st.integers(0, 7),
        st.integers(0, 3),
    ),
    max_size=60,
)


@given(events, st.sampled_from(["shrink", "replace", "replace_then_shrink", "shrink_then_replace"]))
def test_whatever_happens_generations_are_sound(
    story: list[tuple[str, int, int]], policy: str
) -> None:
    decider = founded(4, policy=policy, hang_s=5.0, recovery_s=20.0, maximum=6)
    now, given_ids = 0.0, set(range(4))
    dead: set[int] = set()
    stood: dict[int, int] = {}
    joining: set[int] = set()
    for what, member, number in story:
        now += 0.7
        before = decider.generation, decider.members
        match what:
            case "dead":
                dead.add(member)
                acts = decider.dead([member], now)
            case "stand":
                if member in before[1] and member not in dead:
                    stood[member] = number
                acts = stand(decider, member, number, now)
            case "leave":
                standing = Standing(decider.generation, number, leaving=True)
                acts = decider.stand(member, standing, now)
            case "join":
                joining.add(member)
                acts = decider.join(member, {}, now)
            case "away" | "near":
                acts = decider.reach([member], what == "near", now)
            case "finish":
                acts = decider.finish(member, now)
            case _:
                acts = decider.tick(now + 5 * number)
                now += 5 * number
        for act in acts:
            if isinstance(act, Start):
                assert act.member not in given_ids
            if isinstance(act, Publish):
                view = act.view
                assert view.generation == before[0] + 1
                assert list(view.members) == sorted(set(view.members))
                assert not set(view.members) & dead
                survivors = set(view.members) & set(before[1])
                assert survivors <= set(stood)
                assert set(view.members) - survivors <= joining
                if survivors:
                    assert set(view.joined) == set(view.members) - survivors
                else:
                    assert view.step is None
                stood, joining = {}, joining - set(view.members)
        given_ids.update(range(decider.next_id))
