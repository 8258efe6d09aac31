"""The timeline of a drill as a picture. matplotlib is an extra, and imported where it is used."""

from pathlib import Path
from typing import Any

from planaria.elastic.faults.report import Report
from planaria.errors import ConfigError, NotSupportedError

_COLOURS = {"fault": "#de2d26", "heal": "#31a354", "missed": "#fd8d3c", "start": "#636363"}


def draw(report: Report, path: Path) -> None:
    """Draws the steps that each rank recorded, when it lived, and the faults.

    Raises:
        ConfigError: Nothing was recorded, or the file cannot be written.
        NotSupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NotSupportedError(
            "drawing needs matplotlib, which is not installed: pip install 'planaria[bench]'"
        ) from error
    ranks = sorted(
        {s.rank for s in report.trajectory.records}
        | {e.rank for e in report.events if e.rank is not None}
    )
    if not ranks:
        raise ConfigError("no rank was seen in this drill: nothing to draw")
    figure = Figure(figsize=(10, 3.4 + 0.25 * len(ranks)), layout="tight")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.3))
    _steps(upper, report)
    _lives(lower, report, ranks)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def _steps(axes: Any, report: Report) -> None:
    """Steps over time: a pause is a flat piece, a step taken again falls back."""
    records = report.trajectory.records
    axes.plot(
        [s.time - report.began for s in records], [s.step for s in records],
        drawstyle="steps-post", color="#3182bd", linewidth=1.2,
    )  # fmt: skip
    axes.set_ylabel("step")
    _faults(axes, report)
    axes.spines[["top", "right"]].set_visible(False)


def _lives(axes: Any, report: Report, ranks: list[int]) -> None:
    rows = {rank: -i for i, rank in enumerate(ranks)}
    born: dict[int, float] = {}
    for event in report.events:
        if event.rank is None:
            continue
        if event.what == "born":
            born[event.rank] = event.t
        elif event.what == "died":
            left = born.pop(event.rank, 0.0)
            axes.barh(rows[event.rank], event.t - left, left=left, height=0.6, color="#9ecae1")
    for rank, left in born.items():
        axes.barh(rows[rank], report.seconds - left, left=left, height=0.6, color="#9ecae1")
    for step in report.trajectory.records:
        axes.plot([step.time - report.began], [rows[step.rank]], "|", color="#08519c", markersize=7)
    _faults(axes, report)
    axes.set_yticks(list(rows.values()), [f"rank {rank}" for rank in ranks])
    axes.set_xlabel("seconds since the drill began")
    axes.spines[["top", "right"]].set_visible(False)


def _faults(axes: Any, report: Report) -> None:
    for event in report.events:
        if event.what in _COLOURS:
            axes.axvline(event.t, color=_COLOURS[event.what], linewidth=1, linestyle="--")
