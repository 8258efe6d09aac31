"""How fast a large checkpoint is loaded, cold: libraries against raw reads.

Each library saves the same tensors. Then, in turn, each loads its own checkpoint into the tensors
in place; before that the files are dropped from the page cache and the tensors are overwritten, and
what was loaded is compared bit for bit. (A hypervisor may still have the blocks: it has them for
the raw reads as well.) Raw reads go past the page cache and through it: the fastest one is the
limit. Planaria is then read in turn with those alone, whose ratio is the goal's: the disk's speed
changes in the time that the others take. Last, the same with files that the page cache has, and
what the adaptive reader has found.

Run: ``make bench SUITE=load``, or
``python tests/benchmarks/bench_load.py [--mb 1024] [--turns 5]``.
"""

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from suites import Saves
from timing import Goal, in_turn, machine, publish_tables, rows_of

from planaria.checkpoint.storage.read_choice import choice_for

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
        cached = "raw read through the page cache, 2 threads"
        raw[cached] = partial(suite.read_raw, threads=2, scatter=False, direct=False)
        turns = suite.load(args.turns, {**raw, "memcpy": suite.memcpy})
        close = suite.load(2 * args.turns, raw, only=["planaria"])
        choice = choice_for(os.stat(root).st_dev)
        chosen = {"past the page cache" if way else "through it": s * 1e9
                  for way, s in choice._costs.items()}  # fmt: skip
        again = [name for name in ("planaria", "dcp.save", "safetensors") if turns.values.get(name)]
        warm = in_turn({name: partial(suite.load_warm, name) for name in again}, args.turns)
        suite.close()
    limit, closest = turns.fastest(raw), close.fastest(raw)
    assert limit is not None
    assert closest is not None
    gb = suite.state.nbytes / 1e9

    def more(_: str, median: float) -> dict[str, Any]:
        return {"GB/s": gb / median, "of the raw read": turns.median(limit) / median}

    publish_tables(
        "load",
        [(f"Cold load, {args.mb} MB in {args.tensors} tensors (measured)",
          rows_of(turns, "planaria", more=more)),
         (f"The limits alone beside it, {args.mb} MB (measured)", rows_of(close, "planaria")),
         (f"The same, warm: the page cache has the files, {args.mb} MB (measured)",
          rows_of(warm, "planaria")),
         ("What the adaptive reader found, in the end",
          [{"it reads": "past the page cache" if choice.direct else "through it",
            **{f"{way}, thread seconds per GB": s for way, s in chosen.items()}}])],
        {"mb": args.mb, "tensors": args.tensors, "turns": args.turns},
        goals=[
            Goal(f"speed of the fastest raw read ({closest})",
                 close.ratio(closest, "planaria")["median"], 0.9, 1),
            Goal("times faster than dcp.load", turns.ratio("dcp.save", "planaria")["median"], 1.5),
        ],
        peers=suite.settings(),
        failures=turns.failures,
        started=started,
    )  # fmt: skip


if __name__ == "__main__":
    main()
