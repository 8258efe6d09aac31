"""An optimizer over blocks, over gloo: one rank's bits, and whole models where a rank is lost."""

import signal
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_ranks, try_ranks
from reductions import sharded_run, transport_here

from planaria.core import points
from planaria.elastic.partition import parcels
from planaria.errors import CollectiveError

KILLED = 2


def train(rank: int) -> Any:
    transport = transport_here()
    found = sharded_run(transport)
    transport.close()
    return found


def test_any_number_of_ranks_gives_the_same_parameters() -> None:
    alone = run_ranks(1, train)[0]
    for world in (2, 3, 4):
        assert run_ranks(world, train) == [alone] * world


def _apply_early(monkey: Any, rank: int) -> None:
    """Sabotage: own blocks go into the model before the others' have come.

    The last rank comes to its second update when the others have done that in theirs.
    """
    send, store = parcels.Parcel.send, dist.distributed_c10d._get_default_store()
    sent: list[int] = []
    reached: list[int] = []

    def sends(self: Any, *args: Any) -> Any:
        wait = send(self, *args)
        self.apply()
        sent.append(rank)
        store.set(f"applied {len(sent)} of {rank}", "")
        return wait

    def comes_late(*_: object) -> None:
        reached.append(rank)
        if len(reached) == 2:
            store.wait([f"applied 2 of {other}" for other in range(KILLED)])

    monkey.setattr(parcels.Parcel, "send", sends)
    if rank == KILLED:
        points.arm_callback("elastic.optimizer.spread", comes_late)


def loses_a_rank(rank: int, place: str, sabotage: bool = False) -> str:
    """Rank 2 is killed in the second update; the others find their models as before it."""
    if sabotage:
        _apply_early(pytest.MonkeyPatch(), rank)
    if rank == KILLED:
        points.arm(f"kill@elastic.optimizer.{place}:hit=2")
    with pytest.raises(CollectiveError) as caught:
        sharded_run(transport_here())
    return str(caught.value)


@pytest.mark.parametrize("place", ["update", "spread"])
def test_no_model_is_half_updated(place: str) -> None:
    results = try_ranks(3, loses_a_rank, place)
    assert results[KILLED].exitcode == -signal.SIGKILL
    for result in results:
        if result.rank != KILLED:
            assert result.error is None, result.error
            assert "another rank has probably died" in result.value


def test_an_early_update_is_noticed() -> None:
    """By those that had got some of it when they heard of the loss."""
    results = try_ranks(3, loses_a_rank, "spread", True)
    assert any(isinstance(r.error, AssertionError) for r in results if r.rank != KILLED)
