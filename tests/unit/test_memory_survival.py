"""The formulas of survival against all sets of lost nodes, simulation and the exact process."""

import json
import math
import random
from itertools import combinations

import numpy as np
import pytest

from planaria.checkpoint.memory import survival
from planaria.checkpoint.memory.placement import PAGE, Stripes, make_groups
from planaria.checkpoint.memory.survival import Recovery, erasure, replication
from planaria.errors import ConfigError
from planaria.launch.cli import main


def decodable(nodes: int, losses: int, group_size: int, lost: set[int]) -> bool:
    """Whether every stripe of every group has k parts left, as the layout itself says."""
    for group in make_groups([""] * nodes, group_size, losses):
        layout = Stripes(len(group), min(losses, len(group) - 1), [PAGE] * len(group))
        for stripe in range(layout.nodes):
            parts = layout.part_nodes(stripe)
            if sum(group[i] not in lost for i in parts) < layout.k:
                return False
    return True


def copied(nodes: int, copies: int, lost: set[int]) -> bool:
    """Whether every node's image is left, placed as GEMINI's algorithm 1 does."""
    whole = nodes // copies - (nodes % copies > 0)
    for node in range(nodes):
        if node < whole * copies or nodes % copies == 0:
            start = node // copies * copies
            holders = range(start, start + copies)
        else:
            start, ring = whole * copies, nodes - whole * copies
            holders = [start + (node - start + i) % ring for i in range(copies)]
        if all(holder in lost for holder in holders):
            return False
    return True


@pytest.mark.parametrize(
    ("nodes", "losses", "group_size"),
    [(1, 1, 16), (3, 1, 3), (5, 2, 4), (6, 1, 3), (7, 1, 3), (8, 2, 4), (8, 3, 8), (9, 1, 2)],
)
def test_parity_survives_what_it_should_by_exhaustion(
    nodes: int, losses: int, group_size: int
) -> None:
    scheme = erasure(nodes, losses, group_size)
    assert sum(size * count for size, count in scheme.groups.items()) == nodes
    for x in range(nodes + 1):
        sets = [set(lost) for lost in combinations(range(nodes), x)]
        survived = sum(decodable(nodes, losses, group_size, lost) for lost in sets)
        assert scheme.survives(x) == pytest.approx(survived / len(sets), abs=1e-12)


@pytest.mark.parametrize(
    ("nodes", "copies"), [(1, 2), (2, 2), (4, 2), (5, 2), (6, 3), (7, 3), (8, 3), (9, 4), (5, 1)]
)
def test_copies_survive_what_they_should_by_exhaustion(nodes: int, copies: int) -> None:
    scheme = replication(nodes, copies)
    assert sum(size * count for size, count in scheme.groups.items()) == nodes
    for x in range(nodes + 1):
        sets = [set(lost) for lost in combinations(range(nodes), x)]
        survived = sum(copied(nodes, min(copies, nodes), lost) for lost in sets)
        assert scheme.survives(x) == pytest.approx(survived / len(sets), abs=1e-12)


@pytest.mark.parametrize(("nodes", "copies"), [(16, 2), (128, 2), (1000, 2), (120, 3), (1000, 4)])
def test_copies_agree_with_gemini(nodes: int, copies: int) -> None:
    """Corollary 1: exact below 2 r losses, a bound from below from there on."""
    for x in range(copies, 4 * copies):
        bound = 1 - nodes / copies * math.comb(nodes - copies, x - copies) / math.comb(nodes, x)
        found = replication(nodes, copies).survives(x)
        if x < 2 * copies:
            assert found == pytest.approx(bound, abs=1e-12)
        assert found >= bound - 1e-12


def test_simulated_losses_agree() -> None:
    rng = random.Random(0)
    nodes, losses, size = 60, 2, 8
    groups = make_groups([""] * nodes, size, losses)
    where = {node: i for i, group in enumerate(groups) for node in group}
    for x in (3, 6, 12):
        trials, survived = 4000, 0
        for _ in range(trials):
            hit = [0] * len(groups)
            for node in rng.sample(range(nodes), x):
                hit[where[node]] += 1
            survived += max(hit) <= losses
        p = erasure(nodes, losses, size).survives(x)
        assert survived / trials == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / trials))


@pytest.mark.parametrize(("group", "losses"), [(4, 1), (8, 2), (6, 3)])
def test_the_loss_rate_is_that_of_the_process(group: int, losses: int) -> None:
    """Against the whole distribution over the number of lost nodes, by uniformisation."""
    mtbf, mttr, span = 1000.0, 2.0, 5000.0
    fastest = group / mtbf + losses / mttr
    jump = np.zeros((losses + 2, losses + 2))
    for i in range(losses + 1):
        jump[i, i + 1] = (group - i) / mtbf / fastest
        if i:
            jump[i, i - 1] = i / mttr / fastest
        jump[i, i] = 1 - jump[i].sum()
    jump[losses + 1, losses + 1] = 1
    at, lost, weight = np.eye(losses + 2)[0], 0.0, -fastest * span  # weight: log of Poisson's
    for n in range(int(fastest * span + 10 * math.sqrt(fastest * span) + 50)):
        lost += math.exp(weight) * at[-1]
        at = at @ jump
        weight += math.log(fastest * span / (n + 1))
    scheme = erasure(group, losses, group)
    assert scheme.loses_within(span, mtbf, mttr) == pytest.approx(lost, rel=0.02)
    many = erasure(50 * group, losses, group)
    assert many.loses_within(span, mtbf, mttr) == pytest.approx(1 - (1 - lost) ** 50, rel=0.02)


def test_known_formula_for_two_disks() -> None:
    """Mean time to data loss of a mirror: (3 l + u) / (2 l^2) with replacement at rate u."""
    fails, back = 1 / 500, 1 / 3
    expected = (3 * fails + back) / (2 * fails**2)
    assert replication(2, 2).mean_time_to_loss(500, 3) == pytest.approx(expected)
    assert erasure(2, 1, 2).mean_time_to_loss(500, 3) == pytest.approx(expected)


def test_costs() -> None:
    plan, two, three = erasure(1000, 2, 16), replication(1000, 2), replication(999, 3)
    assert plan.groups == {15: 8, 16: 55}
    assert (plan.memory, two.memory, three.memory) == (1 + 2 / 13, 2, 3)
    assert (plan.network, two.network, three.network) == (1 + 1 / 13, 1, 2)
    assert erasure(8, 1, 8).memory == 1 + 1 / 7
    # The layout itself: parity chunks kept, parts sent to the one that encodes and on to others.
    layout = Stripes(16, 2, [14 * 64 * PAGE] * 16)
    kept = layout.m * layout.chunk_nbytes / layout.lengths[0]
    assert 1 + kept == pytest.approx(erasure(16, 2, 16).memory)
    sent = [0] * 16
    for stripe in range(16):
        encoder, *others = layout.parity_nodes(stripe)
        for node in layout.data_nodes(stripe):
            sent[node] += layout.chunk_nbytes
        sent[encoder] += len(others) * layout.chunk_nbytes
    assert set(sent) == {round(erasure(16, 2, 16).network * layout.lengths[0])}


def test_recovery_is_bound_by_links_and_decoding() -> None:
    image, link = 64e9, 12.5e9
    plan = erasure(1000, 2, 16)
    assert Recovery(replication(1000, 2), image, link).one_reads == image / link
    assert Recovery(replication(1000, 3), image, link).all_read == image / link / 2
    assert Recovery(plan, image, link, decode=8e9).one_reads == 14 * image / 8e9
    assert Recovery(plan, image, link, decode=1e12).one_reads == 14 * image / link
    # Each of the 15 that are left sends 14 / 15 of an image.
    assert Recovery(plan, image, link).all_read == pytest.approx(14 / 15 * image / link)
    with pytest.raises(ConfigError):
        Recovery(plan, 0, link)


def test_whole_domains() -> None:
    racks = [f"rack {i // 4}" for i in range(32)]
    assert survival.domains_survived(racks, 8, 2) == 2, "one of each rack in each group"
    assert survival.domains_survived(racks, 16, 2) == 1, "two of each rack in each group"
    assert survival.domains_survived(racks, 16, 1) == 0
    assert survival.domains_survived([""] * 8, 8, 2) == 2
    assert survival.domains_survived(["a", "a"], 2, 1) == 0
    assert survival.domains_survived([], 4, 1) == 0


def test_many_nodes() -> None:
    scheme = erasure(100_000, 3, 16)
    assert 0.5 < scheme.survives(200) < 1
    assert 0 < scheme.loses_within(24 * 365, 6300, 0.2) < 1e-3


@pytest.mark.parametrize(
    "call",
    [
        lambda: erasure(0, 1),
        lambda: erasure(4, -1),
        lambda: erasure(4, 1, 0),
        lambda: erasure(300, 255, 255),
        lambda: replication(4, 0),
        lambda: replication(20, 9),
        lambda: erasure(4, 1).survives(5),
        lambda: erasure(4, 1).mean_time_to_loss(0, 1),
    ],
)
def test_what_makes_no_sense_is_refused(call) -> None:
    with pytest.raises(ConfigError):
        call()


def test_a_formula_that_is_off_by_one_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    comb = math.comb
    monkeypatch.setattr(survival.math, "comb", lambda n, x: comb(n, x) + (x == 2 and n == 4))
    with pytest.raises(AssertionError):
        test_parity_survives_what_it_should_by_exhaustion(8, 2, 4)


def test_plan_memory(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["plan", "memory", "--nodes", "1000", "--racks", "50", "--storage-gb-s", "100"]
    assert main(args) == 0
    text = capsys.readouterr().out
    for part in ("14 + 2", "1.154x", "2 copies", "3 copies", "any 2 of them", "simulated"):
        assert part in text
    assert main([*args, "--lost", "3", "--lost", "40", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["label"] == "simulated"
    assert data["racks_survived"] == 2
    assert data["restart_from_storage_s"] == pytest.approx(640)
    first = data["schemes"][0]
    assert first["survives"] == {
        "3": erasure(1000, 2).survives(3), "40": erasure(1000, 2).survives(40)
    }  # fmt: skip
    assert [s["scheme"] for s in data["schemes"]] == ["14 + 2", "2 copies", "3 copies", "9 + 7"]
    assert data["schemes"][3]["memory"] <= 2


@pytest.mark.parametrize(
    "args", [["--nodes", "0"], ["--nodes", "4", "--lost", "5"], ["--nodes", "4", "--gbit", "0"]]
)
def test_plan_memory_refuses(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "memory", *args]) == 2
    assert capsys.readouterr().err.startswith("planaria: ")


def test_plan_memory_says_when_there_are_too_few_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "memory", "--nodes", "2"]) == 0
    assert "too few nodes" in capsys.readouterr().out
    assert main(["plan", "memory", "--nodes", "1"]) == 0
