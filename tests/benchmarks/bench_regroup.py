"""From a SIGKILL, or a hang, to the first collective of the next generation.

Small ranks with a real gloo group under a real agent; nothing is computed but a sum, whose value is
checked at every step. The parts: the agent knows; the last survivor is out of its collective; all
have said where they stand and the generation is decided; the group is made; the first step is done.

    python tests/benchmarks/bench_regroup.py [--ranks 4] [--kills 6] [--hang-s 2]
"""

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import ranks
from elastic_node import Node, Nodes

PARTS = ("known", "out", "decided", "made", "first step")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--hang-s", type=float, default=2.0)
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors; ms since the signal")
    print(f"{'':24}" + "".join(f"{part:>12}" for part in PARTS))
    for number, name in ((signal.SIGKILL, "killed"), (signal.SIGSTOP, "stopped")):
        hang_s = options.hang_s if number == signal.SIGSTOP else 30.0
        count = options.kills if number == signal.SIGKILL else max(options.kills // 3, 1)
        with tempfile.TemporaryDirectory() as folder, Nodes(Path(folder)) as nodes:
            node = nodes.start(
                options.ranks,
                rules={"policy": "shrink_then_replace", "hang_s": hang_s, "repeats": 10**6},
                trainer={"group": True, "pause": 0.005},
            )
            rows = [measure(node, number, options.ranks) for _ in range(count)]
            nodes.enough()
            assert node.end()["state"] == "done"
        for row in (*rows, [statistics.median(column) for column in zip(*rows, strict=True)]):
            label = f"{name}, median" if row not in rows else f"{name} of {options.ranks}"
            print(f"{label:24}" + "".join(f"{1e3 * value:12.1f}" for value in row))
        if number == signal.SIGSTOP:
            beyond = statistics.median(row[-1] for row in rows) - hang_s
            print(f"beyond the detection time of {hang_s:g} s: {1e3 * beyond:.0f} ms")
    ranks.stop_server()


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
