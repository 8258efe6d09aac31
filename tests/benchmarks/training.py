"""The training that checkpoints are taken of: an MLP with fused AdamW, on one rank or several."""

import time
from typing import Any

import torch
import torch.distributed as dist
from backgrounds import Background
from states import same_bits
from timing import NotMeasured
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

WIDTH = 1024


class Training:
    """A small training whose step takes as long as is asked for.

    Args:
        kind: ``"one"`` process, or ``"ddp"`` or ``"fsdp2"`` over all ranks.
        nbytes: Size of parameters and AdamW state, about.
        compute_s: How long forward and backward should take; the batch is chosen to that end.
    """

    def __init__(self, kind: str, nbytes: int, compute_s: float) -> None:
        torch.manual_seed(0)
        layers = max(1, nbytes // (WIDTH * WIDTH * 4 * 3))
        model: nn.Module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
        if kind == "fsdp2":
            for layer in model.children():
                fully_shard(layer)
            fully_shard(model)
        elif kind == "ddp":
            model = DistributedDataParallel(model)
        self.model = model
        self.nbytes = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
        self.optim = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.batch = 0
        self.calibrate(compute_s)
        self.update()

    def calibrate(self, compute_s: float) -> float:
        """Chooses the batch; returns how long forward and backward now take."""
        self._set_batch(64)
        self.forward_backward()  # the first one is slower
        taken = 0.0
        for _ in range(6):
            # The shortest: other work on the machine must not make the batch smaller.
            taken = self._agreed(min(self.forward_backward() for _ in range(3)))
            if 0.95 <= taken / compute_s <= 1.2:
                break
            self._set_batch(max(1, round(self.batch * min(8.0, compute_s / taken) * 1.02)))
        return taken

    def forward_backward(self) -> float:
        """One of each; returns the seconds."""
        start = time.perf_counter()
        self.optim.zero_grad()
        self.model(self.x).square().mean().backward()
        return time.perf_counter() - start

    def update(self) -> None:
        """One step of the optimizer."""
        self.optim.step()

    def _set_batch(self, batch: int) -> None:
        self.batch = batch
        self.x = torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(1))

    def _agreed(self, seconds: float) -> float:
        """The same on all ranks."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return seconds
        value = torch.tensor([seconds])
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value.item()


def check_saved(background: Background, step: int) -> None:
    """Makes sure that a step holds the training state of now, bit for bit.

    Raises:
        NotMeasured: It does not.
    """
    expected = background.expected()
    stored = background.read(step)
    if set(stored) != set(expected):
        raise NotMeasured(f"{len(stored)} tensors were stored, not {len(expected)}")
    for name, value in expected.items():
        same_bits(whole(stored[name]), whole(value), name)


def whole(tensor: Any) -> torch.Tensor:
    """All of a tensor, on every rank; all of them must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
