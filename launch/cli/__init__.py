"""The command line: one module a verb, loaded when the verb is used.

Errors are one line on stderr; ``--debug`` shows the traceback, too. Exit codes are in
`planaria.launch.exit_codes`.
"""

import io
import sys
import traceback
from collections.abc import Sequence
from typing import cast

import typer

from planaria.errors import PlanariaError
from planaria.launch.cli import (
    chaos,
    diff,
    doctor,
    goodput,
    inspect,
    ls,
    plan,
    prune,
    run,
    trace,
    verify,
)
from planaria.launch.exit_codes import CONFIG, DONE, FAILED, INTERRUPTED, exit_code_of

# Typer brings its parser's exceptions along, under no public name but this one's.
_UsageError: type[Exception] = cast(type[Exception], typer.BadParameter.__mro__[1])

app = typer.Typer(
    name="planaria",
    help="Elastic PyTorch training: runs that checkpoint themselves and survive.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _common(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    pass


app.command("run")(run.run)
app.command("ls")(ls.ls)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify.verify)
app.command("diff")(diff.diff)
app.command("prune")(prune.prune)
app.add_typer(plan.app, name="plan")
app.command("chaos")(chaos.chaos)
app.command("trace")(trace.trace)
app.command("goodput")(goodput.goodput)
app.command("doctor")(doctor.doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit code.

    Args:
        argv: Arguments without the program's name; by default those of the process.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    # What follows the first -- is the user's script with its arguments, none of ours.
    cut = args.index("--") if "--" in args else len(args)
    ours, script = args[:cut], args[cut + 1 :]
    debug = "--debug" in ours
    ours = [arg for arg in ours if arg != "--debug"]
    state = run.Invocation(command=args, script=script if cut < len(args) else None)
    for stream in (sys.stdout, sys.stderr):
        # Bars and units that a terminal's encoding lacks must not cost the whole answer.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return app(ours, prog_name="planaria", standalone_mode=False, obj=state) or DONE
    except KeyboardInterrupt:
        return INTERRUPTED
    except typer.Abort:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of the output has gone; nothing can be told to anybody.
        sys.stdout = None
        return FAILED
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _tell(error)


def _tell(error: Exception) -> int:
    """Says in one line what went wrong; returns the exit code."""
    if isinstance(error, PlanariaError):
        _say(str(error))
        return exit_code_of(error)
    if isinstance(error, _UsageError):
        text = str(getattr(error, "format_message", error.__str__)())
        _say(f"{' '.join(text.split())} (see planaria --help)")
        return CONFIG
    _say(f"unexpected {type(error).__name__}: {error} (--debug shows where)")
    return FAILED


def _say(message: str) -> None:
    print(f"planaria: {message}", file=sys.stderr)
