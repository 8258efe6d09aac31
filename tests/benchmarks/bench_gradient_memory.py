"""Memory that summing gradients along the fixed tree takes beyond plain DDP, measured.

Two ranks, each with half of the micro-batches. The peak of the resident memory of a rank over some
steps, the high-water mark of the kernel, set back before them; the model's activations are small.
DDP has the gradient and its buckets; the reducer has the gradient, and as many open sums as the
tree is deep. Both sums are compared with each other, about.

Run: ``make bench SUITE=gradient_memory``, or
``python tests/benchmarks/bench_gradient_memory.py [--mb 64] [--leaves 1,2,4,8,16,24]``.
"""

import argparse
import contextlib
import math
import re
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timing import Goal, NotMeasured, machine, publish_tables
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from ranks import run_ranks, stop_server
from reductions import transport_here

from planaria.core.deadline import Deadline
from planaria.elastic.reduction import GradientReducer, assign

WORLD, WIDTH, STEPS = 2, 1024, 3


def peak() -> int:
    """The high-water mark of this process's resident memory, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def set_back() -> None:
    """Sets it back to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def model_of(mb: int) -> torch.nn.Module:
    torch.manual_seed(1)
    layers = [torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(mb >> 2)]
    return torch.nn.Sequential(*layers)


def example(index: int) -> torch.Tensor:
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(index))


def one_rank(rank: int, way: str, mb: int, leaves: int) -> tuple[int, float]:
    """The peak of a rank in bytes beyond what there was before, and a norm of the sum."""
    model = model_of(mb)
    parameters = dict(model.named_parameters())
    share = assign(leaves, WORLD)
    total = 0.0
    set_back()
    before = peak()
    if way == "plain":
        wrapped = DistributedDataParallel(model)
        mine = range(rank * leaves // WORLD, (rank + 1) * leaves // WORLD)
        for _ in range(STEPS):
            wrapped.zero_grad()
            for index in mine:
                last = index == mine[-1]
                with contextlib.nullcontext() if last else wrapped.no_sync():
                    (wrapped(example(index)).square().sum() * (WORLD / leaves)).backward()
        total = sum(p.grad.square().sum().item() for p in parameters.values() if p.grad is not None)
        return peak() - before, total
    reducer = GradientReducer(parameters, leaves, share, transport_here(way))
    for _ in range(STEPS):
        reducer.begin(Deadline(60))
        for index in reducer.order:
            with reducer.micro_batch(index):
                model(example(index)).square().sum().backward()
        reduced = reducer.finish()
        total = sum(value.square().sum().item() for value in reduced.segments.values())
    most = peak() - before
    reducer.close()
    dist.barrier()
    return most, total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mb", type=int, default=64)
    parser.add_argument("--leaves", default="1,2,4,8,12,16", help="of a rank")
    args = parser.parse_args()
    started = machine()
    rows: list[dict[str, Any]] = []
    worst = 0.0
    for leaves in map(int, args.leaves.split(",")):
        found = {}
        for way in ("plain", "tree"):
            ranks = run_ranks(WORLD, one_rank, way, args.mb, WORLD * leaves, timeout=300)
            found[way] = max(each for each, _ in ranks), ranks[0][1]
        if not math.isclose(found["plain"][1], found["tree"][1], rel_tol=1e-3):
            raise NotMeasured(f"{leaves} leaves: the sums differ: {found}")
        plain, tree = (found[way][0] / (args.mb << 20) for way in ("plain", "tree"))
        bound = math.floor(math.log2(leaves)) + 1
        worst = max(worst, (tree - plain) / bound)
        rows.append({"leaves of a rank": leaves, "DDP": plain, "tree": tree,
                     "beyond DDP": tree - plain, "floor(log2 leaves) + 1": bound})  # fmt: skip
    title = f"Peak of a rank beyond the model, in sizes of its gradient ({args.mb} MB, measured)"
    goal = "gradient memory beyond DDP / (floor(log2 leaves) + 1), at worst"
    publish_tables(
        "gradient_memory", [(title, rows)], vars(args),
        goals=[Goal(goal, worst, 1.0, less_is_better=True)], started=started,
    )  # fmt: skip
    stop_server()


if __name__ == "__main__":
    main()
