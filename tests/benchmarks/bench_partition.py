"""Owners of blocks when ranks go and come: bytes moved over the least there is, and planning time.

A transformer's parameters are cut into blocks and spread over ranks; then ranks are lost or join.
Nothing is sent, plans are only made. Each is checked: every block has one owner, who is there, and
no rank has more than the average and one block. Then the same with a shadow of each block, on nodes
of 8 ranks where there are so many: owner and shadow are on different ones.

Run: ``make bench SUITE=partition``, or
``python tests/benchmarks/bench_partition.py [--blocks 100000]``.
"""

import argparse
import math
import time
from typing import Any

from timing import Goal, NotMeasured, machine, publish_tables

from planaria.elastic.partition.blocks import Block, cut
from planaria.elastic.partition.holders import fills, place, replace
from planaria.elastic.partition.moves import plan_moves
from planaria.elastic.partition.owners import Partition, least_moved, respread, spread

DIM = 1024
BLOCK = 1 << 16
CHANGES = {
    "1 of 4 lost": (range(4), range(3)),
    "2 of 4 lost": (range(4), range(2)),
    "4, then 5": (range(4), range(5)),
    "3 of 8 lost, 1 new": (range(8), [0, 1, 3, 5, 6, 9]),
    "a tenth of 1000 lost": (range(1000), [r for r in range(1000) if r % 10 != 3]),
    "1000, then 1100": (range(1000), range(1100)),
}

#: With shadows: ranks before, and after.
COPIES = {
    "1 of 4 lost": (range(4), range(3)),
    "4, then 5": (range(4), range(5)),
    "8 of 64 lost": (range(64), range(8, 64)),
    "64, then 72": (range(64), range(72)),
    "8 of 1000 lost": (range(1000), range(8, 1000)),
    "1000, then 1008": (range(1000), range(1008)),
}


def model(layers: int) -> dict[str, tuple[int, ...]]:
    """A transformer's shapes: about 192 blocks a layer."""
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (32 * DIM, DIM)}
    for i in range(layers):
        for name, rows in (("qkv", 3), ("out", 1), ("up", 4), ("down", 4)):
            shapes[f"layers.{i}.{name}.weight"] = (rows * DIM, DIM)
            shapes[f"layers.{i}.{name}.bias"] = (rows * DIM,)
        shapes[f"layers.{i}.norm.weight"] = (DIM,)
    return shapes


def check(partition: Partition, ranks: list[int]) -> None:
    """Refuses a partition that is not what is promised.

    Raises:
        NotMeasured: It is not.
    """
    loads = partition.loads()
    total, largest = sum(loads.values()), max(b.nbytes for b in partition.blocks)
    if set(partition.owners) - set(ranks) or len(partition.owners) != len(partition.blocks):
        raise NotMeasured("a block has no owner that is there")
    if max(loads.values()) > total / len(ranks) + largest:
        raise NotMeasured("a rank has more than the average and one block")


def with_copies(blocks: list[Block], before: range, after: range) -> tuple[float, float, float]:
    """Plans a change with a shadow of each block.

    Returns:
        Bytes sent over the least there is, and processor seconds of the first placement and of the
        one after the change.

    Raises:
        NotMeasured: A block has no shadow, or one on its owner's node.
    """
    nodes = {rank: str(rank // 8) for rank in (*before, *after)} if len(before) > 8 else {}
    begin = time.process_time()
    old = place(blocks, before, 1, nodes)
    first = time.process_time() - begin
    left = set(before) & set(after)
    owned = {rank: each for rank, each in old.partition.owned().items() if rank in left}
    held = {rank: each for rank, each in old.held().items() if rank in left}
    begin = time.process_time()
    new = replace(blocks, after, 1, owned, held, nodes=nodes)
    plan = fills(new, held)
    seconds = time.process_time() - begin
    check(new.partition, list(after))
    where = [{nodes.get(rank, rank) for rank in new.holders(i)} for i in range(len(blocks))]
    if plan.recovered or any(len(each) != 2 for each in where):
        raise NotMeasured("a block has no second copy on another node")
    total = sum(block.nbytes for block in blocks)
    gone = sum(b.nbytes * sum(r not in left for r in old.holders(i)) for i, b in enumerate(blocks))
    came = 2 * total * len(set(after) - left) / len(after)
    return plan.nbytes / max(gone, came), first, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=100_000, help="at most")
    args = parser.parse_args()
    started = machine()
    moved: list[dict[str, Any]] = []
    times: list[dict[str, Any]] = []
    worst = 0.0
    layers = max(1, args.blocks // 200)
    last: tuple[float, int] | None = None
    exponent = float("nan")
    for divisor in (16, 4, 1):
        blocks = cut(model(max(1, layers // divisor)), numel=BLOCK)
        seconds = 0.0
        for name, (before, after) in CHANGES.items():
            ranks = list(after)
            old = spread(blocks, before)
            begin = time.process_time()
            new = respread(old, ranks)
            plan = plan_moves(old, new)
            seconds = time.process_time() - begin
            check(new, ranks)
            if divisor == 1:
                ratio = plan.nbytes / least_moved(old, ranks)
                loads = new.loads().values()
                worst = max(worst, ratio)
                moved.append({
                    "change": name,
                    "blocks": len(blocks),
                    "moved / least": ratio,
                    "largest / average": max(loads) * len(ranks) / sum(loads),
                    "processor s": seconds,
                })  # fmt: skip
        if last is not None:
            exponent = math.log(seconds / last[0]) / math.log(len(blocks) / last[1])
        last = seconds, len(blocks)
        times.append({"change": list(CHANGES)[-1], "blocks": len(blocks), "processor s": seconds,
                      "exponent": exponent})  # fmt: skip
    copies: list[dict[str, Any]] = []
    for name, (before, after) in COPIES.items():
        sent, first, seconds = with_copies(blocks, before, after)
        copies.append({"change": name, "blocks": len(blocks), "sent / least": sent,
                       "processor s, first": first, "processor s": seconds})  # fmt: skip
    most = max(change["sent / least"] for change in copies)
    publish_tables(
        "partition",
        [("Bytes that change their owner (planned)", moved),
         ("Time to plan (measured)", times),
         ("With a shadow of each block (planned)", copies)],
        vars(args),
        goals=[
            Goal("bytes moved / least, at worst", worst, 1.05, 1.0, less_is_better=True),
            Goal("exponent of the planning time", exponent, 1.15, 1.05, less_is_better=True),
            Goal("with shadows: bytes sent / least", most, 1.05, 1.0, less_is_better=True),
        ],
        started=started,
    )  # fmt: skip


if __name__ == "__main__":
    main()
