"""The fixed tree between ranks against a plain all-reduce of the same bytes, over gloo.

Every rank holds the sums of its nodes, in buckets of 25 MB; timed is from there until all ranks
have the result (or, "to owners", each its part of it). The local sums, which plain accumulation has
as well, are not counted. Results are compared with a sum along the tree by one process, bit for
bit.

Run: ``make bench SUITE=reduction``, or
``python tests/benchmarks/bench_reduction.py [--mb 64] [--turns 7]``.
"""

import argparse
import functools
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from ranks import run_ranks
from timing import Goal, NotMeasured, Turns, machine, publish_tables, rows_of

from planaria.core.deadline import Deadline
from planaria.elastic.reduction.assignment import Assignment, assign, contiguous
from planaria.elastic.reduction.buckets import BUCKET_BYTES
from planaria.elastic.reduction.exchange import Exchange, even_bounds
from planaria.elastic.reduction.transport import GroupTransport, own_group
from planaria.elastic.reduction.tree import Node, root
from planaria.elastic.reduction.worker import ReductionThread

BUDGET_S = 120.0
CHECKED = 50_000
PLAIN, TREE, RUNS, OWNERS = "all-reduce", "planaria", "tree, runs of leaves", "tree, to owners"


@functools.cache
def node_sum(node: Node) -> torch.Tensor:
    """What the elements that are checked add up to: leaves are random, of unlike magnitudes."""
    if node.size == 1:
        generator = torch.Generator().manual_seed(node.start)
        return torch.randn(CHECKED, generator=generator) * 10.0 ** (node.start % 5)
    left, right = node.children()
    return node_sum(left) + node_sum(right)


class Case:
    """One world on one rank: its sums, and each way to add them up."""

    def __init__(self, leaves: int, numel: int) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.leaves = leaves
        size = BUCKET_BYTES // 4
        self.sizes = [min(size, numel - at) for at in range(0, numel, size)]
        self.out = [torch.zeros(n) for n in self.sizes]
        store = dist.PrefixStore("bench", dist.distributed_c10d._get_default_store())
        group = own_group(store, self.rank, self.world, BUDGET_S)
        self.transport, self.group = GroupTransport(group), group.group
        self.thread = ReductionThread()
        self.sums: dict[Node, list[torch.Tensor]] = {}

    def hold(self, node: Node) -> list[torch.Tensor]:
        """The sums of a node, made on first use."""
        if node not in self.sums:
            buckets = [torch.ones(n) for n in self.sizes]
            for bucket in buckets:
                bucket[:CHECKED] = node_sum(node)
            self.sums[node] = buckets
        return self.sums[node]

    def plain(self) -> None:
        """All buckets at a time, as DDP does."""
        works = [self.group.allreduce([t]) for t in self.out]
        for work in works:
            work.wait(timedelta(seconds=BUDGET_S))

    def tree(self, exchange: Exchange, assignment: Assignment, *, gather: bool) -> None:
        """As the reducer does."""
        deadline = Deadline(BUDGET_S)
        for i, out in enumerate(self.out):
            sums = {node: self.hold(node)[i] for node in assignment.nodes[self.rank]}
            bounds = even_bounds(out.numel(), self.world)
            part = out if gather else out[bounds[self.rank] : bounds[self.rank + 1]]
            start = functools.partial(exchange.start, i, sums, bounds, part, whole=gather)
            self.thread.submit(start, deadline)
        self.thread.wait(deadline)

    def check(self, *, gather: bool) -> None:
        """Compares with the tree of one process."""
        expected = node_sum(root(self.leaves))
        for out in self.out:
            part = even_bounds(out.numel(), self.world)
            a, b = (0, out.numel()) if gather else (part[self.rank], part[self.rank + 1])
            a, b = min(a, CHECKED), min(b, CHECKED)
            if not torch.equal(out[a:b].view(torch.int32), expected[a:b].view(torch.int32)):
                raise NotMeasured("the bits differ from those of one process")


def one_rank(rank: int, leaves: int, numel: int, turns: int) -> dict[str, list[float]]:
    """Times every way in turn; each turn counts until the last rank is done."""
    case = Case(leaves, numel)
    trees = {TREE: assign(leaves, case.world), RUNS: contiguous(leaves, case.world)}
    ways: dict[str, tuple[Callable[[], None], bool | None]] = {PLAIN: (case.plain, None)}
    for name, assignment in trees.items():
        exchange = Exchange(assignment, case.transport)
        ways[name] = (
            functools.partial(case.tree, exchange, assignment, gather=True),
            True,
        )
        if name == TREE:
            ways[OWNERS] = (
                functools.partial(case.tree, exchange, assignment, gather=False),
                False,
            )
    if trees[TREE].sent == trees[RUNS].sent:
        del ways[RUNS]
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1, turns):
        for name, (run, gather) in ways.items():
            for out in case.out:
                out.fill_(1.0)
            dist.barrier()
            start = time.perf_counter()
            run()
            dist.barrier()
            if turn >= 0:
                found[name].append(time.perf_counter() - start)
            if gather is not None:
                case.check(gather=gather)
    case.thread.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mb", type=int, default=64, help="gradient in float32, in MB")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--worlds", default="2,3,4,5,6,7")
    args = parser.parse_args()
    started = machine()
    tables: list[tuple[str, list[dict[str, Any]]]] = []
    volumes: list[dict[str, Any]] = []
    goals: list[Goal] = []
    for world in map(int, args.worlds.split(",")):
        for leaves in (8, 24):
            planned, runs = assign(leaves, world), contiguous(leaves, world)
            volumes.append({
                "ranks": world,
                "leaves": leaves,
                "balance": planned.balance,
                "sent / least": planned.volume,
                "by runs of leaves": runs.volume,
                "scatter alone": planned.sent / planned.least_sent,
                "with 1 leaf of slack": assign(leaves, world, slack=1).volume,
            })  # fmt: skip
        leaves = 8 if 8 % world == 0 else 24
        found = run_ranks(world, one_rank, leaves, args.mb << 18, args.turns, timeout=900)
        turns = Turns(found[0])
        tables.append((
            f"Adding up {args.mb} MB over {world} ranks, {leaves} leaves (measured)",
            rows_of(turns, PLAIN),
        ))  # fmt: skip
        if leaves == 8:
            ratio = turns.ratio(TREE, PLAIN)["median"]
            goals.append(
                Goal(f"{world} ranks: time of a plain all-reduce", ratio, 1.3, 1.0,
                     less_is_better=True)
            )  # fmt: skip
    tables.append(("Gradients sent, scatter and gather, over the least there is", volumes))
    publish_tables("reduction", tables, vars(args), goals=goals, started=started)


if __name__ == "__main__":
    main()
