"""fp8 with scales of sharded trainers: the bits and scales that the whole module would have."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from planaria.rl_sync import Publisher, Subscriber
from planaria.rl_sync.adapters import scaled
from planaria.rl_sync.adapters.scaled import ScaledCopy


def trainer() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 22), nn.LayerNorm(22), nn.Linear(22, 6, bias=False))
    with torch.no_grad():
        model.get_parameter("0.weight")[3, 4] = float("nan")
        model.get_parameter("0.weight")[20, 9] = float("inf")
    return model


def step(model: nn.Module, version: int) -> None:
    """The same step on a whole module and on a sharded one."""
    torch.manual_seed(version)
    factors = {name: 1 + 0.3 * torch.randn(p.shape) for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if isinstance(p, DTensor):
                box, local = scaled.locate(name, p)
                local.mul_(factors[name][box.slices()])
            else:
                p.mul_(factors[name])


def sharded(kind: str) -> Any:
    model = trainer()
    if kind == "fsdp+tp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
        return fully_shard(model, mesh=mesh["dp"])
    return fully_shard(model)


def follow(rank: int, kind: str, block: tuple[int, int] | None, agree: bool) -> bool:
    if not agree:
        ScaledCopy._agree = lambda *_: None  # type: ignore[method-assign]
    whole, model = trainer(), sharded(kind)
    copy = ScaledCopy(model, block=block)
    there = {k: torch.zeros_like(v) for k, v in ScaledCopy(whole, block=block).state_dict().items()}
    subscriber: Any = None
    equal = True
    with Publisher(copy, "tcp://127.0.0.1:0", block_elements=60, timeout=40) as publisher:
        if rank == 0:
            subscriber = Subscriber(there, publisher.url, timeout=40)
        for version in range(3):
            step(whole, version)
            step(model, version)
            copy.refresh()
            publisher.publish(version)
            if rank == 0:
                subscriber.update(at_least=version)
                wanted = ScaledCopy(whole, block=block).state_dict()
                assert wanted.keys() == there.keys()
                equal = equal and all(
                    torch.equal(
                        wanted[k].reshape(-1).view(torch.uint8),
                        there[k].reshape(-1).view(torch.uint8),
                    )
                    for k in wanted
                )
        if subscriber is not None:
            subscriber.close()
    return equal


@pytest.mark.parametrize(
    ("kind", "world", "block"),
    [("fsdp", 2, (4, 4)), ("fsdp", 3, None), ("fsdp+tp", 4, (4, 4))],
    ids=str,
)
def test_sharded_trainers(kind: str, world: int, block: tuple[int, int] | None) -> None:
    assert run_ranks(world, follow, kind, block, True, timeout=90)[0]


def test_ranks_that_do_not_agree_on_scales_are_noticed() -> None:
    """Sabotage: each rank goes by its own weights alone."""
    assert not run_ranks(2, follow, "fsdp", (4, 4), False, timeout=90)[0]
