"""How much host memory checkpoints take beyond the state, at their peak.

Each library runs in a process of its own that holds the state and nothing else. This process
samples the memory of that one and of all it starts: anonymous and shared pages, each counted once
(PSS); not the page cache. The peak before the library is used is the baseline, taken over the same
training steps (or changes of the state); what the peak of saves, or of a load, has on top is shown.

Run: ``make bench SUITE=memory``, or
``python tests/benchmarks/bench_memory.py [--mb 256] [--saves 3]``.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from backgrounds import BACKGROUNDS, Background
from peers import LIBRARIES, Library
from states import State
from timing import Goal, NotMeasured, machine, publish_tables
from training import Training, check_saved

SAMPLE_S = 0.005
SLACK_MB = 64


class Peak:
    """The largest memory of a process and its descendants, phase by phase.

    Args:
        pid: The process.
    """

    def __init__(self, pid: int) -> None:
        self._pid, self._highest, self._samples = pid, 0, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def take(self) -> tuple[int, int]:
        """The peak in bytes since the last call, and of how many samples."""
        time.sleep(2 * SAMPLE_S)
        result = self._highest, self._samples
        self._highest, self._samples = 0, 0
        return result

    def close(self) -> None:
        """Ends sampling."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self._highest = max(self._highest, sum(map(held, tree(self._pid))))
            self._samples += 1


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found, at = [pid], 0
    while at < len(found):
        try:
            for task in Path(f"/proc/{found[at]}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        except OSError:  # gone
            pass
        at += 1
    return found


def held(pid: int) -> int:
    """Bytes of anonymous and shared memory that a process holds, its part where it shares."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in text.splitlines()[1:] if ":" in line)
    return sum(int(fields[key].split()[0]) << 10 for key in ("Pss_Anon", "Pss_Shmem"))


def child(kind: str, name: str, mb: int, pool_mb: int, saves: int, root: str) -> None:
    """The process that is measured: says when a phase has ended, and waits to be let on."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folder = Path(root)

    def phase(work: Callable[[], Any]) -> Any:
        result = work()
        print("PHASE", flush=True)
        sys.stdin.readline()
        return result

    options = {"pool_bytes": pool_mb << 20} if name == "planaria" else {}
    if kind == "library":
        state = State(64, (mb << 20) // 64 // 4)

        def idle() -> None:
            for i in range(saves):
                state.renew(i)

        def save() -> Library:
            library = {k.name: k for k in LIBRARIES}[name](state, folder, **options)
            for i in range(1, saves + 1):
                state.renew(i)
                library.save(i)
            return library

        phase(idle)
        library = phase(save)
        phase(lambda: library.load(saves))
        expected = state.copy()
        state.clear()
        library.load(saves)
        state.check(expected)
        library.close()
        return
    training = Training("one", mb << 20, mb / 1000)

    def steps() -> None:
        # Its peak is short, and none may be missed by the samples that saves are compared with.
        for _ in range(4 * saves):
            training.forward_backward()
            training.update()

    def train() -> Background:
        background = {k.name: k for k in BACKGROUNDS}[name](
            training.model, training.optim, folder, None, **options
        )
        for i in range(1, saves + 1):
            pending = background.start(i, background.state_dict())
            training.forward_backward()
            pending.gate()
            training.update()
            pending.durable()
        return background

    phase(steps)
    background = phase(train)
    pending = background.start(saves + 1, background.state_dict())
    pending.gate()
    pending.durable()
    phase(lambda: None)  # reading back is for the check, and not measured
    check_saved(background, saves + 1)
    background.close()


def measure(kind: str, name: str, mb: int, pool_mb: int, saves: int) -> dict[str, Any]:
    """One library in a process of its own.

    Raises:
        NotMeasured: It failed.
    """
    with tempfile.TemporaryDirectory() as root:
        arguments = [kind, name, str(mb), str(pool_mb), str(saves), root]
        process = subprocess.Popen(
            [sys.executable, __file__, "--child", *arguments],
            # What is freed is given back at once: what is counted is in use.
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        peak = Peak(process.pid)
        errors: list[str] = []
        assert process.stdin is not None
        assert process.stdout is not None
        reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True)
        reader.start()
        phases: list[tuple[int, int]] = []
        try:
            for line in process.stdout:
                if line.strip() == "PHASE":
                    phases.append(peak.take())
                    process.stdin.write("\n")
                    process.stdin.flush()
            code = process.wait(60)
        finally:
            process.kill()
            process.wait()
            peak.close()
            reader.join(5)
        if code != 0 or len(phases) < 3:
            last = [line.strip() for line in errors if line.strip()][-1:] or ["no message"]
            raise NotMeasured(f"exit code {code}: {last[0][:200]}")
    (base, _), (saving, samples), (loading, _) = phases
    return {
        "save: beyond the state, MB": (saving - base) / 2**20,
        "times the state": (saving - base) / (mb << 20),
        "load: beyond the state, MB": (loading - base) / 2**20 if kind == "library"
        else float("nan"),
        "samples": samples,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mb", type=int, default=256, help="size of the state")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--only", default="", help="libraries to measure, with commas")
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, name, mb, pool_mb, saves, root = args.child
        child(kind, name, int(mb), int(pool_mb), int(saves), root)
        return
    started = machine()
    failures: dict[str, str] = {}
    goals: list[Goal] = []
    tables = []
    pools = {"a pool of the state": args.mb, "a pool of a quarter": args.mb // 4}
    for kind, kinds, what in (
        ("library", LIBRARIES, "saves that are waited for"),
        ("background", BACKGROUNDS, "saves in the background of a training"),
    ):
        rows: list[dict[str, Any]] = []
        for library in kinds:
            if args.only and library.name not in args.only.split(","):
                continue
            ours = library.name == "planaria"
            for label, pool in pools.items() if ours else (("", 0),):
                try:
                    row = measure(kind, library.name, args.mb, pool, args.saves)
                except NotMeasured as error:
                    if ours:
                        raise
                    failures[library.name] = str(error)
                    continue
                beyond = row["save: beyond the state, MB"]
                rows.append({
                    "variant": f"{library.name}, {label}" if label else library.name,
                    **row,
                    "beyond its pool, MB": beyond - pool if ours else float("nan"),
                })  # fmt: skip
                if ours:
                    goals.append(Goal(f"{what}, {label}: MB beyond state and pool",
                                      beyond - pool, SLACK_MB, less_is_better=True))  # fmt: skip
        tables.append((f"Peak host memory, {what}, {args.mb} MB of state (measured)", rows))
    settings = {kind.name: kind.settings for kind in (*LIBRARIES, *BACKGROUNDS)}
    publish_tables(
        "memory",
        tables,
        {k: v for k, v in vars(args).items() if k != "child"},
        goals=goals,
        peers=settings,
        failures=failures,
        started=started,
    )


if __name__ == "__main__":
    main()
