"""A small state that is restored, and how it is seen to be untouched."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import (
    contents,
    data_files,
    flip,
    load_once,
    randomise,
    signed,
)
from torch import nn, optim

from planaria.checkpoint import Checkpointer


class Counter:
    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def make(seed: int) -> dict[str, Any]:
    """One part of every kind, with optimizer state."""
    model = randomise(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), seed)
    optimizer = optim.AdamW(model.parameters(), lr=0.1 * seed)
    model(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))).sum().backward()
    optimizer.step()
    return {
        "model": model,
        "optim": optimizer,
        "sched": optim.lr_scheduler.StepLR(optimizer, 2),
        "data": Counter(seed),
        "extra": {"t": torch.full((3,), float(seed)), "n": seed, "a": np.full(2, seed)},
    }


def everything(state: dict[str, Any]) -> dict[str, Any]:
    found = {k: contents(v) for k, v in state.items()}
    found["rng"] = contents([random.getstate(), np.random.get_state(), torch.get_rng_state()])
    return found


def refused(path: Any, state: dict[str, Any], kind: type[Exception], match: str, **options: Any):
    """Restoring raises this, and the state stays bit for bit what it was."""
    before = everything(state)
    with pytest.raises(kind, match=match) as caught:
        load_once(path, state, **options)
    assert everything(state) == before
    return str(caught.value)


def save_steps(path: Path, steps: list[int], first: int = 1) -> dict[int, Any]:
    """Commits steps with a state of their own each; returns what they hold."""
    found, state = {}, make(first)
    with Checkpointer(path, state, audit=True) as ckpt:
        ckpt.restore()
        for step in steps:
            randomise(state["model"], step)
            state["data"].value = step
            ckpt.save(step).wait_committed()
            found[step] = {k: contents(v) for k, v in state.items()}
    return found


def damage(path: Path, step: int, how: str) -> None:
    manifest = path / f"step-{step:08d}" / "manifest.json"
    if how == "data":
        flip(data_files(path, step)[0], -1)
    elif how == "missing":
        data_files(path, step)[0].unlink()
    elif how == "manifest":
        flip(manifest, 200)
    elif how == "objects":
        body = json.loads(manifest.read_bytes())["manifest"]
        body["objects"]["sched"] = {"all": {"$": "nonsense"}}
        manifest.write_bytes(signed(body))
    else:
        manifest.write_bytes(b"")
