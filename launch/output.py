"""How the verbs print: tables for people, JSON for programs."""

import json
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_json(value: Any) -> None:
    """Prints one JSON document."""
    print(json.dumps(value, indent=2, default=str))


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[int] = ()
) -> None:
    """Prints a table without frames; columns in `right` are aligned to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    right = set(right)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console().print(table)


def print_pairs(pairs: Iterable[tuple[str, str]], *, to: Console | None = None) -> None:
    """Prints labels and texts in two columns."""
    rows = list(pairs)
    width = max((len(label) for label, _ in rows), default=0)
    for label, text in rows:
        line = Text.assemble((label.ljust(width), "bold"), "  ", text)
        (to or console()).print(line, soft_wrap=True)


def console(*, stderr: bool = False) -> Console:
    """A console on stdout, or on stderr; lines stay whole where it is no terminal."""
    out = Console(stderr=stderr, highlight=False)
    if not out.is_terminal:
        out.width = 200
    return out


def age(seconds: float) -> str:
    """How long ago, in the largest whole unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def since(moment: float) -> str:
    """How long ago a moment was that is given in seconds since the epoch."""
    return age(time.time() - moment)
