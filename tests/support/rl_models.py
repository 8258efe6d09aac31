"""Small trainers and rollouts for the tests of weight sync."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from planaria.rl_sync import Publisher, Subscriber


class Tied(nn.Module):
    """An embedding that is the output layer, too, and a block between them."""

    def __init__(self, width: int = 32, vocabulary: int = 61) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        return self.head(self.norm(x + self.mlp(x)))


def trainer(seed: int = 0) -> Tied:
    torch.manual_seed(seed)
    return Tied()


def rollout(like: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model of the same kind, with weights that have nothing to do with it."""
    made = copy.deepcopy(like)
    with torch.no_grad():
        for p in (*made.parameters(), *made.buffers()):
            p.fill_(0.5)
    return made.to(dtype)


def nudge(model: nn.Module, seed: int, size: float = 1e-3, share: float = 0.3) -> None:
    """Changes some of the weights, as an optimizer would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            step = torch.randn(p.shape, generator=generator) * size
            p += step * (torch.rand(p.shape, generator=generator) < share)


def bits(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> dict[str, bytes]:
    """All tensors of a model, cast, as bytes."""
    state = model.state_dict()
    return {
        k: v.to(dtype).contiguous().view(torch.uint8).numpy().tobytes() for k, v in state.items()
    }


def holds(model: nn.Module, wanted: dict[str, bytes]) -> bool:
    """Whether a model has these bits. With CI set pytest would show for minutes how it differs."""
    return bits(model) == wanted


def same(a: nn.Module, b: nn.Module, dtype: torch.dtype = torch.bfloat16) -> bool:
    return bits(a, dtype) == bits(b, dtype)


@contextmanager
def pair(
    model: nn.Module,
    *,
    receivers: int = 1,
    url: str = "tcp://127.0.0.1:0",
    dtype: Any = torch.bfloat16,
    subscriber: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[tuple[Publisher, list[Subscriber], list[nn.Module]]]:  # fmt: skip
    """A publisher with some subscribers, each with a rollout of its own."""
    with ExitStack() as stack:
        options = {"block_elements": 1500, "timeout": 60.0} | options
        publisher = stack.enter_context(Publisher(model, url, dtype=dtype, **options))
        models = [rollout(model, dtype or torch.float32) for _ in range(receivers)]
        more: dict[str, Any] = {"timeout": 60.0} | (subscriber or {})
        subscribers = [
            stack.enter_context(Subscriber(m, publisher.url, worker=f"w{i}", **more))
            for i, m in enumerate(models)
        ]
        yield publisher, subscribers, models


def each_version(
    model: nn.Module, publisher: Publisher, versions: int, then: Callable[[int], object]
) -> None:
    """Publishes some versions with steps between them, and does something after each."""
    for version in range(versions):
        if version:
            nudge(model, version)
        publisher.publish(version)
        then(version)
