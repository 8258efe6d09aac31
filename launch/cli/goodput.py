"""``planaria goodput``: where the time of a run went."""

import typer

from planaria.launch import output
from planaria.launch.cli import places
from planaria.launch.output import console

_BAR = 40


def goodput(
    path: str = typer.Argument(..., help="A run."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> int:
    """Add up where a run's time went, over all its attempts, under ml-goodput's names.

    Steps that count, without what they waited for, are goodput; the rest is told by its cause.
    Unlike the goodput of `planaria run`'s summary it counts the time between attempts, too. Where
    there is a mirror, how much of the run is in it and how far it was behind; none of that is
    time of the run.
    """
    from planaria.launch import copies
    from planaria.launch import goodput as accounts

    folder = places.run_of(path)
    found = accounts.measure(folder)
    mirror = copies.copies_of(accounts.read_telemetry(folder))
    if as_json:
        output.print_json(
            {**found.to_json(), "mirror": None if mirror is None else mirror.to_json()}
        )
        return 0
    total = found.total_s or 1.0
    output.print_table(
        ["", "seconds", "share", ""],
        [
            (name, f"{seconds:.2f}", f"{seconds / total:.1%}", "█" * round(_BAR * seconds / total))
            for name, seconds in found.seconds.items()
        ],
        right=(1, 2),
    )
    console().print(
        f"\ngoodput {found.share:.1%} of {found.total_s:.1f} s: {found.steps} steps in "
        f"{found.attempts} {'attempt' if found.attempts == 1 else 'attempts'}, "
        f"{found.repeated} taken again",
        highlight=False,
    )
    if mirror is not None:
        console().print(mirror.line(), highlight=False)
    return 0
