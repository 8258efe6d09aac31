"""Parameters of ranks that lack the last update, on threads: only what they lack is sent."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from local_ranks import on_threads

from planaria.core.deadline import Deadline
from planaria.elastic.partition.blocks import cut, shapes_of
from planaria.elastic.partition.holders import fills, place, replace
from planaria.elastic.partition.optimizer import ShardedOptimizer
from planaria.elastic.partition.refresh import Refresh, plan_refresh
from planaria.elastic.partition.transfer import Transfer

RANKS = (0, 2, 3)
Bits = dict[str, bytes]


def fresh_parameters() -> dict[str, torch.nn.Parameter]:
    drawn = torch.Generator().manual_seed(5)
    return {
        f"layers.{i}": torch.nn.Parameter(torch.randn(8, 16, generator=drawn).to(dtype))
        for i, dtype in enumerate([torch.float32, torch.bfloat16, torch.float32])
    }


def lose_one(transport: Any, stale: Sequence[int], *, forgotten: bool = False) -> Bits:
    """Rank 1 of 4 is lost after an update that it, and `stale` ones, have not got.

    Args:
        transport: The other three.
        stale: Whose parameters lack it.
        forgotten: Whether they are not brought up to date.
    """
    me, parameters = RANKS[transport.rank], fresh_parameters()
    base = torch.optim.AdamW(parameters.values(), lr=0.1)
    blocks = cut(shapes_of(parameters), numel=32)
    first = place(blocks, range(4), 1)
    held = {rank: first.of(rank) for rank in RANKS}
    now = replace(blocks, RANKS, 1, {r: first.partition.of(r) for r in RANKS}, held)
    optimizer = ShardedOptimizer(parameters, base, now, transport, hold=False)
    for index in held[me]:
        block = blocks[index]
        part = parameters[block.name].detach().view(-1)[block.start : block.stop]
        optimizer.load(index, {"master": part.float().view(block.box.extent) + index})
    if me not in stale:
        for index, block in enumerate(blocks):
            part = parameters[block.name].detach().view(-1)[block.start : block.stop]
            part.copy_(part.float() + index)
    way = Transfer(fills(now, held).moves, RANKS, optimizer, transport)
    soon = {rank: now.of(rank) for rank in RANKS}
    named = () if forgotten else stale
    refresh = Refresh(blocks, parameters, optimizer, RANKS, held, soon, named, transport)
    way.start(Deadline(20))
    refresh.start()
    way.take(Deadline(20))
    refresh.take(Deadline(20))
    return {name: p.detach().float().numpy().tobytes() for name, p in parameters.items()}


@pytest.mark.parametrize("stale", [(), (2,), (0, 3), RANKS])
def test_all_have_the_same_bits(stale: Sequence[int]) -> None:
    found = on_threads(3, lambda transport: lose_one(transport, stale))
    expected = on_threads(3, lambda transport: lose_one(transport, ()))[0]
    assert found == [expected] * 3


def test_sabotage_who_is_forgotten_has_others() -> None:
    found = on_threads(3, lambda transport: lose_one(transport, (2,), forgotten=True))
    assert found[0] == found[2] != found[1]


def test_nothing_is_sent_that_is_there() -> None:
    blocks = cut(shapes_of(fresh_parameters()), numel=32)
    held = {0: range(6), 2: range(4, 12), 3: range(12)}
    plan = plan_refresh(blocks, RANKS, held, {2: [0, 1]}, [2, 3])
    assert sorted(index for pair, found in plan.items() if pair[1] == 1 for index in found) == [
        2,
        3,
    ]
    assert {pair[1] for pair in plan} == {1}
    sources = {pair[0] for pair in plan}
    assert sources == {0, 2}, "each sends a part"
    assert plan_refresh(blocks, RANKS, held, {}, []) == {}
