"""Who hangs and who is slow, on a clock of the test's own."""

from planaria.elastic.membership.rules import Rules
from planaria.elastic.membership.watching import Watched, slow, to_blame

RULES = Rules(4, hang_s=10.0, recovery_s=60.0)


def watched(**members: tuple[str, int, float]) -> dict[int, Watched]:
    found = {}
    for name, (phase, step, moved) in members.items():
        each = Watched(0.0)
        each.heard, each.moved, each.phase, each.step = 100.0, moved, phase, step
        found[int(name[1:])] = each
    return found


def test_who_waits_is_not_to_blame() -> None:
    those = watched(m0=("reduce", 5, 85.0), m1=("vote", 5, 85.0), m2=("compute", 5, 84.0))
    assert list(to_blame(those, (), None, RULES, 100.0)) == [2]


def test_who_is_slow_while_nobody_waits_long_is_not_to_blame() -> None:
    compiling = watched(m0=("compute", 0, 10.0), m1=("compute", 0, 10.0))
    assert not to_blame(compiling, (), None, RULES, 100.0)
    just_done = watched(m0=("reduce", 0, 95.0), m1=("compute", 0, 10.0))
    assert not to_blame(just_done, (), None, RULES, 100.0)


def test_a_step_behind_keeps_the_others_waiting() -> None:
    those = watched(m0=("reduce", 5, 80.0), m1=("reduce", 5, 80.0), m2=("reduce", 4, 80.0))
    assert list(to_blame(those, (), None, RULES, 100.0)) == [2]


def test_who_does_not_regroup_is_to_blame() -> None:
    those = watched(m0=("reduce", 5, 80.0), m1=("reduce", 5, 80.0))
    assert not to_blame(those, {0}, 95.0, RULES, 100.0)
    assert list(to_blame(those, {0}, 89.0, RULES, 100.0)) == [1]


def test_slow_ones_are_out_of_line_with_the_median() -> None:
    those = watched(m0=("idle", 0, 0), m1=("idle", 0, 0), m2=("idle", 0, 0))
    for member, seconds in {0: 1.0, 1: 1.1, 2: 1.9}.items():
        those[member].step_s = seconds
    assert slow(those, 1.5) == {2: 1.1}
    assert slow({m: those[m] for m in (0, 2)}, 1.5) == {}
