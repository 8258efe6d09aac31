"""Sessions of any kind, with anything that may happen to them: drawn from seeds, in `make soak`.

`PLANARIA_SOAK_SEEDS=400-800` plays others than the first ones.
"""

import os
import random
from pathlib import Path

import pytest
from scenarios import OF_A_STEP, Scenario, draw, judge, play
from sessions import Kind, run

from planaria.elastic.membership.rules import Rules

FIRST, _, LAST = os.environ.get("PLANARIA_SOAK_SEEDS", "0-300").partition("-")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(int(FIRST), int(LAST)))
def test_a_session_of_any_kind_with_any_faults(seed: int, tmp_path: Path) -> None:
    scenario = draw(seed, tmp_path)
    print(scenario)
    print(play(scenario))


KILLS = 100


@pytest.mark.soak
@pytest.mark.parametrize("policy", ["replace", "shrink_then_replace"])
def test_a_hundred_kills(policy: str, tmp_path: Path) -> None:
    """Every few steps one of four is killed, and replaced; whoever replaces it is killed later."""
    rng = random.Random(policy)
    # More than two at once go back to what was saved, without anything being different.
    kind = Kind(steps=250, nap_s=0.003, folder=str(tmp_path), every=10, options={"redundancy": 2})
    faults = {}
    points = [point for point in OF_A_STEP[3:] if point != "elastic.reduction.gather"]
    for member in range(KILLS):
        point = rng.choice(points)
        faults[member] = f"kill@{point}:hit={rng.randrange(2, 8) + 4 * (member < 4) * member}"
    rules = Rules(4, policy=policy, hang_s=60.0)
    results = run(4, kind, faults, rules=rules, timeout=1500)
    played = judge(Scenario(0, kind, 4, faults, rules=rules), results)
    assert len(played.lost) == KILLS
    assert len(played.survived) == 4
