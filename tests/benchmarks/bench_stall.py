"""How long training stands still for a checkpoint, and how much slower it computes meanwhile.

In turn, each library saves once between two optimizer steps while forward and backward run, and
the time in which the training thread stands still is added up: the call itself plus whatever the
next optimizer step waits for. Before the next variant's turn the save is durable, so they do not
disturb each other. At the end each one's last checkpoint is read back and compared bit for bit with
the state it was taken of.

Three trainings: one process (all libraries), and two gloo ranks under DDP and FSDP2. Then one
process again, with a pool of a quarter of the state, over the ratio of step to write time.

Run: ``make bench SUITE=stall``, or
``python tests/benchmarks/bench_stall.py [--mb 1024] [--ranks-mb 256] [--turns 5]``.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
import limits
from backgrounds import BACKGROUNDS, Background, DcpAsync, DcpKeptStager, PlanariaBackground
from peers import make_all
from ranks import run_ranks
from timing import Goal, Turns, clock, in_turn, machine, publish_tables, rows_of, summary
from training import Training, check_saved

NONE = "no checkpoint"
BLOCKING = (DcpAsync.name, DcpKeptStager.name)


class Stalls:
    """Measures libraries in turn, on this rank.

    Args:
        training: What is trained.
        backgrounds: Name -> library.
    """

    def __init__(self, training: Training, backgrounds: dict[str, Background]) -> None:
        self.training, self.backgrounds = training, backgrounds
        self.step = 0
        self.saved: dict[str, int] = {}
        self.computing: dict[str, list[float]] = {}

    def variants(self) -> dict[str, Callable[[], float]]:
        """One function a library, for `in_turn`."""
        return {name: partial(self._turn, name) for name in self.backgrounds}

    def without(self) -> float:
        """Forward, backward and update without a checkpoint."""
        _barrier()
        self.computing.setdefault(NONE, []).append(self.training.forward_backward())
        self.training.update()
        return 0.0

    def _turn(self, name: str) -> float:
        background = self.backgrounds[name]
        self.step += 1
        state = background.state_dict()
        _barrier()
        start = time.perf_counter()
        pending = background.start(self.step, state)
        blocked = time.perf_counter() - start
        self.computing.setdefault(name, []).append(self.training.forward_backward())
        blocked += clock(pending.gate)
        self.training.update()
        pending.durable()
        return blocked

    def check(self, turns: Turns) -> None:
        """Saves once more with each library, and compares; who fails gives no figure."""
        for name, background in self.backgrounds.items():
            if name in turns.failures:
                continue
            try:
                self.step += 1
                pending = background.start(self.step, background.state_dict())
                pending.gate()
                pending.durable()
                _barrier()
                check_saved(background, self.step)
            except Exception as error:
                if name == "planaria" or dist.is_initialized():
                    raise
                turns.drop(name, error)

    def close(self) -> None:
        """Ends all libraries."""
        for background in self.backgrounds.values():
            background.close()


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def one_rank(
    rank: int, kind: str, nbytes: int, turns: int, per_gb_s: float, root: str, only: str
) -> dict[str, Any]:
    """Measures all that this training can be saved with."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    training = Training(kind, nbytes, per_gb_s * nbytes / 1e9)
    # In a group of its own: its background collectives must not meet those of training.
    group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
    made, failures = make_all({
        k.name: partial(_make, k, training, root, group)
        for k in BACKGROUNDS
        if (k.any_ranks or kind == "one") and (not only or k.name in only.split(","))
    })  # fmt: skip
    stalls = Stalls(training, made)
    variants: dict[str, Callable[[], float]] = {NONE: stalls.without, **stalls.variants()}
    must = made if dist.is_initialized() else ("planaria",)
    result = in_turn(variants, turns, must=must, failures=failures)
    stalls.check(result)
    stalls.close()
    values = {name: v for name, v in result.values.items() if name != NONE}
    return {
        "blocked": values,
        "computing": stalls.computing,
        "failures": result.failures,
        "nbytes": training.nbytes,
        "batch": training.batch,
    }


def _make(kind: Any, training: Training, root: str, group: Any) -> Background:
    options = {"pool_bytes": training.nbytes + (64 << 20)} if kind is PlanariaBackground else {}
    return kind(training.model, training.optim, Path(root), group, **options)


def stall(kind: str, results: list[dict[str, Any]]) -> tuple[Turns, list[dict[str, Any]]]:
    """One table: a step is as slow as its slowest rank."""
    turns = Turns(failures=results[0]["failures"])
    for name in results[0]["blocked"]:
        per_rank = [r["blocked"][name] for r in results]
        turns.values[name] = [max(turn) for turn in zip(*per_rank, strict=True)]
    computing = {
        name: summary([c for r in results for c in r["computing"][name][1:]])["median"]
        for name in (NONE, *turns.values)
    }

    def more(name: str, _: float) -> dict[str, Any]:
        return {
            "fwd+bwd ms": computing[name] * 1e3,
            "fwd+bwd, times without": computing[name] / computing[NONE],
        }

    return turns, [{"training": kind, **row} for row in rows_of(turns, "planaria", more=more)]


def quarter_pool(nbytes: int, turns: int, ratios: list[float], root: Path) -> list[dict[str, Any]]:
    """Blocked time with a pool of a quarter of the state, over the ratio of step to write time."""
    memory = limits.Memory(nbytes)
    write_s = min(clock(partial(limits.write_raw, root / "raw", memory)) for _ in range(3))
    del memory
    training = Training("one", nbytes, write_s)
    pool = training.nbytes // 4
    made: dict[str, Background] = {
        "planaria": PlanariaBackground(training.model, training.optim, root, None, pool_bytes=pool),
        **{
            kind.name: kind(training.model, training.optim, root, None)
            for kind in (DcpAsync, DcpKeptStager)
        },
    }
    rows = []
    stalls = Stalls(training, made)
    for ratio in ratios:
        taken = training.calibrate(ratio * write_s)
        result = in_turn(stalls.variants(), turns)
        better = result.fastest(BLOCKING)
        assert better is not None
        rows.append({
            "step / write time, meant": ratio,
            "measured": taken / write_s,
            "planaria ms": result.median("planaria") * 1e3,
            "min ms": min(result.values["planaria"]) * 1e3,
            "max ms": max(result.values["planaria"]) * 1e3,
            "dcp.async_save ms": result.median(better) * 1e3,
            "dcp / planaria": result.ratio(better, "planaria")["median"],
        })  # fmt: skip
    stalls.check(Turns())
    stalls.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mb", type=int, default=1024, help="state of one process, in MB")
    parser.add_argument("--ranks-mb", type=int, default=256, help="state of two ranks, in MB")
    parser.add_argument("--quarter-mb", type=int, default=256, help="state with a small pool")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--per-gb", type=float, default=1.5, help="forward + backward, s per GB")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.5, 1, 2, 4])
    parser.add_argument("--kinds", nargs="*", default=["one", "ddp", "fsdp2"])
    parser.add_argument("--only", default="", help="libraries to measure, with commas")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    started = machine()
    torch.set_num_threads(1)
    tables: list[tuple[str, list[dict[str, Any]]]] = []
    goals: list[Goal] = []
    failures: dict[str, str] = {}
    for kind in args.kinds:
        mb = args.mb if kind == "one" else args.ranks_mb
        with tempfile.TemporaryDirectory() as root:
            call = (kind, mb << 20, args.turns, args.per_gb, root, args.only)
            if kind == "one":
                results = [one_rank(0, *call)]
            else:
                results = run_ranks(2, one_rank, *call, timeout=900)
        turns, rows = stall(kind, results)
        failures.update(turns.failures)
        who = "one process" if kind == "one" else f"{kind}, 2 ranks"
        tables.append((f"Time blocked per checkpoint, {who}, {mb} MB of state (measured)", rows))
        better = turns.fastest(BLOCKING)
        if better and kind == "one":
            ratio = turns.ratio(better, "planaria")
            goals.append(Goal(f"times less than dcp.async_save ({better})",
                              ratio["median"], 80, 150))  # fmt: skip
            other = turns.ratio("torch_checkpointing", "planaria")
            goals.append(Goal("times less than torch_checkpointing", other["median"], 1))
    if args.ratios:
        with tempfile.TemporaryDirectory() as root:
            rows = quarter_pool(args.quarter_mb << 20, max(2, args.turns - 2), args.ratios,
                                Path(root))  # fmt: skip
        title = f"Time blocked with a pool of a quarter of {args.quarter_mb} MB (measured)"
        tables.append((title, rows))
        goals.append(Goal("pool of a quarter: times less than dcp.async_save, at worst",
                          min(row["dcp / planaria"] for row in rows), 1))  # fmt: skip
    publish_tables(
        "stall",
        tables,
        {**vars(args), "threads": 1, "model": "Linear(1024, 1024) layers, fused AdamW"},
        goals=goals,
        peers={kind.name: kind.settings for kind in BACKGROUNDS},
        failures=failures,
        started=started,
    )


if __name__ == "__main__":
    main()
