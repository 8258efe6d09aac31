"""Blocks sent ahead, on threads: whoever gets them while steps go on ends with the same bits."""

from typing import Any

import pytest
import torch
from local_ranks import on_threads

from planaria.core.deadline import Deadline
from planaria.elastic.partition import transfer
from planaria.elastic.partition.blocks import cut, shapes_of
from planaria.elastic.partition.holders import fills, place, replace
from planaria.elastic.partition.optimizer import ShardedOptimizer
from planaria.elastic.reduction.buckets import Segment

BEFORE, AFTER = (0, 1), (0, 1, 2)
Bits = dict[int, dict[str, bytes]]


def join(transport: Any, budget: float | None, *, idle: bool = False) -> tuple[int, Bits]:
    """Two ranks have blocks, a third one gets its share while steps go on.

    Args:
        transport: The three.
        budget: What goes in a step.
        idle: Whether the third one does not make the others' updates.

    Returns:
        How many steps that took, and what this rank holds in the end.
    """
    drawn = torch.Generator().manual_seed(5)
    parameters = {
        f"layers.{i}": torch.nn.Parameter(torch.randn(8, 16, generator=drawn).to(dtype))
        for i, dtype in enumerate([torch.float32, torch.bfloat16, torch.float32])
    }
    base = torch.optim.AdamW(parameters.values(), lr=0.1)
    blocks = cut(shapes_of(parameters), numel=32)
    first = place(blocks, BEFORE, 1)
    now = replace(blocks, AFTER, 1, {r: first.partition.of(r) for r in BEFORE},
                  {r: first.of(r) for r in BEFORE}, spare=[2])  # fmt: skip
    optimizer = ShardedOptimizer(parameters, base, now, transport, hold=transport.rank in BEFORE)
    held = {r: now.of(r) for r in AFTER}
    later = replace(blocks, AFTER, 1, {r: now.partition.of(r) for r in AFTER}, held)
    moves = fills(later, held).moves
    assert moves
    way = transfer.Transfer(moves, AFTER, optimizer, transport)
    names, number = list(parameters), 0
    while not way.done:
        if number:  # in the first step there are no slots yet
            way.start(Deadline(20), budget)
        shared = torch.Generator().manual_seed(number)
        gradient = {
            Segment(b.name, b.start, b.stop): torch.randn(b.box.volume, generator=shared)
            for b in blocks
        }
        way.take(Deadline(20))
        if not (idle and transport.rank == 2):
            # One parameter has no gradient at first: its blocks get slots while they are sent.
            optimizer.apply(gradient, names if number > 1 else names[1:])
        number += 1
    optimizer.adopt(later, transport)
    optimizer.drop()
    assert optimizer.held == later.of(transport.rank)
    return number, {i: {k: v.float().numpy().tobytes() for k, v in optimizer.export(i).items()}
                    for i in optimizer.held}  # fmt: skip


def copies(found: list[tuple[int, Bits]]) -> list[list[dict[str, bytes]]]:
    """Of each block all copies."""
    return [[bits[i] for _, bits in found if i in bits] for i in range(12)]


@pytest.mark.parametrize("budget", [None, 1.0])
def test_all_copies_have_the_same_bits(
    budget: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "LEAST_BYTES", 1)
    found = on_threads(3, lambda transport: join(transport, budget))
    # An eighth of what a pair of ranks has goes in each step, however little there is time for.
    assert len({n for n, _ in found}) == 1
    assert found[0][0] == 2 if budget is None else found[0][0] > 2
    for each in copies(found):
        assert len(each) == 2
        assert each[0] == each[1]
        assert budget is None or set(each[0]) == {"master", "step", "exp_avg", "exp_avg_sq"}


def test_who_does_not_make_the_update_has_other_bits() -> None:
    found = on_threads(3, lambda transport: join(transport, None, idle=True))
    assert any(each[0] != each[1] for each in copies(found))
