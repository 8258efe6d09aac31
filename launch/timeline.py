"""Pictures of saves: what one rank did around one of them, and how they compare to a step.

matplotlib is an extra, and is imported where something is drawn.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from planaria.errors import ConfigError
from planaria.launch import picture
from planaria.launch.saves import Save

#: Row, what is drawn on it, and its colour, from top to bottom.
LANES: list[tuple[str, dict[str, tuple[str, str]]]] = [
    (
        "training",
        {
            "train.forward_backward": ("forward + backward", "#9ecae1"),
            "train.update": ("optimizer", "#3182bd"),
        },
    ),
    ("blocked", {"checkpoint.call": ("call", "#de2d26"), "checkpoint.gate": ("gate", "#fc9272")}),
    ("capture thread", {"checkpoint.capture": ("copy + checksum", "#74c476")}),
    (
        "write thread",
        {
            "checkpoint.persist": ("write + commit", "#bcbddc"),
            "checkpoint.fsync": ("fsync", "#756bb1"),
        },
    ),
]
_KINDS = {"stall_s": ("stall (call + gate)", "#de2d26"), "capture_s": ("capture", "#74c476"),
          "persist_s": ("persist", "#9e9ac8")}  # fmt: skip
_LEAST_S = 1e-5  # the axis is logarithmic


def draw_save(records: Sequence[Mapping[str, Any]], step: int, path: Path) -> None:
    """Draws what rank 0 did around the last save of a step.

    Raises:
        ConfigError: There is no such save, or the file cannot be written.
        NotSupportedError: matplotlib is not installed.
    """
    spans, origin = spans_around(records, step)
    figure = picture.figure(2.8)
    _draw_lanes(figure.subplots(), spans, origin)
    picture.save(figure, path)


def draw_run(
    records: Sequence[Mapping[str, Any]],
    saves: Sequence[Save],
    step_s: float | None,
    path: Path,
    step: int | None = None,
) -> None:
    """Draws one save in time, and stall, capture and persist of all of them against a step.

    Args:
        records: Telemetry of all ranks.
        saves: The run's saves.
        step_s: Duration of a step, where it is known.
        path: PNG to write.
        step: The save to draw; by default the one with the median stall.

    Raises:
        ConfigError: There is no such save, or the file cannot be written.
        NotSupportedError: matplotlib is not installed.
    """
    done = [s for s in saves if s.ok]
    if not done:
        raise ConfigError("no checkpoint was committed while telemetry was on: nothing to draw")
    if step is None:
        step = sorted(done, key=lambda s: s.stall_s)[len(done) // 2].step
    spans, origin = spans_around(records, step)
    figure = picture.figure(6.2)
    upper, lower = figure.subplots(2, 1, height_ratios=(1, 1.15))
    _draw_lanes(upper, spans, origin)
    upper.set_xlabel(f"milliseconds since the call of the save of step {step}, rank 0")
    width = 0.8 / len(_KINDS)
    for i, (part, (label, colour)) in enumerate(_KINDS.items()):
        places = [n + (i - 1) * width for n in range(len(done))]
        heights = [max(getattr(s, part), _LEAST_S) * 1e3 for s in done]
        lower.bar(places, heights, width, bottom=0, color=colour, label=label)
    if step_s is not None:
        lower.axhline(step_s * 1e3, color="#3182bd", linewidth=1.2, label="a step (median)")
    lower.set_yscale("log")
    least = min(max(getattr(s, part), _LEAST_S) for s in done for part in _KINDS)
    lower.set_ylim(bottom=10 ** math.floor(math.log10(least * 1e3)))
    shown = range(0, len(done), max(1, len(done) // 20))
    lower.set_xticks(list(shown), [str(done[n].step) for n in shown])
    lower.set_xlabel("step that was saved; the rank that took longest")
    lower.set_ylabel("milliseconds")
    lower.spines[["top", "right"]].set_visible(False)
    lower.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    picture.save(figure, path)


def spans_around(
    records: Sequence[Mapping[str, Any]], step: int
) -> tuple[list[Mapping[str, Any]], float]:
    """Rank 0's spans from one step before the last save of a step to one step after its commit.

    Raises:
        ConfigError: There is no such save, or it was not ended.
    """
    mine = [r for r in records if r.get("kind") == "span" and r.get("rank") == 0]

    def last(name: str) -> Mapping[str, Any]:
        found = [r for r in mine if r["name"] == name and r.get("step") == step]
        if not found:
            raise ConfigError(f"telemetry knows of no save of step {step} that came to its end")
        return found[-1]

    call, done = last("checkpoint.call"), last("checkpoint.persist")
    update = [r for r in mine if r["name"] == "train.update"]
    margin = 0.05 + 0.2 * (done["t"] + done["dur"] - call["t"])
    start = max((r["t"] for r in update if r["t"] < call["t"]), default=call["t"] - margin) - 0.05
    end = max(done["t"] + done["dur"], call["t"]) + 0.1
    end = min((r["t"] + r["dur"] for r in update if r["t"] > end), default=end)
    return [r for r in mine if r["t"] + r["dur"] > start and r["t"] < end], call["t"]


def _draw_lanes(axes: Any, spans: Sequence[Mapping[str, Any]], origin: float) -> None:
    """One bar a span, one row a thread."""
    labels: dict[str, Any] = {}
    for row, (_, kinds) in enumerate(LANES):
        for span in spans:
            if span["name"] in kinds:
                label, colour = kinds[span["name"]]
                left, width = (span["t"] - origin) * 1e3, max(span["dur"] * 1e3, 0.8)
                bar = axes.barh(-row, width, left=left, height=0.62, color=colour,
                                edgecolor="white", linewidth=0.5)  # fmt: skip
                labels.setdefault(label, bar)
    axes.set_xlim((min(s["t"] for s in spans) - origin) * 1e3, None)
    axes.set_yticks([-i for i in range(len(LANES))], [name for name, _ in LANES])
    axes.set_xlabel("milliseconds since the call of save")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        labels.values(),
        labels,
        ncols=4,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        frameon=False,
    )
