"""A run with random faults beside an undisturbed one: is what it computes the same, bit by bit?"""

import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planaria.elastic.faults import Report, carry_out, differences, random_schedule
from planaria.elastic.faults.report import Event
from planaria.errors import ConfigError, PlanariaError
from planaria.launch.run_folder import RunFolder

_WORLD = re.compile(r"(?:-n|--nproc)(?:=(\d+))?|launcher\.nproc=(\d+)")


@dataclass
class Chaos:
    """What came of it.

    Attributes:
        reference: The undisturbed run.
        report: The one with faults.
        different: What is not equal bit by bit, one line each; empty is what is wanted.
        parameters: What the last checkpoints of both were compared in: tensors, None if there are
            no checkpoints to compare.
        seed: What the faults were drawn from.
        mtbf_s: Mean seconds of training between them.
    """

    reference: Report
    report: Report
    seed: int
    mtbf_s: float
    different: list[str] = field(default_factory=list)
    parameters: int | None = None

    @property
    def finished(self) -> bool:
        """Whether both runs came to their end."""
        return self.reference.outcome == self.report.outcome == "done"

    @property
    def equal(self) -> bool:
        """Whether both came to their end, and are equal bit by bit."""
        return self.finished and not self.different

    def to_json(self) -> dict[str, Any]:
        """All of it as a JSON object."""
        return {
            "equal": self.equal,
            "seed": self.seed,
            "mtbf_s": self.mtbf_s,
            "different": self.different,
            "tensors_compared": self.parameters,
            "reference": self.reference.to_json(),
            "chaos": self.report.to_json(),
        }


@dataclass(frozen=True)
class Job:
    """A command that is run twice, each time in a folder of its own.

    Attributes:
        command: The command line, as typed.
        is_run: Whether it is `planaria run`.
    """

    command: tuple[str, ...]
    is_run: bool

    @classmethod
    def of(cls, words: Sequence[str]) -> "Job":
        """Reads what follows ``--``.

        Raises:
            ConfigError: There is nothing, or a verb of `planaria` that does not train.
        """
        if not words:
            raise ConfigError("there is no command after --; write: planaria chaos -- planaria run")
        if Path(words[0]).name != "planaria":
            return cls(tuple(map(_absolute, words)), False)
        if list(words[1:2]) != ["run"]:
            raise ConfigError("planaria chaos runs training: write -- planaria run ...")
        return cls(tuple(map(_absolute, words)), True)

    def argv(self, folder: Path) -> list[str]:
        """The command, made to work in a folder."""
        if not self.is_run:
            return list(self.command)
        cut = self.command.index("--") if "--" in self.command else len(self.command)
        ours, script, kept = list(self.command[2:cut]), list(self.command[cut:]), list[str]()
        while ours:
            word = ours.pop(0)
            if word == "--run":
                ours[:1] = []
            elif not word.startswith("--run="):
                kept.append(word)
        planaria = [sys.executable, "-m", "planaria.launch.cli"]
        return [*planaria, "run", "--run", str(folder / "run"), *kept, *script]

    def world(self) -> int | None:
        """How many ranks the command line asks for, None if it does not say."""
        for i, word in enumerate(self.command):
            found = _WORLD.fullmatch(word)
            if found:
                text = found[1] or found[2] or "".join(self.command[i + 1 : i + 2])
                return int(text) if text.isdecimal() else None
        return None

    def follow(self, folder: Path) -> Path | None:
        """Where its steps are recorded, None for what `record` writes."""
        ours = self.is_run and "--" not in self.command
        return RunFolder(folder / "run").metrics if ours else None


def run(
    words: Sequence[str],
    out: Path,
    *,
    mtbf_s: float,
    seed: int,
    kinds: Collection[str],
    lasting_s: float,
    deadline_s: float,
    spare: Collection[int] = (),
    targets: Mapping[str, str] | None = None,
    restless: bool = False,
    on_event: Callable[[str, Event], None] = lambda name, event: None,
) -> Chaos:
    """Runs a command undisturbed, then with random faults, and compares.

    Args:
        words: The command.
        out: A new folder for both runs.
        mtbf_s: Mean seconds of training between two faults.
        seed: What the faults are drawn from.
        kinds: Kinds of faults.
        lasting_s: Mean seconds that those last that do.
        deadline_s: Seconds for each of the two runs.
        spare: Ranks that nothing happens to.
        targets: What is corrupted, by kind.
        restless: Whether faults come also while the run recovers from the last one.
        on_event: Called with the run's name and each event.

    Raises:
        ConfigError: The command, a number or a kind makes no sense.
    """
    job = Job.of(words)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is in use: give a new folder with --out")
    options = {"mtbf_s": mtbf_s, "horizon_s": deadline_s, "kinds": kinds, "spare": spare,
               "lasting_s": lasting_s, "targets": targets}  # fmt: skip
    random_schedule(seed, world=1 + max([0, *spare]) + 1, **options)  # what is wrong is told early

    def one(name: str, faults: Sequence[Any], again: int) -> Report:
        folder = out.absolute() / name
        work = folder / "work"
        work.mkdir(parents=True)
        return carry_out(
            job.argv(folder), faults, folder=folder / "drill", cwd=work, deadline_s=deadline_s,
            follow=job.follow(folder), files=folder, again=again, seed=seed,
            open_ended=True, restless=restless, spare=spare,
            on_event=lambda event: on_event(name, event),
        )  # fmt: skip

    reference = one("reference", (), 0)
    if reference.outcome != "done":
        return Chaos(reference, Report(list(job.command), reference.began), seed, mtbf_s)
    seen = [e.rank for e in reference.events if e.rank is not None]
    # The command line says how many a node has, of one of the nodes.
    world = max(job.world() or 1, 1 + max(seen, default=0))
    faults = random_schedule(seed, world=world, **options)
    # A run that does not survive by itself is started again, which is what its user would do.
    report = one("chaos", faults, 10_000)
    made = Chaos(reference, report, seed, mtbf_s)
    made.different = differences(report.trajectory, reference.trajectory)
    if job.is_run and made.finished:
        made.parameters, wrong = _compare(out / "chaos" / "run", out / "reference" / "run")
        made.different += wrong
    return made


def _compare(run_dir: Path, other: Path) -> tuple[int | None, list[str]]:
    """Compares the last checkpoints of two runs; how many tensors, and what differs."""
    from planaria.checkpoint.compare import compare
    from planaria.checkpoint.reader import open_checkpoint
    from planaria.checkpoint.restore import name_filter

    if not RunFolder(run_dir).has_checkpoints() or not RunFolder(other).has_checkpoints():
        return None, []
    try:
        pair = open_checkpoint(RunFolder(run_dir).ckpt), open_checkpoint(RunFolder(other).ckpt)
        found = compare(*pair, name_filter(None))
    except PlanariaError as error:
        return None, [f"the checkpoints cannot be compared: {error}"]
    wrong = [f"{each.name}: {each.what}" for each in found.tensors]
    if pair[0].step != pair[1].step:
        wrong.insert(0, f"the last checkpoints are of steps {pair[0].step} and {pair[1].step}")
    return found.compared, [f"last checkpoint, {line}" for line in wrong]


def _absolute(word: str) -> str:
    """A word of a command that will run in another folder: a path that exists becomes absolute."""
    names_path = os.sep in word or word.endswith(".py")
    return os.path.abspath(word) if names_path and os.path.exists(word) else word
