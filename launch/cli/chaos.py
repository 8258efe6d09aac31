"""``planaria chaos``: random faults, and equality with an undisturbed run."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from planaria.errors import ConfigError
from planaria.launch import exit_codes, output
from planaria.launch.cli.run import Invocation

if TYPE_CHECKING:
    from planaria.launch.chaos import Chaos

_UNITS = {"": 1.0, "s": 1.0, "ms": 1e-3, "min": 60.0, "h": 3600.0}
_SHOWN = 10


def chaos(
    ctx: typer.Context,
    mtbf: str = typer.Option("5s", "--mtbf", help="Mean time between faults: 5s, 500ms, 2min."),
    seed: int = typer.Option(0, "--seed", help="The same seed draws the same faults."),
    kinds: str = typer.Option(
        "kill", "--kinds", help="kill, terminate, stop, slow, partition, store_loss, corrupt_..."
    ),
    lasting: str = typer.Option("2s", "--lasting", help="Mean time that faults last, if they do."),
    spare: list[int] = typer.Option([], "--spare", help="A rank that nothing happens to."),
    target: list[str] = typer.Option(
        [], "--target", help="KIND=PATTERN: what corrupt_file or corrupt_memory changes."
    ),
    restless: bool = typer.Option(
        False, "--restless", help="Let faults hit the recovery from others, too."
    ),
    deadline: str = typer.Option("10min", "--deadline", help="For each of the two runs."),
    out: str | None = typer.Option(None, "--out", help="New folder for both [chaos/seed-N]."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> int:
    """Train with random faults, and compare with an undisturbed run, bit by bit.

    What follows -- is `planaria run ...`, or any command whose ranks have RANK in their environment
    and call planaria.elastic.faults.record(step, loss). It is run twice, each time in a new folder;
    after a failure that it does not survive by itself it is started again. Losses, and for
    `planaria run` the last checkpoint, are compared; timeline.txt, report.json and timeline.png
    (with matplotlib) are left in the folder.

    Exit codes: 0 equal, 4 different, 1 a run did not come to its end, 2 wrong command line.
    """
    from planaria.launch import chaos as runs

    invocation: Invocation = ctx.obj
    targets = dict(_pair(text) for text in target)
    folder = Path(out) if out is not None else Path("chaos") / f"seed-{seed}"
    console = output.console(stderr=as_json)
    made = runs.run(
        invocation.script or [],
        folder,
        mtbf_s=seconds(mtbf),
        seed=seed,
        kinds=[kind.strip() for kind in kinds.split(",") if kind.strip()],
        lasting_s=seconds(lasting),
        deadline_s=seconds(deadline),
        spare=spare,
        targets=targets,
        restless=restless,
        on_event=lambda name, event: console.print(
            f"{name:<9} {event.t:8.2f} s  {event.what:<11} {event.text}", markup=False,
            soft_wrap=True,
        ),
    )  # fmt: skip
    picture = _leave(made, folder)
    if as_json:
        output.print_json({**made.to_json(), "folder": str(folder), "picture": picture})
    else:
        _print(made, folder, picture)
    if not made.finished:
        return exit_codes.FAILED
    return exit_codes.DONE if made.equal else exit_codes.FOUND


def seconds(text: str) -> float:
    """Reads a time such as ``5s``.

    Raises:
        ConfigError: It is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip())
    if found is None or found[2] not in _UNITS or not float(found[1]) > 0:
        raise ConfigError(f"{text!r} is not a time > 0, such as 5s, 500ms or 2min")
    return float(found[1]) * _UNITS[found[2]]


def _pair(text: str) -> tuple[str, str]:
    kind, _, pattern = text.partition("=")
    if not pattern:
        raise ConfigError(f"--target {text}: write KIND=PATTERN")
    return kind, pattern


def _leave(made: "Chaos", folder: Path) -> str | None:
    """Leaves the report in the folder; the picture's path, None without one."""
    from planaria.elastic.faults.picture import draw
    from planaria.errors import NotSupportedError

    (folder / "report.json").write_text(json.dumps(made.to_json(), indent=2) + "\n")
    (folder / "timeline.txt").write_text("\n".join(made.report.lines()) + "\n")
    path = folder / "timeline.png"
    try:
        draw(made.report, path)
    except (NotSupportedError, ConfigError):
        return None
    return str(path)


def _print(made: "Chaos", folder: Path, picture: str | None) -> None:
    report, reference = made.report, made.reference
    print()
    if reference.outcome != "done":
        print(f"the undisturbed run did not come to its end: {reference.outcome}\n")
        print(reference.output)
        return
    gaps = [gap.seconds for gap in report.gaps() if gap.seconds is not None]
    longest = f", the longest pause {max(gaps):.2f} s" if gaps else ""
    said = report.to_json()
    output.print_pairs(
        [
            ("outcome", f"{report.outcome} after {report.seconds:.1f} s, undisturbed "
                        f"{reference.seconds:.1f} s"),
            ("steps", f"{said['steps']}, {len(reference.step_times())} undisturbed"),
            ("faults", f"{len(report.faults)} of seed {made.seed}, mean time between them "
                       f"{made.mtbf_s:g} s{longest}"),
            ("not possible", str(len(report.missed))),
            ("starts", f"{len(report.codes)} of the command"),
            ("folder", str(folder) + (f", {Path(picture).name}" if picture else "")),
        ]
    )  # fmt: skip
    print()
    if report.outcome != "done":
        print(report.output)
    elif made.equal:
        also = f", and {made.parameters} tensors of the last checkpoint" * bool(made.parameters)
        print(f"equal, bit by bit: the losses of all steps{also}")
    for line in made.different[:_SHOWN]:
        print(line)
    if len(made.different) > _SHOWN:
        print(f"... and {len(made.different) - _SHOWN} more, in report.json")
