"""``planaria trace``: the telemetry of a run as a Perfetto trace, a table and a picture."""

import json
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import typer

from planaria.errors import ConfigError
from planaria.launch import output
from planaria.launch.cli import places

if TYPE_CHECKING:
    from planaria.launch.saves import Save


def trace(
    path: str = typer.Argument(..., help="A run."),
    out: str | None = typer.Option(None, "--out", help="Trace to write [RUN/trace.json]."),
    png: str | None = typer.Option(None, "--png", help="Picture to draw; needs matplotlib."),
    ranks: str | None = typer.Option(
        None, "--ranks", help="Picture of an elastic session's ranks and loss; needs matplotlib."
    ),
    reference: str | None = typer.Option(
        None, "--reference", help="A run whose loss is drawn beside it."
    ),
    step: int | None = typer.Option(None, "--step", help="The save to draw in time."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> int:
    """Merge the telemetry of all ranks and attempts into one trace for ui.perfetto.dev.

    Prints for each checkpoint how long training was blocked, the state was copied, and the file was
    written, against the time of a step; --png draws the same. Ranks that an elastic session lost or
    gained are marked in the trace; --ranks draws them.
    """
    from planaria.launch import copies, elastic_events, goodput, metrics, saves, timeline
    from planaria.launch.elastic_picture import draw_session
    from planaria.launch.perfetto import chrome_trace

    folder = places.run_of(path)
    records = goodput.read_telemetry(folder)
    if not records:
        raise ConfigError(f"{folder.path} has no telemetry: it has not begun, or it was off")
    found = saves.saves_of(records)
    step_s = saves.step_seconds(goodput.steps_taken(folder, records))
    if png is not None:
        timeline.draw_run(records, found, step_s, Path(png), step)
    changes = elastic_events.read(folder.elastic)
    if ranks is not None:
        other = [] if reference is None else metrics.read(places.run_of(reference).metrics)
        draw_session(changes, metrics.read(folder.metrics), other, Path(ranks))
    made = chrome_trace(records, folder.read_status().attempts, changes)
    target = Path(out) if out is not None else folder.path / "trace.json"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(made, separators=(",", ":")))
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}") from error
    mirror = copies.copies_of(records)
    facts: dict[str, Any] = {
        "trace": str(target),
        "png": png,
        "ranks_png": ranks,
        "events": sum(e["ph"] != "M" for e in made["traceEvents"]),
        "ranks": len({r.get("rank", 0) for r in records}),
        "step_s": step_s,
        "saves": [s.to_json() for s in found],
        "mirror": None if mirror is None else mirror.to_json(),
    }
    if as_json:
        output.print_json(facts)
    else:
        _print(facts, found)
        if mirror is not None:
            print(mirror.line())
    return 0


def _print(facts: dict[str, Any], found: "list[Save]") -> None:
    def ms(seconds: float) -> str:
        return f"{seconds * 1e3:.1f}"

    if found:
        output.print_table(
            ["checkpoint", "call ms", "gate ms", "capture ms", "persist ms", "fsync ms", ""],
            [
                (s.step, ms(s.call_s), ms(s.gate_s), ms(s.capture_s), ms(s.persist_s),
                 ms(s.fsync_s), "" if s.ok else "not committed")
                for s in found
            ],
            right=range(6),
        )  # fmt: skip
        print()
        stall = median(s.stall_s for s in found)
        step_s = facts["step_s"]
        against = f", {stall / step_s:.1%} of a step of {ms(step_s)} ms" if step_s else ""
        print(f"stall of a checkpoint: {ms(stall)} ms in the median{against}")
    ranks = "1 rank" if facts["ranks"] == 1 else f"{facts['ranks']} ranks"
    print(f"{facts['events']} events of {ranks} in {facts['trace']}, "
          "for https://ui.perfetto.dev")  # fmt: skip
    for drawn in filter(None, (facts["png"], facts["ranks_png"])):
        print(f"drawn in {drawn}")
