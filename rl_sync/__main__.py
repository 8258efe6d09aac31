"""Status of a publisher's receivers: ``python -m planaria.rl_sync tcp://host:port [--json]``."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from planaria.core.deadline import Deadline
from planaria.core.token import load_token
from planaria.errors import PlanariaError
from planaria.rl_sync.transports.urls import open_status

COLUMNS = ("worker", "shard", "version", "lag", "nbytes", "seconds", "link", "codec")


def main(argv: list[str] | None = None) -> int:
    """Prints version, lag, link, bytes and codec of each receiver; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m planaria.rl_sync", description=__doc__)
    parser.add_argument("url", help="the publisher's: tcp://host:port, a folder or shm://name")
    parser.add_argument("--run", help="run folder with the job's token (else PLANARIA_TOKEN)")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    try:
        found = open_status(args.url, load_token(args.run), Deadline(args.timeout))
    except (PlanariaError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(found))
    else:
        show(found)
    return 0


def show(found: dict[str, Any]) -> None:
    """Prints a status as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"newest version: {found['version']}")
    for column in COLUMNS:
        table.add_column(column)
    for row in found["workers"]:
        link = f"{row['link'] * 8 / 1e6:.0f} Mb/s" if row["link"] else "-"
        text = row | {"link": link, "seconds": f"{row['seconds']:.3f}"}
        table.add_row(*(str(text[column]) for column in COLUMNS))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
