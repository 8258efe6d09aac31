"""Sharded state that is laid out as at the last save is recognised on every rank."""

from pathlib import Path
from typing import Any

import torch
from checkpoints import bits
from ranks import run_ranks
from torch import nn, optim
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from planaria.checkpoint import Checkpointer, open_checkpoint
from planaria.checkpoint.state.recall import Recalled


def saves(rank: int, path: str) -> list[Any]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    for part in model.children():
        fully_shard(part)
    fully_shard(model)
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    found: list[Any] = []
    with Checkpointer(path, {"model": model, "optim": optimizer}, audit=True) as ckpt:
        for step in (1, 2, 3, 4):
            model(torch.randn(4, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 4:  # evaluated: whole parameters are left behind, which a save puts back
                model.eval()
                model(torch.randn(4, 6))
                model.train()
            found.append(isinstance(ckpt._job.options.state.collect().tensors, Recalled))
            handle = ckpt.save(step)
            handle.wait_committed()
            weight = dict(model.named_parameters())["0.weight"]
            slot = optimizer.state[weight]["exp_avg"]
            assert isinstance(weight, DTensor)
            assert isinstance(slot, DTensor)
            found += [bits(weight.full_tensor()), bits(slot.full_tensor())]
    return found


def test_sharded_state_is_recognised(tmp_path: Path) -> None:
    for rank, found in enumerate(run_ranks(2, saves, str(tmp_path))):
        for step in (1, 2, 3, 4):
            known, weight, slot = found[3 * step - 3 : 3 * step]
            # The first step of the optimizer has made its slots since the first look.
            assert known == (step > 1), (rank, step)
            stored = open_checkpoint(tmp_path, step)
            assert bits(stored.read("model.0.weight")) == weight
            assert bits(stored.read("optim.0.weight.exp_avg")) == slot
            assert not stored.verify()
