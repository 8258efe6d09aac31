"""A job without torch for drills: an agent that starts ranks, and again those that were killed.

    python drill_job.py STEPS WORLD FOLDER [SECONDS_PER_STEP] [wrong] [hold=FAULTS[@NAME]]

Each rank goes on from a file of its own, and its losses depend on the step alone. "wrong" makes the
loss after a restart differ in the last bit, as a trainer's would that has forgotten something.
With "hold" no rank takes its last step before so many faults have befallen ranks (one that was
killed, or one that was stopped and goes on, counts once): whoever makes them may be late. With a
name that is so where the working folder's parent is called so, as it is in one of two runs.
"""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from planaria.elastic.faults import record


def rank(steps: int, world: int, folder: Path, seconds: float, wrong: bool, faults: int) -> None:
    me = os.environ["RANK"]
    signal.signal(signal.SIGCONT, lambda *_: befell(folder, f"stopped-{me}"))
    state = folder / f"state-{me}"
    first = int(state.read_text()) if state.exists() else 0
    for step in range(first + 1, steps + 1):
        time.sleep(seconds)
        while step == steps and len([*folder.glob("befell-*")]) < faults:
            time.sleep(0.01)
        loss = 1 / step
        if wrong and first:
            loss = math.nextafter(loss, 2)
        state.with_suffix(".new").write_text(str(step))
        state.with_suffix(".new").rename(state)
        while len([*folder.glob("state-?")]) < world:  # who has done nothing can forget nothing
            time.sleep(0.01)
        record(step, loss)


def befell(folder: Path, what: str) -> None:
    (folder / f"befell-{what}").touch()


def to_wait_for(words: list[str]) -> int:
    """How many faults."""
    for word in words:
        count, _, name = word.removeprefix("hold=").partition("@")
        if word.startswith("hold=") and name in ("", Path.cwd().parent.name):
            return int(count)
    return 0


def agent(argv: list[str], world: int, folder: Path) -> None:
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
                befell(folder, f"killed-{each}")
                running[each] = start(each)


if __name__ == "__main__":
    steps, world, folder, *rest = sys.argv[1:]
    if "RANK" in os.environ:
        seconds = next((word for word in rest if word[0].isdigit()), "0.02")
        faults = to_wait_for(rest)
        rank(int(steps), int(world), Path(folder), float(seconds), "wrong" in rest, faults)
    else:
        agent(sys.argv, int(world), Path(folder))
