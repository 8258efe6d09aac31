"""Memory of sums that are over: used again where nothing is under way in it, and only there."""

import copy
from typing import Any

import pytest
import torch
from local_ranks import on_threads
from reductions import Net

from planaria.core.deadline import Deadline
from planaria.elastic.partition.blocks import cut, shapes_of
from planaria.elastic.partition.optimizer import ShardedOptimizer
from planaria.elastic.partition.owners import spread
from planaria.elastic.reduction.assignment import assign
from planaria.elastic.reduction.memory import Memory
from planaria.elastic.reduction.reducer import GradientReducer
from planaria.elastic.reduction.transport import Alone
from planaria.errors import CollectiveError

CPU = torch.device("cpu")


def test_what_fits_is_used_again() -> None:
    memory = Memory()
    part = memory.take(100, torch.float32, CPU, grows=True)
    address = part.data_ptr()
    memory.give(part[:40])
    assert memory.take(100, torch.float64, CPU).data_ptr() != address
    assert memory.take(300, torch.float32, CPU).data_ptr() != address
    assert memory.take(10, torch.float32, CPU).data_ptr() != address, "far too large"
    larger = memory.take(140, torch.float32, CPU)
    assert (larger.data_ptr(), larger.numel()) == (address, 140), "there was room to grow"
    assert memory.take(100, torch.float32, CPU).data_ptr() != address, "it is taken"
    memory.give(larger)
    memory.clear()
    assert not memory._free


class Breaking(Alone):
    """Links that break in the middle of a message."""

    broken = False

    def exchange(self, tag: int, outgoing: Any, incoming: Any) -> Any:
        def wait(deadline: Deadline) -> None:
            if self.broken:
                raise CollectiveError("a rank is gone")

        return wait


def addresses(reducer: GradientReducer) -> set[int]:
    return {t.data_ptr() for bucket in reducer._buckets for t in bucket.results()}


@pytest.mark.parametrize("given_up", [False, True])
def test_a_result_is_used_again_unless_its_step_was_cut_short(given_up: bool) -> None:
    """Where its sums had been handed over, links that break may still write into it."""
    torch.manual_seed(0)
    model = Net(torch.float32)
    parameters = dict(model.named_parameters())

    def make(before: GradientReducer | None) -> GradientReducer:
        return GradientReducer(parameters, 1, assign(1, 1), Alone(), before=before)

    first = make(None)
    old = addresses(first)
    kept = [bucket.result for bucket in first._buckets]  # so that nobody gets it by chance
    first.begin(Deadline(20))
    if given_up:
        with first.micro_batch(0):
            model(torch.arange(6), rare=False).backward()
    first.close()
    second = make(first)
    assert bool(addresses(second) & old) is not given_up
    second.close()
    assert kept


@pytest.mark.parametrize("broken", [False, True])
def test_parcels_are_used_again_unless_they_were_cut_short(broken: bool) -> None:
    parameters = {"w": torch.nn.Parameter(torch.randn(8, 8))}
    partition = spread(cut(shapes_of(parameters), numel=16), [0])
    transport = Breaking()
    optimizer = ShardedOptimizer(
        parameters, torch.optim.SGD(parameters.values(), lr=0.1), partition, transport
    )
    optimizer.spread(Deadline(20))
    assert optimizer._parcels is not None
    flat = optimizer._parcels[0]._flat
    transport.broken = broken
    if broken:
        with pytest.raises(CollectiveError):
            optimizer.spread(Deadline(20))
    transport.broken = False
    optimizer.adopt(optimizer.placement, transport)
    optimizer.spread(Deadline(20))
    assert (optimizer._parcels[0]._flat.data_ptr() == flat.data_ptr()) is not broken


def test_a_reducer_after_another_has_the_same_bits() -> None:
    """Whatever the one before has left in its memory."""
    shared = torch.nn.Linear(16, 64)

    def sums(transport: Any, spoil: bool) -> list[bytes]:
        model = copy.deepcopy(shared)
        parameters = dict(model.named_parameters())
        reducer, found = None, []
        for leaves in (4, 6):
            reducer = GradientReducer(
                parameters, leaves, assign(leaves, transport.size), transport, before=reducer
            )
            reducer.begin(Deadline(20))
            for index in reducer.order:
                with reducer.micro_batch(index):
                    model(torch.full((2, 16), 1.0 / (1 + index))).square().mean().backward()
            reduced = reducer.finish()
            found += [value.numpy().tobytes() for value in reduced.segments.values()]
            if spoil:
                for value in reduced.segments.values():
                    value.fill_(float("nan"))
            reducer.close()
        return found

    plain = on_threads(3, lambda transport: sums(transport, False))
    assert on_threads(3, lambda transport: sums(transport, True)) == plain
