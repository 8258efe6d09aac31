"""Stopping: one rank is told, all stop after the same step, and what they saved last counts."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankDied, run_ranks, try_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from trainings import checkpointer, digest

from planaria.checkpoint import open_checkpoint

TOLD_RANK, TOLD_AT, MOST = 1, 3, 50


def _train(root: Path, how: str) -> dict[str, Any]:
    """Trains until told to stop; one rank is told, in its step `TOLD_AT`."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(0)
    net = nn.Linear(6, 6)
    model = DistributedDataParallel(net) if dist.is_initialized() else net
    optim = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    before = signal.getsignal(signal.SIGTERM)
    done = 0
    with checkpointer(root, {"model": model, "optim": optim}, every=1000) as ckpt:
        report = ckpt.restore()
        done = report.step if report else 0
        begun = done
        while done < begun + MOST:
            optim.zero_grad()
            model(torch.randn(4, 6)).square().mean().backward()
            if rank == TOLD_RANK % (dist.get_world_size() if dist.is_initialized() else 1):
                _tell(ckpt, how, done - begun)
            optim.step()
            done += 1
            ckpt.step(done)
            if ckpt.should_stop:
                break
    assert signal.getsignal(signal.SIGTERM) == before
    return {"begun": begun, "done": done, "weight": digest(net.weight), "stop": ckpt.should_stop}


def _tell(ckpt: Any, how: str, step: int) -> None:
    if step != TOLD_AT:
        return
    if how == "request":
        ckpt.request_stop()
    elif how != "never":
        os.kill(os.getpid(), getattr(signal, how))


def train(rank: int, root: Path, how: list[str]) -> list[dict[str, Any]]:
    """Trains once for each way of being told, going on from where the last one stopped."""
    return [_train(root, each) for each in how]


@pytest.mark.parametrize("world", [1, 3])
def test_all_ranks_stop_after_the_same_step_and_have_saved_it(tmp_path: Path, world: int) -> None:
    runs = run_ranks(world, train, tmp_path, ["SIGTERM", "request", "SIGINT"], init_group=world > 1)
    begun = 0
    for i in range(3):
        of_ranks = [run[i] for run in runs]
        assert all(r == of_ranks[0] for r in of_ranks)
        assert of_ranks[0]["begun"] == begun
        assert of_ranks[0]["stop"]
        # Told during step TOLD_AT; with others to ask, it takes a step more at the most.
        begun = of_ranks[0]["done"]
        assert begun - of_ranks[0]["begun"] - TOLD_AT in ((1,) if world == 1 else (1, 2))
        assert (
            digest(open_checkpoint(tmp_path, begun).read("model.weight")) == (of_ranks[0]["weight"])
        )
    assert open_checkpoint(tmp_path).step == begun


def ignore(rank: int, root: Path) -> None:
    """A loop that does not look whether it should stop; one rank gets two signals."""
    with checkpointer(root, {"v": {"w": torch.zeros(2)}}) as ckpt:
        for step in range(1, MOST):
            handle = ckpt.step(step)
            if handle is not None:
                handle.wait_committed()
                if rank == TOLD_RANK:
                    os.kill(os.getpid(), signal.SIGTERM)
                break
            if rank == TOLD_RANK and step == TOLD_AT:
                os.kill(os.getpid(), signal.SIGTERM)


def test_a_second_signal_ends_a_loop_that_does_not_look(tmp_path: Path) -> None:
    results = try_ranks(2, ignore, tmp_path)
    told = results[TOLD_RANK]
    assert isinstance(told.error, RankDied)
    assert told.exitcode == -signal.SIGTERM
    assert open_checkpoint(tmp_path).step in (TOLD_AT + 1, TOLD_AT + 2)


def two_checkpointers(rank: int, root: Path) -> list[list[int]]:
    """A process with two checkpointers is told once."""
    value = {"w": torch.zeros(2)}
    with checkpointer(root / "a", {"v": value}) as a, checkpointer(root / "b", {"v": value}) as b:
        for step in range(1, MOST):
            if step == TOLD_AT and rank == TOLD_RANK:
                os.kill(os.getpid(), signal.SIGTERM)
            a.step(step)
            b.step(step)
            if a.should_stop and b.should_stop:
                break
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    return [a.all_steps(), b.all_steps()]


def test_every_checkpointer_of_a_process_is_told(tmp_path: Path) -> None:
    assert run_ranks(2, two_checkpointers, tmp_path) == [[[TOLD_AT + 1], [TOLD_AT + 1]]] * 2
