"""Sessions drawn from a seed: what is trained, on how many ranks, and what happens to them.

::

    scenario = draw(17, folder)
    play(scenario)            # raises if anything but the bits of one rank comes out of it

The same seed draws the same scenario. What is drawn covers worlds of 1 to 8 ranks, micro-batches
that they do not divide, types, optimizers, stages, dropout, clipping, tied weights; kills at any
point of a step or of a recovery, at any rank, several at once, hung ranks, delays, ranks that join,
that replace others, or that have to go; with and without checkpoints and a record.
"""

import random
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from memory_jobs import runtime_folder
from ranks import RankResult
from sessions import Kind, Outcome, alone, run

from planaria.elastic.membership.rules import Rules
from planaria.elastic.record import audit, kept, read
from planaria.errors import StateError

#: In the order of a step.
OF_A_STEP = (
    "elastic.session.forward",
    "elastic.session.backward",
    "elastic.session.computed",
    "elastic.reduction.scatter",
    "elastic.reduction.combine",
    "elastic.reduction.gather",
    "elastic.reduction.shadow",
    "elastic.session.prepared",
    "elastic.session.voting",
    "elastic.session.committed",
    "elastic.optimizer.update",
    "elastic.optimizer.spread",
    "elastic.optimizer.write",
    "elastic.session.done",
)
#: In a recovery, or when members change.
OF_A_CHANGE = (
    "elastic.session.regrouped",
    "elastic.session.caught_up",
    "elastic.partition.send",
    "elastic.session.welcome",
    "elastic.session.hand_over",
    "elastic.partition.under_way",
    "elastic.partition.arrived",
    "elastic.session.promote",
)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "Adam": {"amsgrad": True},
    "SGD": {"momentum": 0.9, "nesterov": True},
    "RMSprop": {"centered": True},
}
# Enough for a rank that computes on a busy machine: who is fenced for nothing is one loss more.
HANG_S = 6.0


@dataclass
class Scenario:
    """One run, and what happens in it.

    Attributes:
        seed: What it was drawn from.
        kind: What is trained.
        world: Ranks that it begins with.
        faults: Faults to arm, by member.
        joiners: Ranks that come later.
        late: The step before which the others wait for those.
        rules: The job's rules.
    """

    seed: int
    kind: Kind
    world: int
    faults: dict[int, str] = field(default_factory=dict)
    joiners: int = 0
    late: int | None = None
    rules: Rules = field(default_factory=lambda: Rules(1))

    def __str__(self) -> str:
        return (
            f"seed {self.seed}: {self.world} ranks, {self.rules.policy}, {self.joiners} join "
            f"(late={self.late}), faults {self.faults}, {self.kind}"
        )


def draw(seed: int, folder: Path) -> Scenario:
    """Draws one."""
    rng = random.Random(seed)
    world = rng.choice([1, 2, 3, 3, 4, 4, 5, 5, 6, 7, 7, 8])
    kind = _kind(rng, folder)
    joiners = rng.choice([0, 0, 0, 1, 1, 2]) if world < 8 else 0
    policy = "shrink" if joiners else rng.choice(["shrink", "shrink", *POLICIES])
    rules = Rules(world, policy=policy, maximum=world + joiners, recovery_s=30.0, replace_s=25.0)
    made = Scenario(seed, kind, world, joiners=joiners, rules=rules)
    made.late = rng.randrange(1, 4) if joiners else None
    losses = rng.choice([0, 1, 1, 1, 2, 2, 3])
    survivors = 0 if policy.startswith("replace") else 1
    victims = rng.sample(range(world), min(losses, world - survivors))
    if losses and rng.random() < 0.3:
        victims.append(world + rng.randrange(2))  # one that joins, or replaces another, if it does
    at_once = rng.random() < 0.3
    step, point = rng.randrange(1, 5), rng.choice(OF_A_STEP)
    for place, victim in enumerate(dict.fromkeys(victims)):
        action = "kill"
        if rng.random() < 0.1:
            action = "stop"
            made.rules = replace(made.rules, hang_s=HANG_S)
        if place and rng.random() < 0.3:
            where, when = rng.choice(OF_A_CHANGE), f"hit={rng.choice([1, 1, 2, 3])}"
        elif at_once:
            where, when = point, f"hit={_hits(point, step)}"
        else:
            where = rng.choice(OF_A_STEP)
            when = f"hit={_hits(where, rng.randrange(6))}"
        made.faults[victim] = f"{action}@{where}:{when}"
    if rng.random() < 0.3:
        # Who is slow at one place meets the others elsewhere in theirs.
        where = rng.choice([*OF_A_STEP, *OF_A_CHANGE])
        slow = f"sleep={rng.choice([0.003, 0.03, 0.3])}@{where}:hit=2,times={rng.choice([1, 4])}"
        who = rng.randrange(world)
        made.faults[who] = ";".join(filter(None, [made.faults.get(who), slow]))
    if rng.random() < 0.15 and world > 1:
        leaving = rng.sample(range(world), rng.randrange(1, min(world, 3)))
        at = rng.randrange(1, 5)
        made.kind = replace(made.kind, leave=dict.fromkeys(leaving, at))
    if kind.folder is not None and rng.random() < 0.25:
        made.kind = replace(made.kind, snapshots=rng.choice([1, 2]))
    return made


POLICIES = ("replace", "replace_then_shrink", "shrink_then_replace")


def _hits(point: str, step: int) -> int:
    """How often a point was reached by then: it is per micro-batch, bucket, or step."""
    return step + 1 if point not in OF_A_STEP[:2] else 2 * step + 1


def _kind(rng: random.Random, folder: Path) -> Kind:
    micro_batches = rng.choice([1, 2, 3, 5, 7, 8, 10, 11, 12, 13])
    options: dict[str, Any] = {
        "zero_stage": rng.choice([0, 1, 2, 2, 2]),
        "redundancy": rng.choice([1, 1, 1, 2, 3]),
        "group": rng.choice([1, 1, 1, 2, 3]),
        "clip_grad_norm": rng.choice([None, 0.5, 1e-3]),
        "seed": rng.randrange(100),
    }
    dtype = rng.choice([torch.float32] * 4 + [torch.bfloat16] * 2 + [torch.float16])
    if dtype is torch.float16:
        options |= {"loss_scale": rng.choice([64.0, "dynamic"])}
    optimizer = rng.choice(list(OPTIMIZERS))
    return Kind(
        dtype=dtype,
        optimizer=optimizer,
        optimizer_options=OPTIMIZERS[optimizer],
        options=options,
        micro_batches=micro_batches,
        steps=rng.choice([5, 6, 8]),
        weighted=rng.random() < 0.6,
        nap_s=rng.choice([0.0, 0.0, 0.0, 0.005]),
        folder=str(folder / "ckpt") if rng.random() < 0.35 else None,
        every=rng.choice([1, 2, 3]),
        record=str(folder / "record") if rng.random() < 0.3 else None,
    )


_references: dict[str, Outcome] = {}


def reference_of(kind: Kind) -> Outcome:
    """The run of one rank to which nothing happens, computed once."""
    plain = replace(
        kind, folder=None, record=None, leave={}, nap_s=0.0, every=2, stop_at=None, snapshots=0
    )
    key = repr(plain)
    if key not in _references:
        _references[key] = alone(plain)
    return _references[key]


@dataclass
class Played:
    """What came of a scenario.

    Attributes:
        survived: Members that came to the end.
        lost: Members that were killed.
        clear_stop: Why all that were left stopped, empty if they did not.
        gap: The longest time between two steps on any rank, in seconds.
        repeats: Steps that were yielded again, on the rank with most of them.
    """

    survived: list[int]
    lost: list[int]
    clear_stop: str = ""
    gap: float = 0.0
    repeats: int = 0


def play(scenario: Scenario) -> Played:
    """Plays a scenario, and compares with an undisturbed run.

    Raises:
        AssertionError: Something is not as it has to be.
    """
    kind = scenario.kind
    with TemporaryDirectory() as folder, runtime_folder(Path(folder)):
        results = run(
            scenario.world, kind, scenario.faults, rules=scenario.rules,
            joiners=scenario.joiners, late=scenario.late,
        )  # fmt: skip
    return judge(scenario, results)


def judge(scenario: Scenario, results: dict[int, RankResult]) -> Played:
    """Compares what came of a scenario with the undisturbed run."""
    kind = scenario.kind
    lost = [m for m, result in results.items() if result.exitcode == -signal.SIGKILL]
    hung = any("stop@" in text for text in scenario.faults.values())
    for member in lost:
        armed = scenario.faults.get(member, "")
        assert hung or "kill@" in armed, f"member {member} was killed for nothing"
    played = Played([], lost)
    ended = {m: result for m, result in results.items() if m not in lost}
    errors = {m: result.error for m, result in ended.items() if result.error is not None}
    # A process that came when there was no place or no run any more was told so.
    spare = {m for m in errors if m >= scenario.world and _came_for_nothing(errors[m])}
    ended = {m: result for m, result in ended.items() if m not in spare}
    errors = {m: error for m, error in errors.items() if m not in spare}
    if errors:
        reasons = {f"{type(error).__name__}: {error}" for error in errors.values()}
        assert all(_is_clear(scenario, error, len(lost)) for error in errors.values()), reasons
        played.clear_stop = min(reasons)
        ended = {m: result for m, result in ended.items() if m not in errors}
        # Whoever left before has; who came later begins again, with the bits of the reference.
        went_on = {m for m in ended if m < scenario.world} - set(kind.leave)
        assert not went_on, f"members {went_on} went on, others stopped: {reasons}"
    reference = reference_of(kind)
    of_step = {numbers[0]: numbers for numbers in reference.steps}
    for member, result in ended.items():
        outcome: Outcome = result.value
        seen = [numbers[0] for numbers in outcome.steps]
        for numbers in outcome.steps:
            assert numbers == of_step[numbers[0]], (member, "a step's numbers differ")
        if member in kind.leave and seen[-1] + 1 < kind.steps:
            assert seen[-1] >= kind.leave[member], (member, "left before it had to")
            continue
        if seen:
            assert seen[-1] == kind.steps - 1, (member, seen)
        if member < scenario.world:
            assert sorted(set(seen)) == list(range(kind.steps)), (member, seen)
        assert outcome.parameters == reference.parameters, (member, "parameters differ")
        assert outcome.lr == reference.lr, member
        # As text: losses that are no numbers are equal, too.
        assert repr(outcome.counted) == repr(reference.counted), (member, outcome.counted)
        played.survived.append(member)
        played.gap = max(played.gap, outcome.gap)
        played.repeats = max(played.repeats, len(outcome.attempts) - kind.steps)
    if kind.record is not None and Path(kind.record).exists():
        entries = read(kind.record)
        assert audit(entries) == []
        losses = {step: each.loss for step, each in kept(entries).items()}
        if played.survived:
            assert losses == {n + 1: numbers[1] for n, numbers in of_step.items()}
    return played


def _came_for_nothing(error: BaseException) -> bool:
    return type(error).__name__ == "StoppedError"


def _is_clear(scenario: Scenario, error: BaseException, losses: int) -> bool:
    """Whether a run may have stopped by this error: it lost more than it was made to survive."""
    kind = scenario.kind
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, StateError) and "lost with" in text:
        leaving = len(kind.leave)
        return kind.options["zero_stage"] > 0 and losses + leaving > kind.options["redundancy"]
    return False
