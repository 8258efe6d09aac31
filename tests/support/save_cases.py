"""A small training whose saves are watched."""

from typing import Any

import torch
from checkpoints import (
    contents,
    load_once,
    randomise,
)
from torch import nn, optim

BATCH = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def start(seed: int = 1) -> dict[str, Any]:
    model = randomise(nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)), seed)
    return {"model": model, "optim": optim.AdamW(model.parameters(), lr=0.1)}


def train_step(state: dict[str, Any]) -> None:
    state["optim"].zero_grad()
    state["model"](BATCH).square().sum().backward()
    state["optim"].step()


def everything(state: dict[str, Any]) -> dict[str, Any]:
    return {key: contents(value) for key, value in state.items()}


def stored(path: Any, step: int) -> dict[str, Any]:
    state = start(9)
    train_step(state)
    load_once(path, state, step=step)
    return everything(state)
