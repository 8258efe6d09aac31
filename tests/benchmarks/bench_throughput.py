"""How fast a large state becomes durable: libraries against a raw aligned writer.

In turn, each library saves the same tensors and waits until they are durable; between turns every
element is changed. Each one's last checkpoint is loaded again and compared bit for bit. Then
Planaria in turn with the raw writers alone: their ratio is the goal's, as what the others do in
between takes longer than the disk's speed stays what it is.

Run: ``make bench SUITE=throughput``, or
``python tests/benchmarks/bench_throughput.py [--mb 1024] [--turns 5]``.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from suites import Saves
from timing import Goal, machine, publish_tables, rows_of


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mb", type=int, default=1024, help="size of the state")
    parser.add_argument("--tensors", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    started = machine()
    with tempfile.TemporaryDirectory() as root:
        saves = Saves(Path(root), args.tensors, (args.mb << 20) // args.tensors // 4)
        turns = saves.run(args.turns)
        close = saves.run(2 * args.turns, only=["planaria"])
        saves.check(turns)
        saves.close()
    raw = turns.fastest(name for name in turns.values if name.startswith("raw"))
    assert raw is not None
    gb = saves.state.nbytes / 1e9

    def more(_: str, median: float) -> dict[str, Any]:
        return {"GB/s": gb / median, "of the raw write": turns.median(raw) / median}

    limit = close.fastest(name for name in close.values if name.startswith("raw"))
    assert limit is not None
    share = 1 / close.ratio("planaria", limit)["median"]
    publish_tables(
        "throughput",
        [(f"Save until durable, {args.mb} MB in {args.tensors} tensors (measured)",
          rows_of(turns, "planaria", more=more)),
         (f"The limits alone beside it, {args.mb} MB (measured)", rows_of(close, "planaria"))],
        {"mb": args.mb, "tensors": args.tensors, "turns": args.turns},
        goals=[Goal("speed of a raw aligned write and fsync", share, 0.9, 0.97)],
        peers=saves.settings(),
        failures=turns.failures,
        started=started,
    )  # fmt: skip


if __name__ == "__main__":
    main()
