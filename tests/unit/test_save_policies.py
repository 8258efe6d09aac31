"""When to save: each policy, their union, and the controller of Adaptive in simulated time."""

import itertools
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from checkpoints import in_background, must_notice
from hypothesis import example, given, settings
from hypothesis import strategies as st
from save_cases import start

from planaria.checkpoint import Adaptive, Checkpointer, Every, EverySeconds, OnSignal
from planaria.checkpoint.decide import Decisions
from planaria.checkpoint.policies import AnyOf, Progress, SavePolicy, VotedPolicy
from planaria.checkpoint.policies import adaptive as adaptive_module
from planaria.errors import ConfigError


@dataclass
class Handle:
    """A save of the simulation."""

    error: Exception | None = None


@dataclass
class Ranks:
    """Ranks of which this one is the first, and the others want nothing."""

    size: int
    rank: int = 0

    def max_async(self, values: Sequence[int]) -> Callable[[], list[int]]:
        return lambda: list(values)


@dataclass
class Machine:
    """A training in simulated time; every save costs and takes what it is told.

    Attributes:
        policy: What is tried.
        ranks: How many there are.
        step_s: Duration of a step that no save disturbs.
        stall_s: How long each save blocks.
        persist_s: How long each save is under way.
        slow: By which share of the time steps are slower meanwhile.
    """

    policy: SavePolicy
    ranks: int = 1
    step_s: float = 1.0
    stall_s: float = 0.05
    persist_s: float = 3.0
    slow: float = 0.1
    now: float = 100.0
    useful_s: float = 0.0
    step: int = 0
    saved: list[int] = field(default_factory=list)
    overlaps: int = 0
    costs: list[float] = field(default_factory=list)
    _ends: float | None = None

    def __post_init__(self) -> None:
        machine = self

        class Simulated(Decisions):
            clock = staticmethod(lambda: machine.now)

        self._handle: Any = None
        self.decisions = Simulated(self.policy, lambda: False)
        self.decisions.open(Ranks(self.ranks))  # type: ignore[arg-type]

    def run(self, steps: int) -> None:
        """Trains on, and calls at each boundary what a loop would call."""
        for _ in range(steps):
            self._work(self.step_s)
            self.useful_s += self.step_s
            self.step += 1
            if self.decisions.save_due(self.step):
                self._save()

    def _save(self) -> None:
        self.overlaps += self._ends is not None
        self.saved.append(self.step)
        self.costs.append(self.stall_s)
        self._handle = Handle()
        with self.decisions.blocked():
            self.decisions.saving(self._handle)
            self.now += self.stall_s
        self._ends = self.now + self.persist_s

    def _work(self, seconds: float) -> None:
        """Lets time go by, slower while a save is under way."""
        if self._ends is not None:
            left = self._ends - self.now
            part = min(seconds, left / (1 + self.slow))
            self.costs[-1] += part * self.slow
            self.now += part * (1 + self.slow)
            seconds -= part
            if self.now >= self._ends - 1e-9:
                self._ends = None
                self.decisions.saved(self._handle)
        self.now += seconds


def intervals(steps: Sequence[int]) -> list[int]:
    return [b - a for a, b in itertools.pairwise(steps)]


# Each of them


def test_every_seconds_by_the_clock() -> None:
    machine = Machine(EverySeconds(10), step_s=3.0, stall_s=0, slow=0)
    machine.run(20)
    assert machine.saved == [4, 8, 12, 16, 20]


def test_every_seconds_of_several_ranks_is_a_step_late() -> None:
    machine = Machine(EverySeconds(10), ranks=2, step_s=3.0, stall_s=0, slow=0)
    machine.run(20)
    assert machine.saved == [5, 10, 15, 20]


def test_only_rank_0_has_a_clock() -> None:
    progress = Progress(1, 1, 1e9, 1000, 1.0, 0.0, False, False, None)
    assert not EverySeconds(1).wants(progress)
    assert not Adaptive().wants(progress)


def test_a_save_by_hand_counts(tmp_path) -> None:
    with Checkpointer(tmp_path, start(), every=EverySeconds(3600), audit=True) as ckpt:
        ckpt._decisions._began -= 3600
        assert ckpt.save(1) is not None
        assert ckpt.step(2) is None
        ckpt._decisions._began -= 3600
        assert ckpt.step(3) is not None
        assert ckpt.step(4) is None
    assert ckpt.all_steps() == [1, 3]


@pytest.mark.parametrize("number", [signal.SIGUSR1, "USR1", "sigusr1"])
def test_on_signal_saves_once_and_goes_on(tmp_path, number) -> None:
    told: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: told.append(number))
    try:
        with Checkpointer(tmp_path, start(), every=OnSignal(number), audit=True) as ckpt:
            assert ckpt.step(1) is None
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert ckpt.step(2) is not None
            assert ckpt.step(3) is None
            assert not ckpt.should_stop
        assert ckpt.all_steps() == [2]
        assert set(told) == {signal.SIGUSR1}, "who was there before is told, too"
        handler: Any = signal.getsignal(signal.SIGUSR1)
        assert "lambda" in handler.__qualname__, "and is put back"
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_two_checkpointers_are_both_told(tmp_path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    first = Checkpointer(tmp_path / "a", start(), every=OnSignal(), audit=True)
    second = Checkpointer(tmp_path / "b", start(2), every=OnSignal(), audit=True)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert first.step(1) is not None
    assert second.step(1) is not None
    first.close()  # before the one that was installed later
    os.kill(os.getpid(), signal.SIGUSR1)
    assert second.step(2) is not None
    second.close()
    signal.signal(signal.SIGUSR1, before)


def test_on_signal_needs_the_main_thread_and_its_own_signal(tmp_path) -> None:
    caught: list[str] = []

    def make() -> None:
        try:
            Checkpointer(tmp_path, start(), every=OnSignal())
        except ConfigError as error:
            caught.append(str(error))

    thread, _ = in_background(make)
    thread.join(60)
    assert "main thread" in caught[0]
    assert threading.current_thread() is threading.main_thread()
    policy = OnSignal()
    with (
        Checkpointer(tmp_path, start(), every=policy),
        pytest.raises(ConfigError, match="another checkpointer"),
    ):
        Checkpointer(tmp_path / "other", start(), every=policy)
    with Checkpointer(tmp_path / "other", start(), every=policy):
        pass  # the failed one holds neither the root nor anything else


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: EverySeconds(0), "seconds above 0"),
        (lambda: EverySeconds(float("inf")), "seconds above 0"),
        (lambda: EverySeconds(True), "seconds above 0"),
        (lambda: EverySeconds("1"), "seconds above 0"),  # type: ignore[arg-type]
        (lambda: Adaptive(0), "between 0 and 1"),
        (lambda: Adaptive(1), "between 0 and 1"),
        (lambda: Adaptive("3%"), "between 0 and 1"),  # type: ignore[arg-type]
        (lambda: OnSignal("TERM"), "stop already"),
        (lambda: OnSignal(signal.SIGKILL), "cannot be caught"),
        (lambda: OnSignal("HELLO"), "no such signal"),
        (lambda: OnSignal(9999), "no such signal"),
    ],
)
def test_what_makes_no_sense_is_refused(make, said) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


# Composed


class Asked(VotedPolicy):
    """Wants what it was told to, and counts."""

    def __init__(self, answers: Sequence[bool]) -> None:
        self.answers, self.asked, self.opened = list(answers), 0, 0

    def wants(self, progress: Progress) -> bool:
        self.asked += 1
        return self.answers[progress.step - 1]

    def open(self) -> None:
        self.opened += 1

    def close(self) -> None:
        self.opened -= 1


@given(
    numbers=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    answers=st.lists(st.lists(st.booleans(), min_size=30, max_size=30), max_size=3),
    ranks=st.sampled_from([1, 2]),
)
def test_a_union_saves_where_any_would(numbers, answers, ranks) -> None:
    voted = [Asked(a) for a in answers]
    policy: SavePolicy = AnyOf(*map(Every, numbers), *voted)
    machine = Machine(policy, ranks=ranks)
    machine.run(30)
    expected = {s for n in numbers for s in range(n, 31, n)}
    # What is voted for at the last boundary comes after it.
    expected |= {i + ranks for a in answers for i, yes in enumerate(a) if yes if i + ranks <= 30}
    assert machine.saved == sorted(expected)
    assert all((v.asked, v.opened) == (30, 1) for v in voted), "each is asked each time"
    machine.decisions.release()
    machine.decisions.release()
    assert all(v.opened == 0 for v in voted)


def test_unions_are_flat_and_equal() -> None:
    both = Every(2) | EverySeconds(3) | Every(5)
    assert both == AnyOf(Every(2), EverySeconds(3), Every(5))
    assert repr(both) == "Every(steps=2) | EverySeconds(seconds=3) | Every(steps=5)"
    with pytest.raises(TypeError):
        Every(2) | 3  # type: ignore[operator]


def test_a_policy_of_ones_own_may_be_joined(tmp_path) -> None:
    class Powers:
        def due(self, step: int) -> bool:
            return step & (step - 1) == 0

    with Checkpointer(tmp_path, start(), every=Every(6) | Powers(), audit=True) as ckpt:
        for n in range(1, 14):
            ckpt.step(n)
    assert ckpt.all_steps() == [1, 2, 4, 6, 8, 12]


# Adaptive


def ideal(machine: Machine, overhead: float) -> float:
    """CheckFreq's interval for what the machine costs."""
    cost = max(machine.costs)
    return max(machine.persist_s / machine.step_s, cost / (overhead * machine.step_s), 1)


def check_adaptive(
    overhead: float, ranks: int, step_s: float, stall: float, persist: float, slow: float
) -> None:
    """The bound holds once the trial is paid for, saves never overlap, and none is withheld."""
    machine = Machine(Adaptive(overhead), ranks, step_s, stall * step_s, persist * step_s, slow)
    machine.run(1000)
    assert machine.overlaps == 0
    assert machine.saved[0] <= 6, "there is something to go back to early"
    spent = sum(machine.costs)
    if len(machine.saved) > 1:
        # A cost is measured in whole microseconds, and the last save may not be over.
        assert spent <= overhead * machine.useful_s * (1 + 1e-3) + 1e-5 * len(machine.saved)
    k = ideal(machine, overhead)
    # The trial is paid for first; between two saves there is an undisturbed step, and the vote.
    least = (1000 - 2 * k - 10) / (k + 4) - 1
    assert len(machine.saved) >= least, (machine.saved[:10], k)


@settings(max_examples=60)
@given(
    overhead=st.floats(0.005, 0.3),
    ranks=st.sampled_from([1, 2]),
    step_s=st.floats(0.01, 60),
    stall=st.floats(0, 2),
    persist=st.floats(0.01, 40),
    slow=st.floats(0, 1),
)
@example(overhead=0.03, ranks=1, step_s=1.0, stall=0.0, persist=0.5, slow=0.0)
def test_adaptive_keeps_its_bound(overhead, ranks, step_s, stall, persist, slow) -> None:
    check_adaptive(overhead, ranks, step_s, stall, persist, slow)


def test_sabotage_adaptive_without_its_account(monkeypatch) -> None:
    monkeypatch.setattr(adaptive_module.Adaptive, "_earn", lambda self, _: None)
    monkeypatch.setattr(adaptive_module.Adaptive, "interval", 1)

    def wants(self: Adaptive, progress: Progress) -> bool:
        return progress.step % 5 == 0

    monkeypatch.setattr(adaptive_module.Adaptive, "wants", wants)
    must_notice(check_adaptive, 0.03, 1, 1.0, 0.1, 30.0, 0.1)


def test_adaptive_fits_again_when_costs_change() -> None:
    policy = Adaptive(0.03)
    machine = Machine(policy, stall_s=0.05, persist_s=2.0, slow=0.05)
    machine.run(500)
    cheap = intervals(machine.saved)[-1]
    assert policy.interval is not None
    assert cheap == pytest.approx(ideal(machine, 0.03), abs=3)
    machine.stall_s, machine.slow, before = 0.3, 0.3, len(machine.saved)
    machine.run(1000)
    dear = intervals(machine.saved)[-1]
    assert dear == pytest.approx(ideal(machine, 0.03), abs=3)
    assert dear > 3 * cheap
    # One save was cheaper than it turned out to be; nothing else was overspent.
    assert sum(machine.costs) <= 0.03 * machine.useful_s + machine.costs[before]
    machine.stall_s, machine.slow = 0.05, 0.05
    machine.run(1000)
    assert intervals(machine.saved)[-1] == pytest.approx(cheap, abs=3)


def test_adaptive_fits_again_when_steps_change() -> None:
    policy = Adaptive(0.05)
    machine = Machine(policy, step_s=1.0, stall_s=0.2, persist_s=1.0, slow=0.0)
    machine.run(300)
    assert intervals(machine.saved)[-1] == pytest.approx(4, abs=2)
    machine.step_s = 0.1
    machine.run(1000)
    assert intervals(machine.saved)[-1] == pytest.approx(40, abs=6)
    assert policy.step_s == pytest.approx(0.1)
    assert policy.measured <= 0.05


def test_adaptive_never_saves_before_the_last_is_written() -> None:
    machine = Machine(Adaptive(0.3), step_s=1.0, stall_s=0.0, persist_s=50.0, slow=0.0)
    machine.run(1000)
    assert machine.overlaps == 0
    assert set(intervals(machine.saved)) <= {51, 52}


def test_adaptive_takes_an_evaluation_for_none_of_its_cost() -> None:
    policy = Adaptive(0.03)
    machine = Machine(policy, step_s=1.0, stall_s=0.02, persist_s=2.0, slow=0.05)
    machine.run(100)
    usual = intervals(machine.saved)[-1]
    while machine._ends is None:  # into a step that a save disturbs
        machine.run(1)
    machine.now += 600.0
    machine.run(400)
    assert max(intervals(machine.saved)) <= usual + 2.0 * 4 / 0.03
    assert intervals(machine.saved)[-1] == pytest.approx(usual, abs=3)


def test_adaptive_in_a_real_run(tmp_path) -> None:
    policy = Adaptive(0.2)
    with Checkpointer(tmp_path, start(), every=policy, audit=True) as ckpt:
        for n in range(1, 60):
            handle = ckpt.step(n)
            if handle is not None:
                handle.wait_committed()
    assert ckpt.all_steps()[0] == 4, "three steps after the first boundary"
    assert policy.persist_s is not None
    assert policy.cost_s is not None
    assert policy.interval is not None
