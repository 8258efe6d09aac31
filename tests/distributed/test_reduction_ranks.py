"""Gradients over gloo: the same bits on 1, 2, 3 and 4 ranks, and what is wrong is noticed."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankResult, run_ranks, try_ranks
from reductions import MICRO_BATCHES, Net, gradients, one_step, tokens_of, transport_here

from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.elastic.reduction import exchange
from planaria.elastic.reduction.assignment import assign
from planaria.elastic.reduction.reducer import GradientReducer
from planaria.elastic.rng import micro_batch_rng
from planaria.errors import CollectiveError, DeadlineError, PlanariaError

KILLED = 1


@contextmanager
def rng_by_rank(seed: int, step: int, index: int) -> Iterator[None]:
    """Sabotage: every rank has random numbers of its own."""
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    yield


def all_kinds(rank: int, sabotage: str = "") -> list[Any]:
    """Every kind of model and leaf; each over the same transport, one after the other."""
    transport = transport_here()
    rng = rng_by_rank if sabotage == "rng" else micro_batch_rng
    if sabotage == "tree":
        exchange.Exchange._combine = _by_rank  # pyright: ignore[reportAttributeAccessIssue]
    kinds: list[dict[str, Any]] = [
        {},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "group": 2},
        {"weights": lambda i: 3.0 + i % 3},
    ]
    found = [gradients(transport, rng=rng, **options) for options in kinds]
    transport.close()
    return found


def _by_rank(self: exchange.Exchange, there: dict[Any, torch.Tensor], out: torch.Tensor) -> None:
    """Sabotage: each rank begins with its own sums."""
    nodes = sorted(there, key=lambda node: node not in self._own)
    total = there[nodes[0]].clone()
    for node in nodes[1:]:
        total += there[node]
    out.copy_(total)


def test_any_number_of_ranks_gives_the_same_bits() -> None:
    alone = run_ranks(1, all_kinds)[0]
    for world in (2, 3, 4):
        assert run_ranks(world, all_kinds) == [alone] * world


@pytest.mark.parametrize("sabotage", ["rng", "tree"])
def test_sabotage_is_noticed(sabotage: str) -> None:
    alone = run_ranks(1, all_kinds)[0]
    assert run_ranks(3, all_kinds, sabotage) != [alone] * 3


def loses_a_rank(rank: int, place: str, hit: int, action: str) -> dict[str, Any]:
    """One good step, then one in which rank 1 is killed or hangs."""
    model = Net()
    parameters = dict(model.named_parameters())
    world = dist.get_world_size()
    transport = transport_here()
    reducer = GradientReducer(
        parameters,
        MICRO_BATCHES,
        assign(MICRO_BATCHES, world),
        transport,
        columns=1,
        bucket_bytes=300,
    )
    reduced = one_step(reducer, model, 0)
    reduced.assign(parameters)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    if rank == KILLED:
        points.arm(f"{action}@elastic.reduction.{place}:hit={hit}")
    reducer.begin(Deadline(3 if action == "stop" else 30))
    error: PlanariaError | None = None
    own: list[dict[Any, torch.Tensor]] = []
    try:
        for index in reducer.order:
            with reducer.micro_batch(index), micro_batch_rng(5, 1, index):
                model(tokens_of(1, index), rare=index == 4).backward()
        own = [{n: t.clone() for n, t in b.sums().items()} for b in reducer._buckets]
        reducer.finish()
    except PlanariaError as caught:
        error = caught
        # What this rank had summed is whole, and nothing was applied.
        assert all(torch.equal(own[i][n], t) for i, b in enumerate(reducer._buckets)
                   for n, t in b.sums().items())  # fmt: skip
        assert all(torch.equal(before[n], p) for n, p in parameters.items())
        assert all(p.grad is None for p in parameters.values())
        with pytest.raises(PlanariaError):
            reducer.begin(Deadline(10))
    reducer.close()
    transport.close()
    if action == "stop":
        _continue_the_stopped(rank)
    return {"error": type(error), "text": str(error)}


def _continue_the_stopped(rank: int) -> None:
    """The others let the one that hangs go on, at the end, so that it can be ended in order."""
    store = dist.distributed_c10d._get_default_store()
    if rank != KILLED:
        store.set(f"gave up {rank}", "")
        if rank == 0:
            store.wait([f"gave up {r}" for r in range(dist.get_world_size()) if r != KILLED])
            os.kill(int(store.get("stopped")), signal.SIGKILL)


def survivors(results: list[RankResult]) -> list[dict[str, Any]]:
    for result in results:
        if result.rank != KILLED and result.error is not None:
            raise result.error
    return [r.value for r in results if r.rank != KILLED]


@pytest.mark.parametrize(
    ("place", "hit"), [("scatter", 1), ("combine", 3), ("gather", 1), ("gather", 3)]
)
def test_a_rank_killed_in_a_reduction_is_noticed_by_all(place: str, hit: int) -> None:
    results = try_ranks(4, loses_a_rank, place, hit, "kill")
    assert results[KILLED].exitcode == -signal.SIGKILL
    for outcome in survivors(results):
        assert outcome["error"] is CollectiveError, outcome
        assert "another rank has probably died" in outcome["text"]


def hangs(rank: int) -> dict[str, Any]:
    if rank == KILLED:
        dist.distributed_c10d._get_default_store().set("stopped", str(os.getpid()))
    return loses_a_rank(rank, "combine", 1, "stop")


def test_a_rank_that_hangs_is_given_up_at_the_deadline() -> None:
    results = try_ranks(3, hangs)
    for outcome in survivors(results):
        assert outcome["error"] in (DeadlineError, CollectiveError), outcome
    assert any(o["error"] is DeadlineError for o in survivors(results))
