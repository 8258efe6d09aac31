"""What losses cost at sizes that were not run: a model of measured parts, labelled simulated.

The pause after a loss is a part that all sizes have (to see the loss, to agree, to repeat a step)
and one that grows with the connections that a rank makes anew: to all others, as now, or to as many
as a tree of the ranks is deep. The ranks that were measured share a few cores; those of the model
have one each. torchft and a restart are taken as if they did not grow, which favours them.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    return line([world * (world - 1) / min(cores, world) for world in worlds], pauses)


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """A straight line by least squares: its value at 0 and its slope, neither below 0."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    var = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
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


@dataclass(frozen=True)
class Regrouping:
    """What a session's regrouping is made of, measured.

    Attributes:
        fixed_s: To know of the loss, to be out of what was under way, and the first step.
        member_s: What each member adds to the agreement, which one coordinator makes.
        connection_s: What each connection that a rank makes anew adds.
    """

    fixed_s: float
    member_s: float
    connection_s: float


def parts_of(measured: Mapping[int, Sequence[float]], cores: int) -> Regrouping:
    """Takes measured times apart, by straight lines over the members and over the connections.

    Args:
        measured: Number of ranks -> seconds from a kill until it is known, until all are out of
            their collectives, until the generation is decided, until its group is made, until the
            first step is done.
        cores: What the ranks share.
    """
    worlds = list(measured)
    decided = [measured[n][2] - measured[n][1] for n in worlds]
    # All members' messages are read by one process, which has a core at most.
    agreed, member_s = line([float(n) for n in worlds], decided)
    built, connection_s = fit(worlds, [measured[n][3] - measured[n][2] for n in worlds], cores)
    rest = [measured[n][1] + measured[n][4] - measured[n][3] for n in worlds]
    return Regrouping(min(rest) + agreed + built, member_s, connection_s)


def regrouping(parts: Regrouping, ranks: Iterable[int]) -> list[dict[str, Any]]:
    """The pause of one loss and the share of the time that losses cost, by number of ranks."""
    ways: dict[str, Callable[[int], float]] = {
        "one coordinator, each rank to all others": lambda n: (
            parts.fixed_s + parts.member_s * n + parts.connection_s * (n - 1)
        ),
        "members in a tree, each rank to log2(ranks) (not built)": lambda n: (
            parts.fixed_s + (parts.member_s + parts.connection_s) * math.log2(n)
        ),
    }
    rows: list[dict[str, Any]] = []
    for count in ranks:
        between_s = RANK_MTBF_H * 3600 / count
        for way, pause in ways.items():
            seconds = pause(count)
            rows.append({
                "ranks": count, "way": way, "pause s": seconds, "a loss every s": between_s,
                "time lost": f"{seconds / (seconds + between_s):.3%}",
            })  # fmt: skip
    return rows
