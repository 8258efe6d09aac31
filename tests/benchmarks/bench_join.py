"""What a rank that joins costs the others: the pauses at step boundaries, and the step in between.

Three ranks in a session, one more joins. Its share of the optimizer's state is sent while it looks
on for a step; or, as a variant for comparison, at the boundary after that step, while all wait.
Computing is emulated by a wait in each micro-batch, added to a real pass (*emulated compute*); the
losses of all are compared with those of one rank, bit for bit.

Three figures, each beyond what an undisturbed step or boundary takes: the boundary at which the new
rank is connected and welcomed, the step that it looks on in, the boundary at which it gets its
blocks and its work.

Run: ``make bench SUITE=join``, or
``python tests/benchmarks/bench_join.py [--mb 132] [--wait 0.1] [--turns 3]``.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timing import NotMeasured, machine, publish_tables

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from members import LocalMembers
from ranks import run_ranks, stop_server

from planaria.core.deadline import Deadline
from planaria.elastic import GlobalBatch, Session
from planaria.elastic.membership import Alone, connect
from planaria.elastic.membership.rules import Rules
from planaria.elastic.partition.holders import fills
from planaria.elastic.partition.transfer import transfer
from planaria.elastic.updates import BlockUpdater

WORLD, WIDTH, MICRO_BATCHES, STEPS, LATE = 3, 512, 12, 10, 4
AHEAD, BOUNDARY = "while it looks on", "at the boundary"
#: Of a linear layer: the model's bytes, and those of the state with AdamW.
LAYER_MB = 4 * WIDTH * WIDTH / 1e6
STATE = 3


class Vectors:
    """Random vectors."""

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))


def move_at_the_boundary() -> None:
    """Has blocks wait for the boundary, in this process."""

    def promote(self: Any) -> None:
        placement, later, sharded = self.placement, self._later, self.sharded
        ranks = placement.partition.ranks
        held = {rank: placement.of(rank) for rank in ranks}
        transfer(fills(later, held).moves, ranks, sharded, sharded.transport, Deadline(60))
        sharded.adopt(later, sharded.transport)
        self._later = self._ahead = None

    every: Any = BlockUpdater
    every.send_ahead = lambda self, deadline, budget: None
    every.ready = True
    every.segments = lambda self: self.placement.segments()
    every.promote = promote


def train(membership: Any, way: str, options: dict[str, Any]) -> dict[str, Any]:
    """One rank's run."""
    torch.manual_seed(1)
    torch.set_num_threads(1)
    if way == BOUNDARY:
        move_at_the_boundary()
    count = round(options["mb"] / STATE / LAYER_MB)
    layers = [torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count)]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    data = GlobalBatch(Vectors(), 2 * MICRO_BATCHES, 2, seed=1)
    begins: dict[int, float] = {}
    ends: dict[int, float] = {}
    losses: dict[int, float] = {}
    worked: list[int] = []
    with Session(model, optimizer, data, steps=STEPS, membership=membership) as session:
        for step in session:
            begins[step.number] = time.monotonic()
            if step.number == LATE and session.view.world_size == WORLD:
                Path(options["called"]).touch()
                while membership.change_wanted() != "join":
                    time.sleep(0.002)
            with step:
                for batch in step.micro_batches():
                    worked.append(step.number)
                    time.sleep(options["wait"])
                    step.backward(model(batch).square().mean())
            if step.committed:
                ends[step.number], losses[step.number] = time.monotonic(), step.metrics["loss"]
    return {"begins": begins, "ends": ends, "losses": losses, "worked": worked}


def alone(rank: int, options: dict[str, Any]) -> dict[str, Any]:
    """The same on one rank."""
    return train(Alone(), AHEAD, {**options, "wait": 0.0})


def member(me: int, way: str, options: dict[str, Any]) -> dict[str, Any]:
    """One of several; the last one asks to take part once it is waited for."""
    membership = connect()
    while me == WORLD and not Path(options["called"]).exists():
        time.sleep(0.01)
    return train(membership, way, options)


def measure(
    way: str, options: dict[str, Any], reference: dict[int, float]
) -> tuple[float, float, float, float]:
    """Seconds that each part takes longer, and a step's, with one more run."""
    rules = Rules(WORLD, maximum=WORLD + 1)
    with tempfile.TemporaryDirectory() as folder:
        options = {**options, "called": str(Path(folder) / "called")}
        with LocalMembers(WORLD, member, way, options, rules=rules, timeout=280) as job:
            job.await_generation(1)
            job.add()
            results = job.wait()
    found = []
    for me, result in results.items():
        if result.value is None:
            raise NotMeasured(f"{way}: rank {me}: {result.error}")
        losses = result.value["losses"]
        if any(reference[n] != loss for n, loss in losses.items()):
            raise NotMeasured(f"{way}: losses are not those of one rank")
        found.append(result.value)
    first = min(found[WORLD]["worked"])  # the first step that the new one has work in
    return parts_of(found[:WORLD], first)


def parts_of(found: Sequence[dict[str, Any]], first: int) -> tuple[float, float, float, float]:
    """Both pauses, how much longer the steps looked on in take, and a step's own time."""

    def pause(n: int) -> float:
        return max(each["begins"][n] for each in found) - max(e["ends"][n - 1] for e in found)

    def length(n: int) -> float:
        return max(each["ends"][n] for each in found) - max(e["begins"][n] for e in found)

    normal = [*range(2, LATE), *range(first + 1, STEPS)]
    boundary = statistics.median(map(pause, normal))
    step = statistics.median(map(length, range(1, LATE)))
    longer = sum(length(n) - step for n in range(LATE + 1, first))
    return pause(LATE + 1) - boundary, longer, pause(first) - boundary, step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mb", type=float, default=132, help="of the optimizer's state")
    parser.add_argument("--wait", type=float, default=0.1, help="seconds in each micro-batch")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    started = machine()
    options = vars(args)
    (one,) = run_ranks(1, alone, options, init_group=False, timeout=280)
    found: dict[str, list[tuple[float, float, float, float]]] = {AHEAD: [], BOUNDARY: []}
    for _ in range(args.turns):
        for way, values in found.items():
            values.append(measure(way, options, one["losses"]))
    rows = []
    for way, values in found.items():
        columns = zip(*values, strict=True)
        welcome, longer, promote, step = map(statistics.median, columns)
        rows.append({
            "blocks are sent": way,
            "welcomed, s": welcome,
            "looked on, s": longer,
            "takes part, s": promote,
            "takes part, max s": max(value[2] for value in values),
            "in all, s": statistics.median(sum(value[:3]) for value in values),
            "last pause, share of a step": promote / step,
            "a step, s": step,
        })  # fmt: skip
    title = f"One more rank beside {WORLD}, {args.mb:g} MB of state: beyond undisturbed steps"
    publish_tables("join", [(f"{title} (emulated compute)", rows)], options, started=started)
    stop_server()


if __name__ == "__main__":
    main()
