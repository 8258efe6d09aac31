"""What all benchmarks share: turns, medians, the machine, a table and a JSON file.

Absolute times on a shared machine mean little; variants are timed in turn (A B A B ...) in one run,
and what is reported is the ratio of their medians with the spread over the turns.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def in_turn(variants: dict[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """Runs each variant once a turn; returns its values (seconds) in order of the turns."""
    values: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(turns):
        for name, run in variants.items():
            values[name].append(run())
    return values


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of some values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def publish(name: str, title: str, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Prints a table and writes ``results/<name>.json``; all rows have the same keys."""
    table = Table(title=title)
    for key in rows[0]:
        table.add_column(key, justify="right" if isinstance(rows[0][key], float) else "left")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    Console(width=140).print(table)
    RESULTS.mkdir(exist_ok=True)
    data = {"benchmark": name, "settings": settings, "machine": machine(), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
