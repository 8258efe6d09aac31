"""How long plans take, up to 10^5 ranks and 10^6 boxes: nothing is run, plans are only made.

Three kinds of plan: who writes what, when every tensor is cut over all ranks (FSDP); the same when
every tensor is replicated on eight ranks and cut over groups of them; and the transfers from one
layout to another with a tenth of the ranks gone. Each plan is checked: its boxes cover every tensor
exactly once. The exponent x is that of boxes^x, from one size to the next and fitted over all: 1 is
linear.

Run: ``make bench SUITE=planning``, or
``python tests/benchmarks/bench_planning.py [--boxes 1000000] [--ranks 100000]``.
"""

import argparse
import gc
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from timing import Goal, NotMeasured, machine, publish_tables

from planaria.checkpoint.layout.plan import SavePlan, make_plan
from planaria.core.box import Box, Layout, Transfer, plan_transfers

ROWS = 4  # of a tensor, on each rank
COLUMNS = 1024
REPLICAS = 8


def announcements(ranks: int, tensors: int, replicas: int) -> list[list[Any]]:
    """What ranks announce when each tensor is cut over groups of replicas."""
    parts = ranks // replicas
    shape = [parts * ROWS, COLUMNS]
    names = [f"model.layers.{i}.weight" for i in range(tensors)]
    result: list[list[Any]] = []
    for part in range(parts):
        offset, extent = [part * ROWS, 0], [ROWS, COLUMNS]
        mine = [[n, "float32", shape, offset, extent, None, False] for n in names]
        result.extend([mine] * replicas)  # equal ones share one object, as in a save
    return result


def check_plan(plan: SavePlan, boxes: int) -> None:
    """Every tensor exactly once.

    Raises:
        NotMeasured: The plan is wrong.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    count = 0
    for entries in plan.entries.values():
        for e in entries:
            found.setdefault(e.name, []).append((e.box.offset[0], e.box.extent[0]))
            count += 1
            if e.box.offset[1] != 0 or e.box.extent[1] != COLUMNS:
                raise NotMeasured(f"{e.name}: {e.box} is no slab of rows")
    for name, slabs in found.items():
        _check_rows(name, slabs, plan.shapes[name][0])
    if count < boxes:
        raise NotMeasured(f"{count} boxes are planned, not {boxes}")


def check_transfers(transfers: list[Transfer], target: Layout) -> None:
    """Every target box exactly once, into the rank that holds it.

    Raises:
        NotMeasured: The plan is wrong.
    """
    slabs: list[tuple[int, int]] = []
    holds = dict(target.holders)
    for t in transfers:
        if not holds[t.target].contains(t.box):
            raise NotMeasured(f"rank {t.target} is sent {t.box}")
        slabs.append((t.box.offset[0], t.box.extent[0]))
    _check_rows("the tensor", slabs, target.shape[0])


def _check_rows(name: str, slabs: list[tuple[int, int]], rows: int) -> None:
    at = 0
    for start, size in sorted(slabs):
        if start != at:
            raise NotMeasured(f"{name}: rows {at} to {start} are missing or there twice")
        at += size
    if at != rows:
        raise NotMeasured(f"{name}: {at} of {rows} rows")


def layout(rows: int, ranks: list[int]) -> Layout:
    """A tensor cut over ranks, as evenly as it goes."""
    cuts = [rows * i // len(ranks) for i in range(len(ranks) + 1)]
    return Layout(
        (rows, COLUMNS),
        tuple(
            (rank, Box((a, 0), (b - a, COLUMNS)))
            for rank, a, b in zip(ranks, cuts, cuts[1:], strict=False)
        ),
    )


def save_sharded(ranks: int, boxes: int) -> tuple[float, int]:
    """Every tensor cut over all ranks."""
    tensors = max(1, boxes // ranks)
    told = announcements(ranks, tensors, 1)
    seconds, plan = _timed(lambda: make_plan(told))
    check_plan(plan, ranks * tensors)
    return seconds, ranks * tensors


def save_replicated(ranks: int, boxes: int) -> tuple[float, int]:
    """Every tensor cut over groups of eight ranks that hold the same."""
    tensors = max(1, boxes // ranks)
    told = announcements(ranks, tensors, REPLICAS)
    seconds, plan = _timed(lambda: make_plan(told))
    check_plan(plan, ranks * tensors // REPLICAS)
    return seconds, ranks * tensors


def transfers(ranks: int, boxes: int) -> tuple[float, int]:
    """A tenth of the ranks is gone; the others take over what they held."""
    tensors = max(1, boxes // ranks)
    left = [r for r in range(ranks) if r % 10 != 3]
    source, target = layout(ranks * 9, list(range(ranks))), layout(ranks * 9, left)
    # The lost ranks' rows come from a replica each, on their neighbour.
    held = source.holders + tuple((r - 1, box) for r, box in source.holders if r % 10 == 3)
    source = Layout(source.shape, tuple(h for h in held if h[0] % 10 != 3))
    seconds = 0.0
    for i in range(tensors):
        took, plan = _timed(lambda: plan_transfers(source, target))
        seconds += took
        if i == 0:
            check_transfers(plan, target)
    return seconds, ranks * tensors


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    start = time.process_time()  # one thread computes: what else the machine does stays out
    result = call()
    return time.process_time() - start, result


KINDS: dict[str, Callable[[int, int], tuple[float, int]]] = {
    "save, cut over all ranks": save_sharded,
    f"save, {REPLICAS} replicas of each box": save_replicated,
    "transfers, a tenth of the ranks lost": transfers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--boxes", type=int, default=1_000_000, help="at most, on all ranks")
    parser.add_argument("--ranks", type=int, default=100_000, help="at most")
    parser.add_argument("--points", type=int, default=4, help="sizes of a curve, each 4 times")
    args = parser.parse_args()
    started = machine()
    rows: list[dict[str, Any]] = []
    fitted: dict[str, float] = {}
    largest: dict[str, float] = {}
    for kind, plan in KINDS.items():
        points: list[tuple[float, int]] = []
        for i in reversed(range(args.points)):
            ranks = max(REPLICAS * 10, args.ranks // 4**i // REPLICAS * REPLICAS)
            seconds, boxes = plan(ranks, args.boxes // 4**i)
            exponent = float("nan")
            if points:
                exponent = math.log(seconds / points[-1][0]) / math.log(boxes / points[-1][1])
            points.append((seconds, boxes))
            largest[kind] = seconds
            rows.append({
                "plan": kind,
                "ranks": ranks,
                "boxes": boxes,
                "processor s": seconds,
                "µs a box": seconds / boxes * 1e6,
                "exponent": exponent,
            })  # fmt: skip
        logs = np.log(np.array(points, dtype=float))
        fitted[kind] = float(np.polyfit(logs[:, 1], logs[:, 0], 1)[0])
    goals = [
        goal
        for kind in KINDS
        for goal in (
            Goal(f"{kind}: processor seconds", largest[kind], 60, 10, less_is_better=True),
            Goal(f"{kind}: exponent, fitted", fitted[kind], 1.1, 1.05,
                 less_is_better=True),
        )
    ]  # fmt: skip
    publish_tables(
        "planning",
        [("Plans, made and not run (measured)", rows)],
        vars(args),
        goals=goals,
        started=started,
    )


if __name__ == "__main__":
    main()
