"""Starts a command, carries a schedule of faults out on its ranks, and leaves nothing behind."""

import json
import math
import os
import signal
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from planaria.core import points, procs
from planaria.core.deadline import Deadline
from planaria.elastic.faults import actions, trajectory
from planaria.elastic.faults.processes import MARK, RankProcess, end_all, ranks_of
from planaria.elastic.faults.report import Event, Report, What
from planaria.elastic.faults.schedule import Fault, armed_inside
from planaria.errors import ConfigError, PlanariaError

_POLL_S = 0.01
#: Finding ranks reads the environment of every process of the machine.
_LOOK_S = 0.25
#: To end what is left, and to end the command itself.
_END_S = 30.0
#: How long a fault waits for a rank that is being started again.
_PATIENCE_S = 20.0
_OUTPUT_NBYTES = 4000


def carry_out(
    command: Sequence[str | os.PathLike[str]],
    faults: Sequence[Fault] = (),
    *,
    folder: str | os.PathLike[str],
    deadline_s: float,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    follow: str | os.PathLike[str] | None = None,
    files: str | os.PathLike[str] | None = None,
    again: int = 0,
    seed: int = 0,
    open_ended: bool = False,
    restless: bool = False,
    spare: Collection[int] = (),
    on_event: Callable[[Event], None] | None = None,
) -> Report:
    """Runs a command with faults, until it ends or the deadline comes.

    Args:
        command: What starts the ranks: `planaria run`, `torchrun`, or any other; each rank has
            `RANK` in its environment. A script that is a rank itself gets it by `env`.
        faults: The schedule.
        folder: Where the drill keeps its files; it is made, and must be empty or new.
        deadline_s: Seconds until the command is ended, whatever it does.
        env: More environment for the command.
        cwd: Folder to run in.
        follow: Where steps are recorded, if not by `record`: a file such as ``metrics.jsonl``.
        files: Folder that `corrupt_file` looks in, by default `cwd`.
        again: How often the command is started once more after it failed, to go on.
        seed: What places of corruption are drawn from.
        open_ended: For random faults: those whose `at_s` the run did not come to are left out, not
            missed, and one whose rank is gone for good hits another one.
        restless: Whether the seconds of `at_s` go on from a fault to the next new step, so that
            faults may hit a recovery, and a run may never come to its end.
        spare: Ranks that are not hit in the place of others.
        on_event: Called with each event as it happens.

    Returns:
        What happened. No process of the command is left.

    Raises:
        ConfigError: The command cannot be started, or the folder is in use.
        DeadlineError: A process cannot be proven dead.
    """
    return _Drill(
        [os.fspath(part) for part in command], faults, Path(folder), Path(files or cwd or "."),
        Path(follow) if follow is not None else None, again, seed, on_event,
        open_ended, restless, spare,
    ).run(deadline_s, dict(env or {}), cwd)  # fmt: skip


@dataclass
class _Lasting:
    """A fault that goes on."""

    until: float
    end: actions.End
    text: str


class _Clock:
    """Seconds of training: from the first step on, but for the time from a fault to new steps.

    Attributes:
        paused: Whether it stands still.
    """

    def __init__(self) -> None:
        self.paused = True
        self._seconds = 0.0
        self._last = time.monotonic()
        self._reached = self._wanted = -1

    def at(self, reached: int) -> float:
        """The time now, with this the last step so far; -1 before any step."""
        now = time.monotonic()
        if not self.paused:
            self._seconds += now - self._last
        self._last = now
        self._reached = max(reached, self._reached)
        if self._reached > self._wanted:
            self.paused = False
        return self._seconds if self._reached >= 0 else -1.0

    def pause(self) -> None:
        """A fault has happened."""
        # The step that was under way may still come to its end.
        self.paused, self._wanted = True, self._reached + 1


class _Drill:
    """One drill under way."""

    def __init__(
        self,
        command: list[str],
        faults: Sequence[Fault],
        folder: Path,
        files: Path,
        follow: Path | None,
        again: int,
        seed: int,
        on_event: Callable[[Event], None] | None,
        open_ended: bool,
        restless: bool,
        spare: Collection[int],
    ) -> None:
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty: give the drill a new folder")
        self._folder, self._files, self._again, self._seed = folder, files, again, seed
        self._fired = folder / "fired"
        self._recorded = folder / "trajectory"
        self._on_event, self._open_ended, self._restless = on_event, open_ended, restless
        self._clock, self._spare = _Clock(), set(spare)
        self._mark = uuid.uuid4().hex
        self._began = time.time()
        self._follower = trajectory.TrajectoryFollower(follow or self._recorded)
        self._records: list[trajectory.Step] = []
        self._inside = [fault for fault in faults if fault.point]
        self._waiting = [fault for fault in faults if not fault.point]
        self._since: dict[int, float] = {}
        self._lasting: list[_Lasting] = []
        self._ranks: dict[int, RankProcess] = {}
        self._looked = -math.inf
        self._seen: set[Path] = set()
        self._fired_clauses: set[str] = set()
        self._report = Report(command, self._began)

    def run(
        self, deadline_s: float, env: dict[str, str], cwd: str | os.PathLike[str] | None
    ) -> Report:
        for made in (self._folder, self._fired, self._recorded):
            made.mkdir(parents=True, exist_ok=True)
        whole = {**os.environ, **env, MARK: self._mark}
        whole[points.ENV] = armed_inside(self._inside, whole.get(points.ENV, ""))
        whole[points.LOG_ENV] = str(self._fired.absolute())
        whole[trajectory.ENV] = str(self._recorded.absolute())
        deadline, report = Deadline(deadline_s), self._report
        try:
            for life in range(self._again + 1):
                code = self._live(life, whole, cwd, deadline)
                if code is None:
                    report.outcome = "deadline"
                    break
                report.codes.append(code)
                report.outcome = "done" if code == 0 else "failed"
                if code in (0, 2):  # 2: a command line or configuration that is wrong
                    break
        finally:
            self._end_lasting(all_of_them=True)
            for left in end_all(self._mark, Deadline(_END_S)):
                self._tell("left behind", left)
        self._poll()
        due = [f for f in self._waiting if f.at_s is None or not self._open_ended]
        for fault in [*due, *self._unfired()]:
            self._tell("missed", f"{fault}: it never came to it")
        report.seconds = time.time() - self._began
        report.trajectory = trajectory.Trajectory(
            tuple(sorted(self._records, key=lambda step: step.time))
        )
        return report

    def _live(
        self,
        life: int,
        env: Mapping[str, str],
        cwd: str | os.PathLike[str] | None,
        deadline: Deadline,
    ) -> int | None:
        """One start of the command; its exit code, None if the deadline ended it."""
        output = self._folder / f"output-{life}.log"
        with output.open("wb") as file:
            process = procs.start(self._report.command, env=env, cwd=cwd, stdout=file, stderr=file)
            self._tell(
                "start", f"process {process.pid}" + f", for the {life + 1}. time" * (life > 0)
            )
            with process:
                while (code := process.poll()) is None and not deadline.expired:
                    self._poll()
                    self._do_what_is_due()
                    time.sleep(_POLL_S)
        for rank in self._ranks.values():
            rank.signal(signal.SIGKILL)  # what a launcher that was killed left must not go on
        self._look(at_once=True)
        self._report.output = output.read_text(errors="replace")[-_OUTPUT_NBYTES:]
        how = "ended at the deadline" if code is None else f"ended with code {code}"
        self._tell("end", f"the command {how}")
        return code

    def _poll(self) -> None:
        """Takes in what ranks have recorded, who is there, and what has happened inside them."""
        self._records += self._follower.poll()
        self._look()
        for path in sorted(set(self._fired.glob("*.json")) - self._seen):
            self._seen.add(path)
            fired = json.loads(path.read_text())
            self._fired_clauses.add(fired["clause"])
            text = f"{fired['clause']} in rank {fired['rank']} (process {fired['pid']})"
            step = "" if fired["step"] is None else f", step {fired['step']}"
            self._tell("fault", text + step, int(fired["rank"]), fired["t"])

    def _look(self, *, at_once: bool = False) -> None:
        for rank, process in list(self._ranks.items()):
            if not process.alive:
                del self._ranks[rank]
                self._tell("died", f"rank {rank} (process {process.pid})", rank)
        if at_once or time.monotonic() - self._looked > _LOOK_S:
            self._looked = time.monotonic()
            for rank, process in ranks_of(self._mark).items():
                if rank not in self._ranks or self._ranks[rank].who != process.who:
                    self._ranks[rank] = process
                    self._tell("born", f"rank {rank} (process {process.pid})", rank)

    def _do_what_is_due(self) -> None:
        self._end_lasting()
        reached = max((step.step for step in self._records), default=-1)
        trained = self._clock.at(reached)
        for fault in list(self._waiting):
            if fault.step is not None:
                due = reached >= fault.step
            else:
                assert fault.at_s is not None  # what a fault from outside has otherwise
                due = trained >= fault.at_s and not self._clock.paused
            if due:
                self._try(fault)

    def _try(self, fault: Fault) -> None:
        """Does a fault; one whose rank is just being started again waits for it."""
        since = self._since.setdefault(id(fault), time.monotonic())
        self._look(at_once=True)
        there = sorted(set(self._ranks) - self._spare)
        missing = set(fault.ranks) - set(self._ranks)
        if missing and self._open_ended and there and not self._restless:
            # Training goes on, so nobody is being started: these ranks will not come again.
            hit = tuple(there[rank % len(there)] for rank in fault.ranks)
            self._waiting[self._waiting.index(fault)] = fault = replace(fault, ranks=hit)
        elif missing and time.monotonic() - since < _PATIENCE_S:
            return
        self._waiting.remove(fault)
        target = actions.Target(self._mark, dict(self._ranks), self._files, self._seed)
        try:
            told, end = actions.begin(fault, target)
        except PlanariaError as error:
            self._tell("missed", f"{fault}: {error}")
            return
        self._tell("fault", told, fault.ranks[0] if len(fault.ranks) == 1 else None)
        if not self._restless:
            self._clock.pause()
        if end is not None:
            self._lasting.append(_Lasting(time.monotonic() + fault.for_s, end, told))

    def _end_lasting(self, *, all_of_them: bool = False) -> None:
        for each in list(self._lasting):
            if all_of_them or time.monotonic() >= each.until:
                self._lasting.remove(each)
                self._tell("heal", each.end())

    def _unfired(self) -> list[Fault]:
        """Faults at points that no rank has come to."""
        return [f for f in self._inside if not self._fired_clauses.issuperset(f.clauses())]

    def _tell(
        self, what: What, text: str, rank: int | None = None, when: float | None = None
    ) -> None:
        event = Event(round((when or time.time()) - self._began, 6), what, text, rank)
        self._report.events.append(event)
        self._report.events.sort(key=lambda e: e.t)
        if self._on_event is not None:
            self._on_event(event)
