"""How long training stands still when a rank is killed: Session, torchft, torchrun with DCP.

Four ranks train the same model; one gets SIGKILL right after it has recorded a step. The pause is
the time from the last step before to the first new one after, by whichever rank recorded them
first, without a normal step. All that have no figure say why. Where a run promises the losses of an
undisturbed one (Session, and the restart), they are compared bit by bit, and a run that breaks its
promise has no figure; torchft goes on with a smaller batch.

Run: ``make bench SUITE=recovery``, or
``python tests/benchmarks/bench_recovery.py [--turns 3] [--worlds 2,4,6]``.
"""

import argparse
import contextlib
import importlib
import importlib.util
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import recovery_model
from timing import Goal, NotMeasured, Turns, in_turn, machine, publish_tables, rows_of

from planaria.elastic.faults import Fault, Report, carry_out, differences
from planaria.elastic.faults.schedule import RECORDED

JOBS = str(Path(__file__).parent / "recovery_jobs.py")
WORLD, STEPS, KILL_AT, VICTIM = 4, 40, 20, 1
DEADLINE_S = 400.0
OURS = "planaria"
DEFAULT, TUNED, RESTART = "torchft 0.2", "torchft 0.2, heartbeat 1 s", "torchrun restart + DCP load"

PEERS = {
    OURS: "Session, defaults (bitwise, ZeRO-2, one shadow), its agent with policy shrink",
    DEFAULT: "one rank a replica group, DistributedDataParallel, Gloo with 5 s as in its examples, "
    "lighthouse with its default heartbeat timeout of 5 s",
    TUNED: "the same, heartbeat timeout 1 s",
    RESTART: "--max-restarts 2 --monitor-interval 0.1; DCP saves at the very step of the kill, so "
    "that no step is repeated",
}


class Drills:
    """Runs the jobs in folders of their own, undisturbed ones once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._count = 0
        self._references: dict[tuple[str, ...], Report] = {}

    def gap(self, command: list[str], *, same: bool, needs: str) -> float:
        """The pause at a SIGKILL.

        Args:
            command: The job.
            same: Whether its losses are to be those of an undisturbed run.
            needs: The module without which there is no figure.

        Raises:
            NotMeasured: There is none.
        """
        try:
            if importlib.util.find_spec(needs) is None:
                raise NotMeasured(f"{needs} is not there")
            importlib.import_module(needs)
        except ImportError as error:
            raise NotMeasured(f"{needs} cannot be used here: {error}") from error
        report = self._run(command, [Fault("kill", (VICTIM,), step=KILL_AT, point=RECORDED)])
        if same:
            key = tuple(command)
            if key not in self._references:
                self._references[key] = self._run(command, [])
            wrong = differences(report.trajectory, self._references[key].trajectory)
            if wrong:
                raise NotMeasured(f"its losses are not those of an undisturbed run: {wrong[0]}")
        gaps = [gap.seconds for gap in report.gaps()]
        if len(gaps) != 1 or gaps[0] is None:
            raise NotMeasured(f"no step came after the kill; {report.output[-200:]}")
        return gaps[0]

    def _run(self, command: list[str], faults: list[Fault]) -> Report:
        self._count += 1
        work = self._root / f"{self._count}" / "work"
        work.mkdir(parents=True)
        report = carry_out(
            command, faults, folder=work.parent / "drill", cwd=work, deadline_s=DEADLINE_S,
            env={"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        )  # fmt: skip
        last = max(report.step_times(), default=0)
        if report.outcome != "done" or report.missed or last != STEPS:
            why = [event.text for event in report.missed] or report.output.strip().splitlines()[-1:]
            raise NotMeasured(f"the run ended otherwise: {report.outcome}, at step {last}, {why}")
        return report


def commands(world: int) -> dict[str, tuple[list[str], bool, str]]:
    """Of each variant the command, whether its losses are to be the same, and what it needs."""
    python, steps = [sys.executable, JOBS], str(STEPS)
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(world), "--max-restarts", "2", "--monitor-interval", "0.1",
    ]  # fmt: skip
    return {
        OURS: ([*python, "agent", str(world), steps], True, "planaria.elastic.session"),
        DEFAULT: ([*python, "torchft", str(world), steps, "5000"], False, "torchft"),
        TUNED: ([*python, "torchft", str(world), steps, "1000"], False, "torchft"),
        RESTART: ([*torchrun, JOBS, "dcp", steps, str(KILL_AT)], True, "torch"),
    }


def variant(drills: Drills, world: int, name: str) -> Callable[[], float]:
    """What measures one variant once."""
    command, same, needs = commands(world)[name]
    return lambda: drills.gap(command, same=same, needs=needs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--worlds", default="2,4,6", help="of the sessions that the model is fit to"
    )
    parser.add_argument("--ranks", default="1000,10000,100000", help="that are simulated")
    parser.add_argument("--only", default="", help="names of variants that contain this")
    args = parser.parse_args()
    started = machine()
    names = [name for name in commands(WORLD) if args.only in name]
    with tempfile.TemporaryDirectory() as folder:
        drills = Drills(Path(folder))
        turns = in_turn(
            {name: variant(drills, WORLD, name) for name in names}, args.turns, warm_up=0, must=()
        )
        turns.values = {name: values for name, values in turns.values.items() if values}
        simulated = simulate(drills, turns, args)
    tables = [
        (f"Pause at a SIGKILL of 1 of {WORLD} ranks (measured)",
         rows_of(turns, OURS, unit="s", scale=1.0)),
        *simulated,
    ]  # fmt: skip
    publish_tables(
        "recovery",
        tables,
        vars(args),
        goals=[
            Goal(f"pause of {peer} / of a session", turns.ratio(peer, OURS)["median"], least, aim)
            for peer, least, aim in ((DEFAULT, 40, 80), (TUNED, 8, 16), (RESTART, 30, 100))
        ],
        peers=PEERS,
        failures=turns.failures,
        started=started,
    )


def simulate(
    drills: Drills, turns: Turns, args: argparse.Namespace
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Pauses at sizes that nobody runs, from measured ones.

    Nothing is simulated from pauses that are missing, or that do not grow with the ranks: other
    work on the machine then counts for more than they do.
    """
    if any(name not in turns.values for name in (OURS, DEFAULT, RESTART)):
        turns.failures["the model"] = "not all pauses that it is made of were measured"
        return []
    pauses: dict[int, float] = {}
    for world in map(int, args.worlds.split(",")):
        run = variant(drills, world, OURS)
        with contextlib.suppress(NotMeasured):
            pauses[world] = turns.median(OURS) if world == WORLD else statistics.median(
                run() for _ in range(args.turns)
            )  # fmt: skip
    measured = [
        {"ranks": world, "pause s": pause, "on cores": os.cpu_count()}
        for world, pause in pauses.items()
    ]
    tables = [("Pause of a session by ranks, which share the cores (measured)", measured)]
    fixed, each = recovery_model.fit(list(pauses), list(pauses.values()), os.cpu_count() or 1)
    if len(pauses) < 3 or each <= 0:
        turns.failures["the model"] = (
            "the pauses of fewer than 3 numbers of ranks were measured, or they do not grow with it"
        )
        return tables
    parts = recovery_model.Parts(fixed, each, turns.median(DEFAULT), turns.median(RESTART))
    ranks = [int(count) for count in args.ranks.split(",")]
    title = "What losses cost at other sizes (simulated)"
    return [*tables, (title, recovery_model.table(parts, ranks))]


if __name__ == "__main__":
    main()
