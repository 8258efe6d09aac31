"""Sessions of several ranks: the bits of one rank, whatever the model, the stage, the members."""

from dataclasses import replace

import pytest
import torch
from nccl_double import MIXED
from ranks import RankDied, run_ranks, try_ranks
from sessions import Kind, Outcome, alone, check, run, train

from planaria.core import points
from planaria.elastic.membership import connect
from planaria.errors import CollectiveError

PLAIN = Kind()
KINDS = {
    "bfloat16": Kind(dtype=torch.bfloat16),
    "zero 0": Kind(options={"zero_stage": 0}),
    "zero 1, sgd": Kind(
        optimizer="SGD",
        optimizer_options={"momentum": 0.9},
        options={"zero_stage": 1},
    ),
    "float16, scaled": Kind(
        dtype=torch.float16, options={"loss_scale": 64.0, "clip_grad_norm": None}
    ),
    "groups": Kind(micro_batches=7, options={"group": 2}, weighted=False),
}
P = "elastic.session"


@pytest.fixture(scope="module")
def plain() -> Outcome:
    return alone(PLAIN)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_number_of_ranks_gives_the_same_bits(plain: Outcome, world: int) -> None:
    check(run(world, PLAIN), plain)


@pytest.mark.soak
@pytest.mark.parametrize("world", [4, 6, 7, 8])
def test_more_ranks_give_the_same_bits(plain: Outcome, world: int) -> None:
    check(run(world, PLAIN), plain)


def test_more_ranks_than_micro_batches(plain: Outcome) -> None:
    """Those that are not needed look on, and hold blocks."""
    kind = Kind(micro_batches=2)
    check(run(3, kind), alone(kind))


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_runs_lose_a_rank(name: str) -> None:
    kind = KINDS[name]
    check(run(3, kind, {1: f"kill@{P}.committed:hit=3"}), alone(kind), dead=[1])


def test_tensors_of_a_device_go_by_way_of_the_host(plain: Outcome) -> None:
    """Played on the CPU: it is the same copies and the same waits, without a device's streams."""
    check(run(3, PLAIN, {1: f"kill@{P}.committed:hit=3"}, trick="staged"), plain, dead=[1])


@pytest.mark.parametrize("stage", [0, 2])
def test_tensors_of_devices_go_by_nccl(plain: Outcome, stage: int) -> None:
    """Played on the CPU, with a double that knows no tags: what ranks start, and in which order."""
    kind = replace(PLAIN, steps=7, options={"zero_stage": stage})
    results = run(3, kind, {1: f"kill@{P}.committed:hit=3"}, joiners=1, late=3, trick="nccl")
    check(results, alone(kind), dead=[1], joined=[3])


def test_buckets_beside_each_other_are_noticed_with_nccl(plain: Outcome) -> None:
    """Sabotage: one rank begins with the next before the last one is done.

    Of two ranks: among more it may as well be that each waits for another for ever.
    """
    slow = {1: "sleep=0.1@elastic.reduction.scatter:times=20"}
    with pytest.raises(RankDied, match=MIXED):
        check(run(2, PLAIN, slow, trick="nccl, buckets beside each other"), plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_ranks_on_a_gpu(stage: int) -> None:
    kind = Kind(device="cuda", options={"zero_stage": stage})
    check(run(3, kind, {1: f"kill@{P}.committed:hit=3"}, joiners=1, late=3), alone(kind), dead=[1],
          joined=[3])  # fmt: skip


def test_fast_sums_end_alike_on_all_ranks() -> None:
    kind = Kind(options={"consistency": "fast"})
    results = run(3, kind)
    check(results, results[0].value)


LATE = Kind(steps=7)


@pytest.mark.parametrize(
    ("world", "joiners", "faults"),
    [
        (2, 1, {}),
        (1, 2, {}),
        (3, 1, {0: f"kill@{P}.backward:step=4"}),
        (3, 1, {1: f"kill@{P}.welcome:hit=1"}),
        (3, 2, {3: f"kill@{P}.prepared:hit=1"}),
    ],
)
def test_ranks_join(world: int, joiners: int, faults: dict[int, str]) -> None:
    joined = range(world, world + joiners)
    results = run(world, LATE, faults, late=2, joiners=joiners)
    check(results, alone(LATE), dead=list(faults), joined=joined)
    for me in joined:
        # It may come before the step at which it is waited for.
        assert me in faults or results[me].value.steps


def test_a_rank_joins_where_each_steps_its_own_optimizer() -> None:
    kind = Kind(steps=7, options={"zero_stage": 0})
    check(run(2, kind, late=2, joiners=1), alone(kind), joined=[2])


def fixed(rank: int, kind: Kind, faults: dict[int, str]) -> Outcome:
    """A rank that torchrun, or the like, has started."""
    if rank in faults:
        points.arm(faults[rank])
    return train(connect(), kind)


def test_without_an_agent_a_lost_rank_ends_the_job(plain: Outcome) -> None:
    assert [o.bits for o in run_ranks(2, fixed, PLAIN, {}, init_group=False)] == [plain.bits] * 2
    faults = {1: f"kill@{P}.backward:step=2"}
    results = try_ranks(2, fixed, PLAIN, faults, init_group=False)
    with pytest.raises(CollectiveError, match="restart"):
        raise results[0].error or AssertionError("it went on alone")
