"""A job without torch for drills: an agent that starts ranks, and again those that were killed.

    python drill_job.py STEPS WORLD FOLDER [SECONDS_PER_STEP] [wrong]

Each rank goes on from a file of its own, and its losses depend on the step alone. "wrong" makes the
loss after a restart differ in the last bit, as a trainer's would that has forgotten something.
"""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

from planaria.elastic.faults import record


def rank(steps: int, folder: Path, seconds: float, wrong: bool) -> None:
    state = folder / f"state-{os.environ['RANK']}"
    first = int(state.read_text()) if state.exists() else 0
    for step in range(first + 1, steps + 1):
        time.sleep(seconds)
        loss = 1 / step
        if wrong and first:
            loss = math.nextafter(loss, 2)
        state.with_suffix(".new").write_text(str(step))
        state.with_suffix(".new").rename(state)
        record(step, loss)


def agent(argv: list[str], world: int) -> None:
    def start(rank: int) -> subprocess.Popen[bytes]:
        env = {**os.environ, "RANK": str(rank), "MASTER_PORT": "1"}
        return subprocess.Popen([sys.executable, *argv], env=env)

    running = {rank: start(rank) for rank in range(world)}
    while running:
        time.sleep(0.01)
        for each, process in list(running.items()):
            code = process.poll()
            if code == 0:
                del running[each]
            elif code is not None:
                running[each] = start(each)


if __name__ == "__main__":
    steps, world, folder, *rest = sys.argv[1:]
    if "RANK" in os.environ:
        rank(int(steps), Path(folder), float((rest or ["0.02"])[0]), "wrong" in rest)
    else:
        agent(sys.argv, int(world))
