"""Draws what one rank did around one save, from the telemetry of a run.

Run: ``python tests/benchmarks/plot_timeline.py RUN_FOLDER STEP docs/timeline.png``.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from planaria import telemetry

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


def spans_around(records: list[dict[str, Any]], step: int) -> tuple[list[dict[str, Any]], float]:
    """Rank 0's spans from one step before a save to one step after its commit."""
    mine = [r for r in records if r["kind"] == "span" and r["rank"] == 0]
    call = next(r for r in mine if r["name"] == "checkpoint.call" and r["step"] == step)
    done = next(r for r in mine if r["name"] == "checkpoint.persist" and r["step"] == step)
    update = [r for r in mine if r["name"] == "train.update"]
    start = max(r["t"] for r in update if r["t"] < call["t"]) - 0.05
    end = max(done["t"] + done["dur"], call["t"]) + 0.1
    end = min((r["t"] + r["dur"] for r in update if r["t"] > end), default=end)
    return [r for r in mine if r["t"] + r["dur"] > start and r["t"] < end], call["t"]


def draw(spans: list[dict[str, Any]], origin: float, path: Path) -> None:
    """One bar a span, one row a thread."""
    figure, axes = plt.subplots(figsize=(10, 2.8))
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
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws one save")
    parser.add_argument("run", type=Path)
    parser.add_argument("step", type=int)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    spans, origin = spans_around(list(telemetry.read(args.run / "telemetry")), args.step)
    draw(spans, origin, args.out)


if __name__ == "__main__":
    main()
