"""``planaria run``: begins a run, goes on with it, or tells how it ended."""

import contextlib
import importlib
import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from planaria.errors import ConfigError
from planaria.launch import config, exit_codes, output
from planaria.launch.cli import places
from planaria.launch.config import RunConf
from planaria.launch.job import Job
from planaria.launch.run_folder import FAILED, PREEMPTED, RunFolder
from planaria.launch.summary import summarise

if TYPE_CHECKING:
    from planaria.launch.launchers.common import Outcome
    from planaria.launch.launchers.local import LocalLauncher
    from planaria.launch.launchers.session import SessionLauncher


@dataclass(frozen=True)
class Invocation:
    """The command line as a whole: what was typed, and the script after ``--``."""

    command: list[str]
    script: list[str] | None


def run(
    ctx: typer.Context,
    overrides: list[str] | None = typer.Argument(
        None, help="Configuration, such as steps=1000 optim.lr=3e-4.", show_default=False
    ),
    nproc: int | None = typer.Option(None, "-n", "--nproc", help="Ranks on this node."),
    nnodes: int | None = typer.Option(None, "--nnodes", help="Nodes of the job."),
    rdzv: str | None = typer.Option(
        None, "--rdzv", help="HOST:PORT where the first node listens; for several nodes."
    ),
    run_dir: str | None = typer.Option(None, "--run", help="The run's folder [runs/<name>]."),
    fresh: bool = typer.Option(False, "--fresh", help="Begin anew; moves an old run aside."),
    join: str | None = typer.Option(
        None, "--join", help="HOST:PORT of an elastic session, which this node's ranks join."
    ),
    reference: str | None = typer.Option(
        None, "--reference", help="A run whose losses the summary compares with, bit by bit."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the summary as JSON."),
) -> int:
    """Train: start a run, or go on with it where it stopped.

    Overrides are Hydra's: steps=1000 model=small optim.lr=3e-4. With -- SCRIPT ARGS a script of
    your own runs in place of the default job, in torchrun's environment, with the run's folder
    in PLANARIA_RUN_DIR.

    The same command again goes on with an unfinished run, and sums a finished one up; a larger
    steps= extends it.

    Exit codes: 0 done, 1 failed, 2 wrong configuration, 3 corrupt state, 75 preempted, resumable.
    """
    invocation: Invocation = ctx.obj
    flags = {"launcher.nproc": nproc, "launcher.nnodes": nnodes, "launcher.rdzv": rdzv}
    if join is not None:
        overrides = ["elastic=session", *(overrides or [])]
    conf = compose(overrides or [], flags, invocation.script)
    folder = RunFolder(run_dir or Path("runs") / conf.name)
    # The JSON has stdout for itself.
    console = output.console(stderr=as_json)
    again = _again(invocation.command)
    compared = None if reference is None else places.run_of(reference)

    try:
        # A single node's run is looked at before torch is loaded, and often that is all.
        alone = conf.launcher.nnodes == 1 and join is None
        opened = Job.open(folder, conf, fresh=fresh) if alone else None
        if opened is None or not opened.finished:
            _import_torch()
            launcher = _launcher(folder, conf, opened, join, fresh=fresh, console=console)
            with contextlib.closing(launcher):
                opened = launcher.job
                if opened is None or not opened.finished:
                    outcome = _launch(launcher, console)
                    if opened is None:
                        console.print(f"this node's ranks have ended: {outcome.state}")
                    else:
                        _tell_end(console, folder, outcome, again, compared, as_json=as_json)
                    return outcome.exit_code
        for remark in opened.remarks:
            _say(console, f"note: {remark}")
        _tell_end(console, folder, None, again, compared, as_json=as_json)
        return exit_codes.DONE
    finally:
        folder.unlock()


def _launcher(
    folder: RunFolder,
    conf: RunConf,
    job: Job | None,
    join: str | None,
    *,
    fresh: bool,
    console: Console,
) -> "LocalLauncher | SessionLauncher":
    if conf.elastic.mode == "session":
        from planaria.launch.launchers.session import SessionLauncher

        return SessionLauncher(folder, conf, job=job, join=join, console=console)
    if join is not None:
        raise ConfigError(f"--join is for elastic sessions, not elastic={conf.elastic.mode}")
    from planaria.launch.launchers.local import LocalLauncher

    return LocalLauncher(folder, conf, job=job, fresh=fresh, console=console)


def _launch(launcher: "LocalLauncher | SessionLauncher", console: Console) -> "Outcome":
    job = launcher.job
    if job is not None:
        for remark in job.remarks:
            _say(console, f"note: {remark}")
        ranks = job.conf.launcher.nproc * job.conf.launcher.nnodes
        how = "going on with" if job.begun else "starting"
        noun = "rank" if ranks == 1 else "ranks"
        _say(console, f"{how} {job.folder.path} on {ranks} {noun}")
    return launcher.run()


def compose(overrides: list[str], flags: dict[str, Any], script: list[str] | None) -> RunConf:
    """The configuration that a command line asks for.

    Raises:
        ConfigError: An override or option is wrong, or there is no such script.
    """
    given = [
        f"{key}='{value}'" if isinstance(value, str) else f"{key}={value}"
        for key, value in flags.items()
        if value is not None
    ]
    if script is not None:
        if not script:
            raise ConfigError("there is no script after --; write: planaria run -- SCRIPT ARGS")
        path = Path(script[0]).absolute()
        if not path.is_file():
            raise ConfigError(f"there is no script {script[0]}")
        if not any(o.startswith("name=") for o in overrides):
            given.append(f"name='{path.stem}'")
        script = [str(path), *script[1:]]
    return config.compose([*overrides, *given], script=script)


def _import_torch() -> None:
    """Imports torch with its C++ side silent: a store that is gone is told in one line here.

    The ranks do not inherit it; in their logs every message is welcome.
    """
    level = "TORCH_CPP_LOG_LEVEL"
    if level in os.environ:
        return
    os.environ[level] = "FATAL"
    importlib.import_module("torch")
    del os.environ[level]


def _again(command: list[str]) -> str:
    """The command that goes on with the run: the same one, but for what would begin it anew."""
    cut = command.index("--") if "--" in command else len(command)
    kept = [arg for arg in command[:cut] if arg != "--fresh"]
    return shlex.join(["planaria", *kept, *command[cut:]])


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _tell_end(
    console: Console,
    folder: RunFolder,
    outcome: "Outcome | None",
    again: str,
    reference: RunFolder | None,
    *,
    as_json: bool,
) -> None:
    summary = summarise(folder, reference)
    if as_json:
        failures = [] if outcome is None else outcome.failures
        output.print_json(
            {
                **summary.to_json(),
                "exit_code": exit_codes.DONE if outcome is None else outcome.exit_code,
                "failures": [asdict(f) for f in failures],
                "resume": again,
            }
        )
        return
    if outcome is not None:
        _tell_failures(console, outcome)
    console.print()
    output.print_pairs(summary.lines(), to=console)
    state = summary.state if outcome is None else outcome.state
    if state in (FAILED, PREEMPTED):
        _say(console, f"\nTo go on: {again}")
    else:
        extend = "" if summary.steps is None else f"To extend it, raise steps={summary.steps}. "
        _say(console, f"\n{extend}To begin anew: --fresh.")


def _tell_failures(console: Console, outcome: "Outcome") -> None:
    for i, failure in enumerate(outcome.failures):
        lead = "" if i == 0 else "then "
        _say(
            console,
            f"\n{lead}rank {failure.rank} {failure.how} (process {failure.pid}); "
            f"its output: {failure.log}",
        )
        if i == 0 and failure.traceback:
            tail = failure.traceback.rstrip().splitlines()[-12:]
            _say(console, "\n".join(f"    {line}" for line in tail))
