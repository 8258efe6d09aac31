import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planaria.core.deadline import Deadline
from planaria.errors import ConfigError, DeadlineError

SECONDS = st.floats(0, 1e6)


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_counts_down_and_stops_at_zero():
    clock = FakeClock()
    deadline = Deadline(10, clock=clock)
    assert (deadline.remaining(), deadline.expired) == (10, False)
    clock.now += 4
    assert deadline.remaining() == 6
    clock.now += 100
    assert (deadline.remaining(), deadline.expired) == (0, True)


def test_check_names_what_was_waited_for_and_the_budget():
    clock = FakeClock()
    deadline = Deadline(2.5, clock=clock)
    deadline.check("rank 3")
    clock.now += 3
    with pytest.raises(DeadlineError, match=r"gave up waiting for rank 3: the budget of 2\.5 s"):
        deadline.check("rank 3")
    with pytest.raises(TimeoutError):  # so that code that knows nothing of us can catch it
        deadline.check("rank 3")


@given(whole=SECONDS, passed=SECONDS, part=SECONDS)
def test_a_part_never_ends_after_the_whole(whole: float, passed: float, part: float):
    clock = FakeClock()
    deadline = Deadline(whole, clock=clock)
    clock.now += passed
    sub = deadline.sub(part)
    assert sub.remaining() <= deadline.remaining()
    assert sub.remaining() <= part + 1e-6
    assert sub.remaining() == pytest.approx(min(part, deadline.remaining()), abs=1e-6)
    assert sub.sub(1e9).remaining() <= deadline.remaining()


def test_the_error_of_a_part_names_the_budget_that_ran_out():
    deadline = Deadline(0)
    with pytest.raises(DeadlineError, match="budget of 0 s"):
        deadline.sub(60).check("it")


@pytest.mark.parametrize("seconds", [-1, math.inf, math.nan, "5", None])
def test_refuses_what_is_no_budget(seconds):
    with pytest.raises(ConfigError, match="finite number of seconds"):
        Deadline(seconds)


def test_wait():
    event = threading.Event()
    with pytest.raises(DeadlineError, match="waiting for the gate"):
        Deadline(0.01).wait(event, "the gate")
    event.set()
    Deadline(0).wait(event, "the gate")


def test_timeout_is_one_that_locks_accept():
    event = threading.Event()
    event.set()
    Deadline(1e300).wait(event, "a long time")
