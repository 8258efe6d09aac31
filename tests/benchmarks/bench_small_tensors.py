"""Many small tensors: time until they are durable, and to load them again, cold.

In turn, each library saves the same 8,000 tensors of 1 kB and waits until they are durable; then,
in turn, each loads its own checkpoint, which the page cache has dropped, and what it loaded is
compared bit for bit with what was saved. The limit for saves copies the tensors into one aligned
buffer, writes that past the page cache and syncs it; the limit for loads reads one such file and
copies its parts into the tensors.

Run: ``make bench SUITE=small_tensors``, or
``python tests/benchmarks/bench_small_tensors.py [--count 8000] [--turns 5]``.
"""

import argparse
import tempfile
from pathlib import Path

from suites import COALESCE, RAW_COMMIT, Saves
from timing import Goal, machine, publish_tables, rows_of


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=8000)
    parser.add_argument("--bytes", type=int, default=1024, help="of one tensor")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    started = machine()
    with tempfile.TemporaryDirectory() as root:
        suite = Saves(Path(root), args.count, args.bytes // 4)
        saves = suite.run(args.turns, small=True)
        suite.failures = saves.failures
        loads = suite.load(args.turns, {"raw read and scatter": suite.read_raw})
        suite.close()
    what = f"{args.count} tensors of {args.bytes} bytes"
    publish_tables(
        "small_tensors",
        [
            (f"Save until durable, {what} (measured)", rows_of(saves, "planaria")),
            (f"Cold load, {what} (measured)", rows_of(loads, "planaria")),
        ],
        {"count": args.count, "bytes": args.bytes, "turns": args.turns},
        goals=[
            Goal("save: times a raw coalesced write and fsync",
                 saves.ratio("planaria", COALESCE)["median"], 2, 1.3, less_is_better=True),
            Goal("save: times a raw write with the same syncs",
                 saves.ratio("planaria", RAW_COMMIT)["median"], 2, 1.3, less_is_better=True),
            Goal("save: times faster than dcp.save",
                 saves.ratio("dcp.save", "planaria")["median"], 20),
            Goal("load: times faster than dcp.load",
                 loads.ratio("dcp.save", "planaria")["median"], 10, 30),
        ],
        peers=suite.settings(),
        failures={**saves.failures, **loads.failures},
        started=started,
    )  # fmt: skip


if __name__ == "__main__":
    main()
