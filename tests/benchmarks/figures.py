"""Writes the figures in README.md from results/*.json, between two markers.

Run: ``python tests/benchmarks/figures.py``, after ``make bench``.
"""

import json
from pathlib import Path
from typing import Any

from timing import RESULTS

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
ORDER = [
    "stall",
    "end_to_end",
    "small_tensors",
    "throughput",
    "load",
    "stages",
    "memory",
    "memory_tier",
    "memory_training",
    "memory_peers",
    "planning",
    "erasure",
    "reduction",
    "gradient_memory",
    "steady_state",
    "recovery",
    "regroup",
    "shrink",
    "redundancy",
    "rl_codecs",
    "rl_end_to_end",
]


def section(name: str, data: dict[str, Any]) -> list[str]:
    """One suite's goals and tables, as Markdown."""
    machine = data["machine"]
    load, cores = machine["load_average"][0], machine["cores"]
    busy = "" if load <= 0.5 * cores else "; **other work ran on the machine**"
    lines = [
        f"### {name}",
        "",
        f"{cores} cores ({machine['processor']}), load average {load:g} before the run{busy}. "
        f"torch {machine['versions']['torch']}, {machine['time'][:10]}.",
        "",
    ]
    lines += markdown([
        {"goal": g["goal"], "reached": g["reached"], "at least": g["least"].replace("<", "&lt;"),
         "aim": g["aim"].replace("<", "&lt;"), "met": g["met"]}
        for g in data["goals"]
    ])  # fmt: skip
    for table in data["tables"]:
        if table["rows"]:
            lines += [f"*{table['title']}*", "", *markdown([folded(r) for r in table["rows"]])]
    lines += [f"- no figure for {who}: {why}" for who, why in data["not_measured"].items()]
    if data["not_measured"]:
        lines.append("")
    return lines


def folded(row: dict[str, Any]) -> dict[str, Any]:
    """Medians with their spread in one cell."""
    result: dict[str, Any] = {}
    for key, value in row.items():
        if key.startswith("median "):
            unit = key.removeprefix("median ")
            spread = text(row[f"min {unit}"]), text(row[f"max {unit}"])
            result[unit] = f"{text(value)} ({', '.join(spread)})"
        elif key.startswith("ratio to ") and "ratio min" in row:
            result[key] = f"{text(value)} ({text(row['ratio min'])}, {text(row['ratio max'])})"
        elif not key.startswith(("min ", "max ", "ratio m")) or "median " not in " ".join(row):
            result[key] = value
    return result


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """A table."""
    if not rows:
        return []
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(text(row.get(c)) for c in columns)} |" for row in rows),
        "",
    ]


def text(value: Any) -> str:
    """A cell."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def main() -> None:
    lines: list[str] = []
    for name in ORDER:
        path = RESULTS / f"{name}.json"
        if path.exists():
            lines += section(name, json.loads(path.read_text()))
    before, _, rest = README.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n{END}{after}")


if __name__ == "__main__":
    main()
