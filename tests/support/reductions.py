"""Small models, and their gradients by a `GradientReducer`, for tests of any number of ranks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from planaria.core.deadline import Deadline
from planaria.elastic.partition.blocks import cut, shapes_of
from planaria.elastic.partition.optimizer import ShardedOptimizer, segments
from planaria.elastic.partition.owners import spread
from planaria.elastic.reduction.assignment import Assignment, assign
from planaria.elastic.reduction.buckets import Segment
from planaria.elastic.reduction.reducer import GradientReducer
from planaria.elastic.reduction.transport import Alone, GroupTransport, Transport, own_group
from planaria.elastic.rng import micro_batch_rng
from planaria.errors import CollectiveError

MICRO_BATCHES = 7
BUDGET_S = 20.0


class Net(nn.Module):
    """Tied weights, dropout, a parameter that only some micro-batches use, one that none does."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embed = nn.Embedding(13, 8)
        self.hidden = nn.Linear(8, 8)
        self.rare = nn.Linear(8, 8)
        self.never = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.head = nn.Linear(8, 13)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.to(dtype)

    def forward(self, tokens: torch.Tensor, rare: bool) -> torch.Tensor:
        x = nn.functional.dropout(torch.tanh(self.hidden(self.embed(tokens))), 0.3)
        x = torch.tanh(self.rare(x)) if rare else x
        return nn.functional.cross_entropy(self.head(x).float(), tokens.roll(1))


def tokens_of(step: int, index: int) -> torch.Tensor:
    """A micro-batch: of a length that differs."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    return torch.randint(0, 13, (3 + index % 3,), generator=generator)


def transport_here(prefix: str = "test") -> Transport:
    """A transport over all ranks of the default group; of one rank where there is none."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Alone()
    store = dist.PrefixStore(prefix, dist.distributed_c10d._get_default_store())
    return GroupTransport(own_group(store, dist.get_rank(), dist.get_world_size(), BUDGET_S))


def one_step(
    reducer: GradientReducer,
    model: Net,
    step: int,
    *,
    weights: Callable[[int], float] = lambda i: 1.0,
    rng: Callable[[int, int, int], Any] = micro_batch_rng,
) -> Any:
    """Forward and backward of this rank's micro-batches; returns what came of the sum."""
    reducer.begin(Deadline(BUDGET_S))
    for index in reducer.order:
        with reducer.micro_batch(index, weights(index)), rng(5, step, index):
            loss = model(tokens_of(step, index), rare=index == 4)
            (loss * weights(index)).backward()
        reducer.record([loss.item()])
    return reducer.finish()


def gradients(
    transport: Transport,
    *,
    dtype: torch.dtype = torch.float32,
    assignment: Assignment | None = None,
    group: int = 1,
    owned: Sequence[Segment] | None = None,
    steps: int = 2,
    weights: Callable[[int], float] = lambda i: 1.0,
    rng: Callable[[int, int, int], Any] = micro_batch_rng,
    **options: Any,
) -> list[Any]:
    """What `steps` steps give: bytes of all segments, weight, mean loss, parameters touched."""
    model = Net(dtype)
    parameters = dict(model.named_parameters())
    leaves = -(-MICRO_BATCHES // group)
    reducer = GradientReducer(
        parameters,
        MICRO_BATCHES,
        assignment or assign(leaves, transport.size),
        transport,
        group=group,
        segments=owned,
        columns=1,
        bucket_bytes=300,
        **options,
    )
    found: list[Any] = []
    try:
        for step in range(steps):
            reduced = one_step(reducer, model, step, weights=weights, rng=rng)
            found.append([
                {(s.name, s.start): t.numpy().tobytes() for s, t in reduced.segments.items()},
                reduced.weight,
                reduced.mean(0),
                sorted(reduced.touched),
            ])  # fmt: skip
    finally:
        reducer.close()
    return found


def sharded_run(transport: Transport, steps: int = 2) -> Any:
    """Trains with an optimizer over blocks; returns the parameters' bytes and the norms."""
    model = Net(torch.bfloat16)
    parameters = dict(model.named_parameters())
    base = torch.optim.AdamW([p for p in parameters.values() if p.requires_grad], lr=0.05)
    partition = spread(cut(shapes_of(parameters), numel=24), range(transport.size))
    optimizer = ShardedOptimizer(parameters, base, partition, transport)
    reducer = GradientReducer(
        parameters,
        MICRO_BATCHES,
        assign(MICRO_BATCHES, transport.size),
        transport,
        segments=segments(partition),
        columns=1,
        bucket_bytes=300,
    )
    norms, before = [], {}
    try:
        for step in range(steps):
            before = {n: p.detach().clone() for n, p in parameters.items()}
            reduced = one_step(reducer, model, step)
            norms.append(optimizer.step(reduced, Deadline(BUDGET_S), clip_grad_norm=0.5).norm)
    except CollectiveError:
        # Nothing of the step that failed has reached the model.
        assert all(torch.equal(before[n], p) for n, p in parameters.items())
        raise
    finally:
        reducer.close()
    return {n: p.detach().float().numpy().tobytes() for n, p in parameters.items()}, norms
