"""Ranks that hold different things: pipeline stages split otherwise, and shares of the data."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from trainings import checkpointer, whole_state

from planaria.checkpoint import open_checkpoint
from planaria.data import GlobalBatch
from planaria.errors import MismatchError

LAYERS, SAVED_AT, STEPS = 6, 2, 4


class Stage(nn.Module):
    """Some consecutive layers of a model, under the names they have in the whole of it."""

    def __init__(self, layers: range) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for i in layers:
            torch.manual_seed(i)
            # Each has a buffer of its own, and counters in its optimizer's state.
            self.layers[str(i)] = nn.Sequential(nn.Linear(4, 3 + i), nn.BatchNorm1d(3 + i))


def _share(rank: int, world: int) -> range:
    return range(LAYERS * rank // world, LAYERS * (rank + 1) // world)


def _stage(rank: int, world: int, lr_of_rank: bool) -> tuple[Stage, torch.optim.Optimizer]:
    stage = Stage(_share(rank, world))
    decayed = [p for n, p in stage.named_parameters() if n.endswith("weight")]
    others = [p for n, p in stage.named_parameters() if n.endswith("bias")]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return stage, torch.optim.AdamW(groups, lr=0.1 * (rank + 1) if lr_of_rank else 0.1)


def _train(stage: Stage, optim: torch.optim.Optimizer, step: int) -> None:
    """Trains every layer on numbers that depend on it and the step alone."""
    optim.zero_grad()
    for name, layer in stage.layers.items():
        numbers = torch.Generator().manual_seed(100 * step + int(name))
        layer(torch.randn(5, 4, generator=numbers)).pow(3).mean().backward()
    optim.step()


def train_stages(rank: int, root: Path, resume: bool, lr_of_rank: bool = False) -> dict[str, str]:
    """Trains this rank's stage to the end, from the start or from what is saved."""
    world = dist.get_world_size()
    stage, optim = _stage(rank, world, lr_of_rank)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optim, 0.9)
    state = {"model": stage, "optim": optim, "schedule": schedule}
    with checkpointer(root, state) as ckpt:
        if resume:
            report = ckpt.restore()
            assert report is not None
            assert report.skipped.keys() <= {"rng"}
        for step in range(SAVED_AT if resume else 0, STEPS):
            if step == SAVED_AT and not resume:
                ckpt.save(step)
            _train(stage, optim, step)
            schedule.step()
    return whole_state(stage, optim)


def test_stages_are_restored_to_any_split(tmp_path: Path) -> None:
    uninterrupted: dict[str, str] = {}
    for of_stage in run_ranks(3, train_stages, tmp_path, False):
        assert not of_stage.keys() & uninterrupted.keys()
        uninterrupted |= of_stage
    assert len(open_checkpoint(tmp_path).manifest.files) == 3
    # On the most ranks one has no layer.
    for world in (1, 2, 3, 4, 7):
        resumed: dict[str, str] = {}
        for of_stage in run_ranks(world, train_stages, tmp_path, True):
            resumed |= of_stage
        assert resumed == uninterrupted


def restore_joined(rank: int, root: Path) -> str:
    """Restores stages with different settings into one optimizer's group."""
    stage, optim = _stage(rank, 1, lr_of_rank=False)
    with checkpointer(root, {"model": stage, "optim": optim}) as ckpt:
        with pytest.raises(MismatchError) as caught:
            ckpt.restore()
        report = ckpt.restore(strict=False)
    assert report is not None
    assert optim.param_groups[0]["lr"] == 0.1
    return str(caught.value)


def test_stages_with_settings_of_their_own_do_not_join(tmp_path: Path) -> None:
    run_ranks(2, train_stages, tmp_path, False, True)
    (message,) = run_ranks(1, restore_joined, tmp_path)
    assert "group 0 joins parameters that had different settings" in message


def missing_stage(rank: int, root: Path) -> str:
    """Restores with a rank's stage left out: what nobody takes is named."""
    stage, optim = _stage(rank, 3, lr_of_rank=False)
    with (
        checkpointer(root, {"model": stage, "optim": optim}) as ckpt,
        pytest.raises(MismatchError) as caught,
    ):
        ckpt.restore()
    return str(caught.value)


def test_layers_that_no_stage_takes_are_named(tmp_path: Path) -> None:
    run_ranks(3, train_stages, tmp_path, False)
    for message in run_ranks(2, missing_stage, tmp_path):
        assert "in the checkpoint but not in the state" in message
        assert "model.layers.4.0.weight" in message
        assert "model.layers.0.0.weight" not in message


# Data

SAMPLES, BATCH, MICRO_BATCH, EVERY = 120, 12, 2, 3


def _data(**place: Any) -> GlobalBatch:
    return GlobalBatch(list(range(SAMPLES)), BATCH, MICRO_BATCH, seed=5, collate_fn=list, **place)


def read_data(rank: int, root: Path, steps: int) -> tuple[int, list[list[int]]]:
    """Reads this rank's share of some steps from the last checkpoint on, and does not save all."""
    data = _data()
    weights = torch.zeros(3)
    with checkpointer(root, {"data": data, "v": {"w": weights}}, every=EVERY) as ckpt:
        report = ckpt.restore()
        begun = report.step if report else 0
        shares = []
        for step, batch in enumerate(data, start=begun):
            shares.append(batch)
            ckpt.step(step + 1)
            if len(shares) == steps:
                break
    data.close()
    return begun, shares


def test_data_goes_on_exactly_once_at_any_world_size(tmp_path: Path) -> None:
    committed: list[list[int]] = []
    for world, steps in ((2, 5), (3, 7), (1, 4), (6, 6), (4, 8)):
        runs = run_ranks(world, read_data, tmp_path, steps)
        (begun,) = {begun for begun, _ in runs}
        # Steps after the last checkpoint are done again.
        assert begun == len(committed) // EVERY * EVERY
        del committed[begun:]
        for step in range(steps):
            committed.append([sample for _, shares in runs for sample in shares[step]])
    assert len(committed) == 26
    alone = _data(rank=0, world_size=1)
    expected = iter(alone)
    assert committed == [next(expected) for _ in committed]
    epoch = SAMPLES // BATCH
    for start in (0, epoch):
        seen = [sample for step in committed[start : start + epoch] for sample in step]
        assert sorted(seen) == list(range(SAMPLES))
