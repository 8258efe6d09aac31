"""How fast a large checkpoint is loaded, cold: libraries against raw reads.

Each library saves the same tensors. Then, in turn, each loads its own checkpoint into the tensors
in place; before that the files are dropped from the page cache and the tensors are overwritten, and
what was loaded is compared bit for bit. (A hypervisor may still have the blocks: it has them for
the raw reads as well.)

Run: ``make bench SUITE=load``, or
``python tests/benchmarks/bench_load.py [--mb 1024] [--turns 5]``.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from suites import Saves
from timing import Goal, machine, publish_tables, rows_of

THREADS = (1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mb", type=int, default=1024, help="size of the state")
    parser.add_argument("--tensors", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    started = machine()
    with tempfile.TemporaryDirectory() as root:
        suite = Saves(Path(root), args.tensors, (args.mb << 20) // args.tensors // 4)
        suite.save_all()
        raw = {
            f"raw read, {n} thread{'s' if n > 1 else ''}": partial(
                suite.read_raw, threads=n, scatter=False
            )
            for n in THREADS
        }
        turns = suite.load(args.turns, {**raw, "memcpy": suite.memcpy})
        suite.close()
    limit = turns.fastest(raw)
    assert limit is not None
    gb = suite.state.nbytes / 1e9

    def more(_: str, median: float) -> dict[str, Any]:
        return {"GB/s": gb / median, "of the raw read": turns.median(limit) / median}

    publish_tables(
        "load",
        [(f"Cold load, {args.mb} MB in {args.tensors} tensors (measured)",
          rows_of(turns, "planaria", more=more))],
        {"mb": args.mb, "tensors": args.tensors, "turns": args.turns},
        goals=[
            Goal(f"speed of the fastest raw read ({limit})",
                 turns.ratio(limit, "planaria")["median"], 0.9, 1),
            Goal("times faster than dcp.load", turns.ratio("dcp.save", "planaria")["median"], 1.5),
        ],
        peers=suite.settings(),
        failures=turns.failures,
        started=started,
    )  # fmt: skip


if __name__ == "__main__":
    main()
