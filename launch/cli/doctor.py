"""``planaria doctor``: is this machine, and this folder, fit to train in?"""

from dataclasses import asdict
from pathlib import Path

import typer

from planaria.errors import ConfigError, PlanariaError
from planaria.launch import exit_codes, output


def doctor(
    path: str = typer.Argument(".", help="A run, a checkpoint root, or a folder of runs."),
    clean: bool = typer.Option(False, "--clean", help="Remove what dead jobs left there."),
    quick: bool = typer.Option(False, "--quick", help="Leave out what starts processes (gloo)."),
    deadline: float = typer.Option(60.0, "--deadline", help="Seconds that each check may take."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> int:
    """Check disk, memory, shared memory, links and versions, and look for leftovers of dead jobs.

    Leftovers are stale locks, steps that were never committed, scratch files, processes without a
    launcher, and what dead snapshot processes left. --clean removes those files, under the root's
    lock, and ends snapshot processes that nobody uses any more; never a committed step, and no
    other process.

    Exit codes: 0 all is well, 4 something is wrong, 2 wrong command line.
    """
    from planaria.launch.doctor import WRONG, Finding, examine, links, machine
    from planaria.launch.doctor.leftovers import leftovers
    from planaria.launch.doctor.snapshots import snapshots

    folder = Path(path)
    if not path or not folder.is_dir():
        raise ConfigError(f"there is no folder {path}" if path else "the path is empty")
    if deadline <= 0:
        raise ConfigError(f"--deadline {deadline:g}: give a number of seconds above 0")
    state_nbytes = newest_size(folder)
    checks = {
        "disk": lambda: machine.disk(folder, state_nbytes),
        "memory": lambda: machine.memory(state_nbytes),
        "shared memory": machine.shared_memory,
        "loopback TCP": links.tcp,
        "gloo": lambda: links.gloo(deadline),
        "versions": links.versions,
        "leftovers": lambda: leftovers(folder, clean=clean),
        "snapshots": lambda: snapshots(folder, clean=clean),
    }
    if quick:
        del checks["gloo"]
    found: list[Finding] = []
    for name, check in checks.items():
        # A process that hangs is ended at the deadline itself; its check then has something to say.
        grace = 15.0 if name == "gloo" else 0.0
        try:
            found += examine(name, check, deadline + grace)
        except PlanariaError as error:
            found.append(Finding(name, WRONG, str(error)))
    wrong = [f for f in found if f.state == WRONG]
    if as_json:
        output.print_json({"ok": not wrong, "findings": [asdict(f) for f in found]})
    else:
        output.print_table(["check", "", "finding"], [(f.check, f.state, f.text) for f in found])
        print(f"\n{len(wrong)} of {len(found)} findings are wrong" if wrong else "\nall is well")
    return exit_codes.FOUND if wrong else exit_codes.DONE


def newest_size(folder: Path) -> int | None:
    """Bytes of the newest checkpoint there, None if there is none that can be read."""
    from planaria.checkpoint.reader import open_checkpoint
    from planaria.launch.cli import places

    try:
        manifest = open_checkpoint(places.find(str(folder)).root).manifest
        return manifest.nbytes + manifest.referenced_nbytes
    except (PlanariaError, OSError):
        return None
