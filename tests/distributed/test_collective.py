"""Agreements between ranks, over groups of their own."""

import threading
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from planaria.core.collective import Ranks
from planaria.errors import CollectiveError, ConfigError

TIMEOUT_S = 60.0


def agree(rank: int) -> None:
    """Every operation, with values of different lengths, and in a thread beside the training."""
    world, ranks = dist.get_world_size(), Ranks(timeout_s=TIMEOUT_S)
    assert (ranks.rank, ranks.size) == (rank, world)
    values = [{"from": r, "text": "é" * 1000 * r, "none": None} for r in range(world)]
    found: list[Any] = []

    def background() -> None:
        for _ in range(20):
            found.append(ranks.all_gather(values[rank]) == values)
            found.append(ranks.gather(values[rank]) == (values if rank == 0 else None))
            found.append(ranks.broadcast(values[rank]) == values[0])
            found.append(ranks.max_async([rank, -rank, 5])() == [world - 1, 0, 5])

    thread = threading.Thread(target=background)
    thread.start()
    for _ in range(50):
        total = torch.ones(1000)
        dist.all_reduce(total)
        assert (total == world).all()
    thread.join()
    assert found == [True] * 80
    ranks.close()
    ranks.close()
    with pytest.raises(CollectiveError, match="the group was closed"):
        ranks.all_gather(1)


def test_ranks_agree_while_they_train() -> None:
    run_ranks(3, agree)


def groups(rank: int) -> list[list[int]]:
    """Groups of some ranks, made and closed again and again; ranks are in more or fewer of them."""
    members = [[0, 1], [0, 2], [0, 1, 3]]
    parents: list[Any] = [dist.new_group(m, backend="gloo") for m in members]
    gathered = []
    for _ in range(3):
        for of_group, parent in zip(members, parents, strict=True):
            if rank not in of_group:
                with pytest.raises(ConfigError, match=f"rank {rank} is not in this process_group"):
                    Ranks(parent)
                continue
            ranks = Ranks(parent, timeout_s=TIMEOUT_S)
            assert ranks.rank == of_group.index(rank)
            assert ranks.all_gather(rank) == of_group
            gathered.append(ranks.broadcast(rank))
            ranks.close()
    everyone = Ranks(timeout_s=TIMEOUT_S)
    # They outlive the groups of training.
    dist.destroy_process_group()
    gathered.append(everyone.all_gather(rank))
    return gathered


def test_groups_are_made_anew_on_any_ranks() -> None:
    for rank, gathered in enumerate(run_ranks(4, groups)):
        assert gathered == [0] * 3 * [3, 2, 1, 1][rank] + [[0, 1, 2, 3]]


def wait_for_nobody(rank: int) -> str | None:
    """Rank 1 stays away until rank 0 has given up."""
    ranks, message = Ranks(timeout_s=TIMEOUT_S), None
    if rank == 0:
        # Only now: all must have come for the group to be made.
        ranks._timeout_s = 1.0
        ranks._group.set_timeout(timedelta(seconds=1))
        with pytest.raises(CollectiveError) as caught:
            ranks.all_gather("hello")
        message = str(caught.value)
    dist.barrier()
    return message


def test_who_waits_in_vain_is_told() -> None:
    message = run_ranks(2, wait_for_nobody)[0]
    assert "rank 0 of 2: all_gather failed or found no answer within 1 s" in message
