"""The vote on a step: what each rank says when it is prepared, and what all then know.

A rank sends its ballot when it has all that it needs to apply the step, whatever happens to the
others. So whoever has all ballots knows that every rank is prepared: the step is committed. What
follows from the ballots is the same on all ranks, and can be handed on to one that lacks some.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.elastic.membership.view import View
from planaria.elastic.reduction.ordered import ordered_sum, share, weighted_mean
from planaria.elastic.reduction.transport import Transport

if TYPE_CHECKING:
    import torch

VOTING = points.declare("elastic.session.voting", "this rank's vote is on its way to the others")

#: Tags of the vote's exchanges; gradients' buckets count from 0.
VOTE_TAG = (1 << 30) + 16
#: Bytes of text that a ballot has room for; where one has more, the rest follows.
TEXT_BYTES = 2048


@dataclass(frozen=True)
class Ballot:
    """What one rank says.

    Attributes:
        rows: Of each of its micro-batches: index, weight, metrics by name.
        touched: Which parameters its micro-batches had a gradient for: their places in the model.
        norms: Squared norms of the sum of gradients over its own blocks, in block order.
        change: Why it wants the members to change at this boundary: "join", "leave", or None.
        stop: Whether it wants the run to end at this boundary.
        grace: Seconds until it has to be gone, None where it may stay.
    """

    rows: list[tuple[int, float, dict[str, float]]]
    touched: list[int]
    norms: list[float] = field(default_factory=list)
    change: str | None = None
    stop: bool = False
    grace: float | None = None


@dataclass(frozen=True)
class Decision:
    """What follows from all ballots: the same on all ranks.

    Attributes:
        step: Number of the step that is committed.
        generation: The generation that voted.
        members: Its members.
        weight: Sum of the weights of all micro-batches.
        norm: 2-norm of the sum of gradients, neither divided nor clipped.
        touched: Which parameters any micro-batch had a gradient for.
        metrics: Means over the micro-batches that recorded them, weighted, in their order.
        changes: For each rank, in rank order, what it wants to change.
        stop: Whether any rank wants to stop.
        graces: For each rank the seconds until it has to be gone, or None.
        micro_batches: For each rank the micro-batches that it computed.
    """

    step: int
    generation: int
    members: list[int]
    weight: float
    norm: float
    touched: list[int]
    metrics: dict[str, float]
    changes: list[str | None]
    stop: bool
    graces: list[float | None]
    micro_batches: list[list[int]]

    def to_json(self) -> dict[str, Any]:
        """As JSON data; numbers keep all their bits."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Decision":
        """The reverse of :meth:`to_json`."""
        return cls(**data)


def decide(step: int, view: View, ballots: Sequence[Ballot], owners: Sequence[int]) -> Decision:
    """What all ballots say together: a pure function, whoever computed what.

    Args:
        step: Number of the step.
        view: The members that voted.
        ballots: One for each rank, in rank order.
        owners: The rank of each block.
    """
    rows = sorted((row for ballot in ballots for row in ballot.rows), key=lambda row: row[0])
    weights = [weight for _, weight, _ in rows]
    norms = [iter(ballot.norms) for ballot in ballots]
    metrics: dict[str, float] = {}
    for name in dict.fromkeys(name for _, _, values in rows for name in values):
        found = [(weight, values[name]) for _, weight, values in rows if name in values]
        metrics[name] = weighted_mean([w for w, _ in found], [v for _, v in found])
    return Decision(
        step=step,
        generation=view.generation,
        members=list(view.members),
        weight=ordered_sum(weights),
        norm=ordered_sum(next(norms[owner]) for owner in owners) ** 0.5,
        touched=sorted({place for ballot in ballots for place in ballot.touched}),
        metrics=metrics,
        changes=[ballot.change for ballot in ballots],
        stop=any(ballot.stop for ballot in ballots),
        graces=[ballot.grace for ballot in ballots],
        micro_batches=[[row[0] for row in ballot.rows] for ballot in ballots],
    )


def exchange_ballots(
    transport: Transport, mine: Ballot, owners: Sequence[int], deadline: Deadline
) -> list[Ballot]:
    """Tells all ranks this one's ballot, and returns everybody's, in rank order.

    Raises:
        CollectiveError: A rank is gone.
        DeadlineError: A rank sent nothing in time.
    """
    text = _text(mine)
    counts = [0] * transport.size
    for owner in owners:
        counts[owner] += 1
    found = share(
        transport,
        _pack(text, mine.norms),
        [TEXT_BYTES + 8 * (1 + count) for count in counts],
        deadline,
        tag=VOTE_TAG,
        started=lambda: points.point(VOTING),
    )
    heads = [_unpack(buffer) for buffer in found]
    lengths = [length for length, _, _ in heads]
    rests = [b""] * transport.size
    if any(length > TEXT_BYTES for length in lengths):
        more = share(
            transport,
            _bytes(text[TEXT_BYTES:]),
            [max(0, length - TEXT_BYTES) for length in lengths],
            deadline,
            tag=VOTE_TAG + 1,
        )
        rests = [rest.numpy().tobytes() for rest in more]
    return [
        _ballot(head + rest, norms) for (_, head, norms), rest in zip(heads, rests, strict=True)
    ]


def _text(ballot: Ballot) -> bytes:
    """All but the norms, which are many."""
    said = [ballot.rows, ballot.touched, ballot.change, ballot.stop, ballot.grace]
    return json.dumps(said, separators=(",", ":")).encode()


def _ballot(text: bytes, norms: list[float]) -> Ballot:
    rows, touched, change, stop, grace = json.loads(text)
    return Ballot([(i, w, values) for i, w, values in rows], touched, norms, change, stop, grace)


def _pack(text: bytes, norms: list[float]) -> "torch.Tensor":
    import torch

    numbers = torch.tensor([len(text), *norms], dtype=torch.float64)
    return torch.cat([_bytes(text[:TEXT_BYTES].ljust(TEXT_BYTES)), numbers.view(torch.uint8)])


def _unpack(buffer: "torch.Tensor") -> tuple[int, bytes, list[float]]:
    import torch

    length, *norms = buffer[TEXT_BYTES:].clone().view(torch.float64).tolist()
    head = buffer[: min(int(length), TEXT_BYTES)].numpy().tobytes()
    return int(length), head, norms


def _bytes(data: bytes) -> "torch.Tensor":
    import torch

    return torch.tensor(list(data), dtype=torch.uint8)
