"""What a checkpoint at every step costs a run: all waits and all slow-downs.

Thirty steps of one training with a checkpoint at each, in three blocks of ten, in turn with the
other libraries and with no checkpoints at all. A block ends when its last checkpoint is durable, so
nothing is left for others to pay. The excess is the time over the blocks without checkpoints.
Forward and backward take at least 1.5 s a GB of state, by the size of the batch. All of it twice:
with all cores computing, and with one core left free. Each library's last checkpoint of each block
is read back and compared bit for bit with the state.

Run: ``make bench SUITE=end_to_end``, or
``python tests/benchmarks/bench_end_to_end.py [--mb 256] [--steps 10] [--blocks 3]``.
"""

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from backgrounds import (
    BACKGROUNDS,
    Background,
    DcpAsync,
    DcpAsyncStaging,
    DcpKeptStager,
    PlanariaBackground,
    TorchCheckpointingAsync,
)
from peers import make_all
from timing import Goal, Turns, in_turn, machine, publish_tables, rows_of
from training import Training, check_saved

NONE = "no checkpoint"
DCP = (DcpAsync.name, DcpKeptStager.name)
KINDS = (PlanariaBackground, DcpAsync, DcpKeptStager, DcpAsyncStaging, TorchCheckpointingAsync)


class Runs:
    """Blocks of steps of one training.

    Args:
        training: What is trained.
        backgrounds: Name -> library.
        steps: Steps of a block.
    """

    def __init__(self, training: Training, backgrounds: dict[str, Background], steps: int) -> None:
        self.training, self.backgrounds, self.steps = training, backgrounds, steps
        self.number = 0
        self.blocked: dict[str, list[float]] = {}
        self.tail: dict[str, list[float]] = {}

    def variants(self) -> dict[str, Callable[[], float]]:
        """One function a library, and one for none, for `in_turn`."""
        return {NONE: self.without} | {
            name: partial(self.with_checkpoints, name) for name in self.backgrounds
        }

    def without(self) -> float:
        """Seconds of a block without checkpoints."""
        start = time.perf_counter()
        for _ in range(self.steps):
            self.training.forward_backward()
            self.training.update()
        return time.perf_counter() - start

    def with_checkpoints(self, name: str) -> float:
        """Seconds of a block with a checkpoint at each step, until the last is durable."""
        background = self.backgrounds[name]
        planaria = name == "planaria"
        pending, blocked = None, 0.0
        start = time.perf_counter()
        for _ in range(self.steps):
            self.training.forward_backward()
            at = time.perf_counter()
            if pending is not None:
                pending.gate()
            blocked += time.perf_counter() - at
            self.training.update()
            at = time.perf_counter()
            # The peers ask that one save is through before the next begins.
            if pending is not None and not planaria:
                pending.durable()
            self.number += 1
            pending = background.start(self.number, background.state_dict())
            blocked += time.perf_counter() - at
        at = time.perf_counter()
        assert pending is not None
        pending.durable()
        end = time.perf_counter()
        self.blocked.setdefault(name, []).append(blocked)
        self.tail.setdefault(name, []).append(end - at)
        check_saved(background, self.number)
        return end - start


def measure(mb: int, threads: int, per_gb_s: float, steps: int, blocks: int, only: str,
            root: Path) -> tuple[Turns, Runs]:  # fmt: skip
    """All libraries in turn, computing with some threads."""
    torch.set_num_threads(threads)
    nbytes = mb << 20
    training = Training("one", nbytes, per_gb_s * nbytes / 1e9)
    pool = training.nbytes + (64 << 20)
    backgrounds, failures = make_all({
        kind.name: partial(kind, training.model, training.optim, root, None,
                           **({"pool_bytes": pool} if kind is PlanariaBackground else {}))
        for kind in KINDS
        if not only or kind.name in only.split(",")
    })  # fmt: skip
    runs = Runs(training, backgrounds, steps)
    try:
        must = ("planaria", NONE)
        runs.steps = 2  # the first saves make what later ones reuse
        warm = in_turn(runs.variants(), 0, must=must, failures=failures)
        runs.steps = steps
        runs.blocked.clear()
        runs.tail.clear()
        turns = in_turn(runs.variants(), blocks, warm_up=0, must=must, failures=warm.failures)
    finally:
        for background in backgrounds.values():
            background.close()
    return turns, runs


def excess(turns: Turns, name: str) -> float:
    """Seconds over no checkpoints, of all blocks."""
    if name not in turns.values:
        return float("nan")
    return sum(turns.values[name]) - sum(turns.values[NONE])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mb", type=int, default=256, help="size of the state")
    parser.add_argument("--steps", type=int, default=10, help="of a block")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--per-gb", type=float, default=1.6, help="forward + backward, s per GB")
    parser.add_argument("--only", default="", help="libraries to measure, with commas")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    started = machine()
    cores = os.cpu_count() or 1
    tables, goals, failures, batches = [], [], {}, {}
    for threads, what in ((cores, "all cores computing"), (max(1, cores - 1), "one core free")):
        with tempfile.TemporaryDirectory() as root:
            turns, runs = measure(args.mb, threads, args.per_gb, args.steps, args.blocks,
                                  args.only, Path(root))  # fmt: skip
        failures.update(turns.failures)
        batches[what] = runs.training.batch
        better = turns.fastest(DCP)
        total = args.steps * args.blocks

        def more(
            name: str, _: float, turns: Turns = turns, runs: Runs = runs, better: Any = better
        ) -> dict[str, Any]:
            if name == NONE:
                step = turns.median(NONE) / args.steps
                return {"s a step, per GB": step / (runs.training.nbytes / 1e9)}
            return {
                "excess s": excess(turns, name),
                "excess / dcp's": excess(turns, name) / excess(turns, better) if better
                else float("nan"),
                "blocked s": sum(runs.blocked[name]),
                "last until durable s": sum(runs.tail[name]),
            }  # fmt: skip

        title = f"{total} steps, a checkpoint at each, {args.mb} MB, {what} (measured)"
        tables.append((title, rows_of(turns, NONE, unit="s", scale=1, more=more)))
        ratio = turns.ratio("planaria", NONE)["median"]
        share = excess(turns, "planaria") / excess(turns, better) if better else float("nan")
        least, aim = (1.25, 1.1) if threads == cores else (1.1, 1.03)
        goals.append(Goal(f"{what}: excess, times that of dcp.async_save", share, 0.5, 0.25,
                          less_is_better=True))  # fmt: skip
        goals.append(Goal(f"{what}: time, times that without checkpoints", ratio, least, aim,
                          less_is_better=True))  # fmt: skip
    publish_tables(
        "end_to_end",
        tables,
        {**vars(args), "batch": batches, "model": "Linear(1024, 1024) layers, fused AdamW"},
        goals=goals,
        peers={kind.name: kind.settings for kind in BACKGROUNDS if kind in KINDS},
        failures=failures,
        started=started,
    )


if __name__ == "__main__":
    main()
