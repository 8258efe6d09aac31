"""The state of the golden checkpoints: the same on every machine, for it is made by formula."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

FOLDER = Path(__file__).parent.parent / "golden"

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


def values(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers that follow from a name; exact in every dtype."""
    count = torch.Size(shape).numel()
    start = sum(name.encode()) % 13
    return ((torch.arange(count) + start) % 16 - 4).to(dtype).reshape(shape)


class Tied(nn.Module):
    """Two layers, of which the last shares its weight with the first, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight


def make_state(filled: bool) -> dict[str, Any]:
    """A model, an optimizer with state, a scheduler, and a tree with every usual dtype.

    Args:
        filled: With the golden values; else with others, to be restored over.
    """
    model = Tied()
    optim = torch.optim.AdamW(model.parameters(), lr=0.25)
    sched = torch.optim.lr_scheduler.StepLR(optim, 3, gamma=0.5)
    zoo = {str(d).removeprefix("torch."): torch.zeros(3, 5, dtype=d) for d in DTYPES}
    nan = torch.zeros(4)
    state: dict[str, Any] = {
        "model": model,
        "optim": optim,
        "sched": sched,
        "zoo": zoo,
        "extra": {"nan": nan, "empty": torch.zeros(0, 3), "scalar": torch.tensor(0)},
        "note": {"text": "", "numbers": []},
    }
    if not filled:
        return state
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(values(name, *tensor.shape, dtype=tensor.dtype))
        for name, parameter in model.named_parameters():
            optim.state[parameter] = {
                "step": torch.tensor(7.0),
                "exp_avg": values(f"{name}.exp_avg", *parameter.shape),
                "exp_avg_sq": values(f"{name}.exp_avg_sq", *parameter.shape).abs(),
            }
        for name, tensor in zoo.items():
            tensor.copy_(values(name, 3, 5, dtype=tensor.dtype))
        nan[2] = torch.nan
        state["extra"]["scalar"].fill_(42)
    optim.param_groups[0]["lr"] = 0.125
    sched.last_epoch = 3
    state["note"] = {"text": "grün", "numbers": [1, 2.5, float("inf"), (3, None)]}
    return state
