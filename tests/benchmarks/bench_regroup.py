"""From a SIGKILL, or a hang, to the first collective of the next generation.

Small ranks with a real gloo group under a real agent; nothing is computed but a sum, whose value is
checked at every step. The parts: the agent knows; the last survivor is out of its collective; all
have said where they stand and the generation is decided; the group is made; the first step is done.

The parts of several numbers of ranks then give what a loss costs at sizes that nobody runs here
(`recovery_model`, *simulated*).

    python tests/benchmarks/bench_regroup.py [--worlds 2,4,8] [--kills 6] [--hang-s 2]
"""

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import recovery_model
from timing import Goal, machine, publish_tables

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import ranks
from elastic_node import Node, Nodes

PARTS = ("known", "out", "decided", "made", "first step")
#: Beyond the configured time of detection.
HANG_GOAL_S = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--worlds", default="2,4,8", help="numbers of ranks")
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--hang-s", type=float, default=2.0)
    parser.add_argument("--ranks", default="1000,10000,100000", help="that are simulated")
    options = parser.parse_args()
    started = machine()
    worlds = [int(world) for world in options.worlds.split(",")]
    rows: list[dict[str, Any]] = []
    killed: dict[int, list[float]] = {}
    for world in worlds:
        killed[world] = medians(signal.SIGKILL, world, 30.0, options.kills)
        rows.append(row("killed", world, killed[world]))
    hung = medians(signal.SIGSTOP, min(4, max(worlds)), options.hang_s, max(options.kills // 3, 1))
    rows.append(row("stopped", min(4, max(worlds)), hung))
    tables = [("From the signal until each part is done, ms (measured)", rows)]
    if len(worlds) > 2:
        parts = recovery_model.parts_of(killed, os.cpu_count() or 1)
        simulated = recovery_model.regrouping(parts, map(int, options.ranks.split(",")))
        tables.append(("What a loss costs at other sizes (simulated)", simulated))
    beyond = hung[-1] - options.hang_s
    publish_tables(
        "regroup", tables, vars(options), started=started,
        goals=[Goal("hang: first step beyond hang_s, s", beyond, HANG_GOAL_S, less_is_better=True)],
    )  # fmt: skip
    ranks.stop_server()


def row(what: str, world: int, parts: list[float]) -> dict[str, Any]:
    """One line of the table."""
    named = zip(PARTS, parts, strict=True)
    return {"rank": what, "of ranks": world, **{part: 1e3 * value for part, value in named}}


def medians(number: int, world: int, hang_s: float, count: int) -> list[float]:
    """Seconds from a signal until each part is done, each the median of some times."""
    with tempfile.TemporaryDirectory() as folder, Nodes(Path(folder)) as nodes:
        node = nodes.start(
            world,
            rules={"policy": "shrink_then_replace", "hang_s": hang_s, "repeats": 10**6},
            trainer={"group": True, "pause": 0.005},
        )
        rows = [measure(node, number, world) for _ in range(count)]
        nodes.enough()
        assert node.end()["state"] == "done"
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def measure(node: Node, number: int, world: int) -> list[float]:
    """Seconds from the signal until each part was done; returns once all are complete again."""
    views = node.events("generation")
    while len(views[-1:]) == 0 or len(views[-1]["members"]) < world:
        time.sleep(0.02)
        views = node.events("generation")
    view = views[-1]
    for member in view["members"]:
        node.await_first_step(member, view["generation"])
    time.sleep(0.5)
    victim = view["members"][len(views) % world]
    survivors = [member for member in view["members"] if member != victim]
    pid, start = node.pid_of(victim), time.time()
    os.kill(pid, number)
    following = view["generation"] + 1
    for member in survivors:
        node.await_first_step(member, following)

    def last(kind: str) -> float:
        """When the last survivor told of something, the first time since the signal."""
        return max(
            next(line["at"] for line in node.journal(member, kind) if line["at"] >= start)
            for member in survivors
        )

    known = next(e["at"] for e in node.events("lost") if e["member"] == victim)
    decided = node.await_generation(following)["at"]
    parts = (known, last("failed"), decided, last("rebuilt"), last("first"))
    return [at - start for at in parts]


if __name__ == "__main__":
    main()
