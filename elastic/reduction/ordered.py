"""Numbers that are agreed on and logged, summed in an order that no rank has a say in.

Weights and metrics are summed over micro-batches, from the first to the last; the squared norm of
the gradient over blocks, likewise. Each number is computed by one rank and sent to all.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from planaria.core.deadline import Deadline
from planaria.elastic.reduction.transport import Transport
from planaria.errors import ConfigError

if TYPE_CHECKING:
    import torch

#: Tags of exchanges of numbers; buckets count from 0.
NUMBERS_TAG = 1 << 30
NORMS_TAG = NUMBERS_TAG + 1


def share(
    transport: Transport,
    mine: "torch.Tensor",
    sizes: Sequence[int],
    deadline: Deadline,
    *,
    tag: int = NUMBERS_TAG,
    started: Callable[[], object] | None = None,
) -> "list[torch.Tensor]":
    """Every rank's numbers, in rank order, on every rank.

    Args:
        transport: The ranks.
        mine: This rank's numbers, flat.
        sizes: How many each rank has.
        deadline: Until when they must be there.
        tag: As for :meth:`Transport.exchange`.
        started: Called when the numbers are on their way.

    Raises:
        CollectiveError: A rank is gone.
        DeadlineError: A rank sent nothing in time.
    """
    import torch

    rank, size = transport.rank, transport.size
    if mine.numel() != sizes[rank]:
        raise ConfigError(f"rank {rank} has {mine.numel()} numbers, where {sizes[rank]} are due")
    mine = mine.contiguous()
    found = [mine if r == rank else torch.empty(sizes[r], dtype=mine.dtype) for r in range(size)]
    wait = transport.exchange(
        tag,
        [[mine] if r != rank else [] for r in range(size)],
        [[found[r]] if r != rank else [] for r in range(size)],
    )
    if started is not None:
        started()
    wait(deadline)
    return found


def ordered_sum(values: Iterable[float]) -> float:
    """The sum from the first to the last, in float64."""
    total = 0.0
    for value in values:
        total += value
    return total


def weighted_mean(weights: Sequence[float], values: Sequence[float]) -> float:
    """The mean of one value a micro-batch, in their order; 0 where all weights are 0."""
    total = ordered_sum(weights)
    summed = ordered_sum(w * v for w, v in zip(weights, values, strict=True))
    return summed / total if total else 0.0


def squared_norm(tensor: "torch.Tensor") -> float:
    """The squared 2-norm of one block, in float64: a function of its values and their number."""
    import torch

    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def global_norm(
    transport: Transport, mine: Sequence[float], owners: Sequence[int], deadline: Deadline
) -> float:
    """The 2-norm over all blocks, from the squared norms that their owners have computed.

    Args:
        transport: The ranks.
        mine: Squared norms of this rank's blocks, in block order.
        owners: The rank of each block of all.
        deadline: Until when they must be there.

    Raises:
        CollectiveError: A rank is gone.
        DeadlineError: A rank sent nothing in time.
    """
    import torch

    sizes = [0] * transport.size
    for owner in owners:
        sizes[owner] += 1
    told = torch.tensor(list(mine), dtype=torch.float64)
    found = [iter(t.tolist()) for t in share(transport, told, sizes, deadline, tag=NORMS_TAG)]
    return ordered_sum(next(found[owner]) for owner in owners) ** 0.5


def clip_coefficient(norm: float, most: float) -> float:
    """What gradients are multiplied with, as `torch.nn.utils.clip_grad_norm_` does."""
    return min(1.0, most / (norm + 1e-6))
