"""What all benchmarks share: turns, ratios with their spread, the machine, tables, a JSON file.

Absolute times on a shared machine mean little; variants are timed in turn (A B A B ...) in one run,
and what is reported is a variant's ratio to another one in the same turn: the median over the
turns, the smallest and the largest.
"""

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
#: Whose versions are recorded, where they are installed.
PACKAGES = (
    *("planaria", "torch", "numpy", "numba", "crc32c", "safetensors", "fsspec"),
    *("torchsnapshot", "torch_checkpointing", "pyeclib", "zfec", "torchft"),
)


class NotMeasured(RuntimeError):
    """A variant gives no figure; the message says why."""


@dataclass
class Turns:
    """What was measured in turn.

    Attributes:
        values: Variant -> one value a turn, in order; those that gave none are left out.
        failures: Variant -> why it gave no figure.
    """

    values: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """The median of a variant's values; not a number if it gave none."""
        values = self.values.get(name)
        return statistics.median(values) if values else float("nan")

    def fastest(self, names: Iterable[str]) -> str | None:
        """The variant with the smallest median among those that gave figures."""
        there = [name for name in names if self.values.get(name)]
        return min(there, key=self.median, default=None)

    def ratio(self, name: str, to: str) -> dict[str, float]:
        """A variant's values over another's of the same turn: median, smallest, largest."""
        pairs = zip(self.values.get(name, []), self.values.get(to, []), strict=False)
        ratios = [a / b for a, b in pairs if b]
        return summary(ratios) if ratios else dict.fromkeys(("median", "min", "max"), float("nan"))

    def drop(self, name: str, error: BaseException) -> None:
        """Gives up on a variant."""
        self.values.pop(name, None)
        self.failures[name] = _reason(error)


def in_turn(
    variants: Mapping[str, Callable[[], float]],
    turns: int,
    *,
    warm_up: int = 1,
    must: Iterable[str] = ("planaria",),
    failures: Mapping[str, str] | None = None,
) -> Turns:
    """Runs each variant once a turn.

    Args:
        variants: Name -> runs once and returns its value (seconds).
        turns: How many turns count.
        warm_up: How many come before that do not.
        must: Variants whose failure ends the benchmark; the others are left out from then on.
        failures: Variants that failed before.
    """
    result = Turns({name: [] for name in variants}, dict(failures or {}))
    for turn in range(-warm_up, turns):
        for name, run in variants.items():
            if name in result.failures:
                continue
            try:
                gc.collect()
                value = run()
            except Exception as error:
                if name in must:
                    raise
                result.drop(name, error)
                continue
            if turn >= 0:
                result.values[name].append(value)
    return result


def clock(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of some values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def rows_of(
    turns: Turns,
    reference: str,
    *,
    unit: str = "ms",
    scale: float = 1e3,
    more: Callable[[str, float], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """One row a variant: its median and spread, and its ratio to the reference variant.

    Args:
        turns: What was measured.
        reference: Name of the variant that ratios are to.
        unit: What the values are printed in.
        scale: How many of these are in one.
        more: Further columns of a variant, from its name and median.
    """
    rows: list[dict[str, Any]] = []
    for name, values in turns.values.items():
        s, r = summary(values), turns.ratio(name, reference)
        rows.append({
            "variant": name,
            f"median {unit}": s["median"] * scale,
            f"min {unit}": s["min"] * scale,
            f"max {unit}": s["max"] * scale,
            f"ratio to {reference}": r["median"],
            "ratio min": r["min"],
            "ratio max": r["max"],
            **(more(name, s["median"]) if more else {}),
        })  # fmt: skip
    return rows


@dataclass(frozen=True)
class Goal:
    """A figure that the project set itself.

    Attributes:
        what: What is measured.
        value: What was reached.
        least: What it should be at least (at most, where less is better).
        aim: What would be good.
        less_is_better: Which way is better.
    """

    what: str
    value: float
    least: float
    aim: float | None = None
    less_is_better: bool = False

    def row(self) -> dict[str, Any]:
        """As a row of a table; a figure that could not be measured is neither met nor missed."""
        if self.value != self.value:
            met = "not measured"
        elif self.less_is_better:
            met = "yes" if self.value <= self.least else "no"
        else:
            met = "yes" if self.value >= self.least else "no"
        sign = "<=" if self.less_is_better else ">="
        aim = "" if self.aim is None else f"{sign} {self.aim:g}"
        return {"goal": self.what, "reached": self.value, "least": f"{sign} {self.least:g}",
                "aim": aim, "met": met}  # fmt: skip


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "machine": platform.machine(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what was measured."""
    found = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def publish(name: str, title: str, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Prints one table and writes ``results/<name>.json``."""
    publish_tables(name, [(title, rows)], settings)


def publish_tables(
    name: str,
    tables: Sequence[tuple[str, Sequence[dict[str, Any]]]],
    settings: dict[str, Any],
    *,
    goals: Sequence[Goal] = (),
    peers: Mapping[str, str] | None = None,
    failures: Mapping[str, str] | None = None,
    started: dict[str, Any] | None = None,
) -> None:
    """Prints tables and writes ``results/<name>.json``.

    Args:
        name: Of the benchmark.
        tables: Title and rows of each.
        settings: What it was run with.
        goals: Figures to compare with what the project set itself.
        peers: Variant -> the settings it ran with.
        failures: Variant -> why it gave no figure.
        started: `machine()` at the beginning, for the load at that time; now, by default.
    """
    console = Console(width=160 if not sys.stdout.isatty() else None)
    for title, rows in tables:
        if rows:
            console.print(_table(title, rows))
    for variant, reason in (failures or {}).items():
        console.print(f"  no figure for {variant}: {reason}", markup=False)
    goal_rows = [goal.row() for goal in goals]
    if goal_rows:
        console.print(_table("Goals", goal_rows))
    before = started or machine()
    load = before["load_average"][0]
    if load > 0.5 * (os.cpu_count() or 1):
        console.print(
            f"  Load average {load:g} when this began: the figures are those of a busy machine.",
            markup=False,
        )
    RESULTS.mkdir(exist_ok=True)
    data = {
        "benchmark": name,
        "settings": settings,
        "machine": before,
        "peers": dict(peers or {}),
        "not_measured": dict(failures or {}),
        "goals": goal_rows,
        "tables": [{"title": title, "rows": list(rows)} for title, rows in tables],
    }
    text = json.dumps(_finite(data), indent=1, allow_nan=False)
    (RESULTS / f"{name}.json").write_text(text + "\n")


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for key in columns:
        number = any(isinstance(row.get(key), float) for row in rows)
        table.add_column(key, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(_text(row.get(key, "")) for key in columns))
    return table


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "-" if value != value else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def _reason(error: BaseException) -> str:
    if isinstance(error, NotMeasured):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" ({Path(last[0].filename).name}:{last[0].lineno})" if last else ""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:200]}{place}"


def _processor() -> str:
    with suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
