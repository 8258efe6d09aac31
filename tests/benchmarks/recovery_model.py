"""What losses cost at sizes that were not run: a model of measured parts, labelled simulated.

The pause after a loss is a part that all sizes have (to see the loss, to agree, to repeat a step)
and one that grows with the connections that a rank makes anew: to all others, as now, or to as many
as a tree of the ranks is deep. The ranks that were measured share a few cores; those of the model
have one each. torchft and a restart are taken as if they did not grow, which favours them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

#: 419 unexpected interruptions of 16,384 GPUs in 54 days (Llama 3's training, arXiv 2407.21783).
RANK_MTBF_H = 54 * 24 * 16384 / 419


@dataclass(frozen=True)
class Parts:
    """What was measured.

    Attributes:
        fixed_s: The pause of a session without what grows with the ranks.
        connection_s: What each connection of a rank adds.
        peer_s: The pause of torchft, whose heartbeats decide it.
        restart_s: The pause of a restart of all processes, loading included.
    """

    fixed_s: float
    connection_s: float
    peer_s: float
    restart_s: float


def fit(worlds: Sequence[int], pauses: Sequence[float], cores: int) -> tuple[float, float]:
    """A pause as a straight line over the connections made by each core, by least squares.

    Args:
        worlds: Numbers of ranks.
        pauses: The pause of each.
        cores: What the ranks share.

    Returns:
        What it has without any, and what each adds; neither is below 0.
    """
    x = [world * (world - 1) / min(cores, world) for world in worlds]
    mean_x, mean_y = sum(x) / len(x), sum(pauses) / len(pauses)
    var = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, pauses, strict=True))
    slope = max(0.0, slope / var) if var else 0.0
    return max(0.0, mean_y - slope * mean_x), slope


def table(parts: Parts, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """The pause of one loss, and the share of the time that losses cost, by number of ranks."""
    ways: dict[str, Callable[[int], float]] = {
        "session, each rank to all others": lambda n: parts.fixed_s + parts.connection_s * (n - 1),
        "session, each rank to log2(ranks) (not built)": lambda n: (
            parts.fixed_s + parts.connection_s * math.log2(n)
        ),
        "torchft, its pause as at 4 ranks": lambda n: parts.peer_s,
        "restart and load, its pause as at 4 ranks": lambda n: parts.restart_s,
    }
    rows: list[dict[str, Any]] = []
    for count in ranks:
        between_s = RANK_MTBF_H * 3600 / count
        for name, pause in ways.items():
            seconds = pause(count)
            rows.append({
                "ranks": count,
                "way": name,
                "pause s": seconds,
                "a loss every s": between_s,
                "time lost": f"{seconds / (seconds + between_s):.3%}",
                "label": "simulated",
            })  # fmt: skip
    return rows
