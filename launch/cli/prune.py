"""``planaria prune``: removes old checkpoints, or shows which it would."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from planaria.errors import ConfigError, RootLockedError
from planaria.launch import output
from planaria.launch.cli import places
from planaria.launch.output import size
from planaria.launch.policies import make_keep_policy
from planaria.launch.run_folder import RunFolder

if TYPE_CHECKING:
    from planaria.checkpoint.prune import Verdict


def prune(
    path: str = typer.Argument(..., help="A run or a checkpoint root (or URL)."),
    keep_last: int | None = typer.Option(None, "--keep-last", help="Keep the newest N."),
    keep_every: int | None = typer.Option(None, "--keep-every", help="Keep multiples of N."),
    keep_best: str | None = typer.Option(None, "--keep-best", help="Keep the best by a metric."),
    best_count: int = typer.Option(1, "--best-count", help="How many of the best."),
    best_mode: str = typer.Option("min", "--best-mode", help="min or max is best."),
    abandoned: bool = typer.Option(False, "--abandoned", help="Remove rewound steps, too."),
    yes: bool = typer.Option(False, "--yes", "--apply", help="Do it; else only show."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> int:
    """Remove old checkpoints; without --yes only show which.

    A step is kept if any of the given options wants it. The newest step is kept in any case, and so
    is the newest one of which every byte verifies. What crashed saves left goes, too. A root that a
    live job uses is left alone.
    """
    from planaria.checkpoint import prune as pruning
    from planaria.checkpoint.reader import open_root

    policy = make_keep_policy(keep_last, keep_every, keep_best, best_count, best_mode)
    if policy is None:
        raise ConfigError("say what to keep: --keep-last N, --keep-every N or --keep-best METRIC")
    place = places.find(path)
    if place.step is not None:
        raise ConfigError(f"{path} is one step; give the run or the root that it lies in")
    root = open_root(place.root)
    if yes:
        refuse_active(place.root)
        verdicts = pruning.prune(root, policy, abandoned=abandoned)
    else:
        verdicts = pruning.choose(root, policy, abandoned=abandoned)
    going = [v for v in verdicts if not v.keep]
    if as_json:
        output.print_json(
            {
                "root": place.root,
                "applied": yes,
                "removed": [v.step for v in going],
                "bytes": sum(v.nbytes - v.shared for v in going),
                "steps": [asdict(v) for v in verdicts],
            }
        )
    else:
        _print(verdicts, going, done=yes)
    return 0


def refuse_active(root: str) -> None:
    """Makes sure that no launcher works on the run that a root belongs to.

    Between two attempts its ranks are gone, and the root is not locked, but wanted.

    Raises:
        RootLockedError: One does.
    """
    if "://" in root:
        return
    run = RunFolder(Path(root).absolute().parent)
    if run.exists() and run.is_active():
        raise RootLockedError(f"{run.path} is being run right now; stop that first")


def _size(verdict: "Verdict") -> str:
    if not verdict.nbytes:
        return ""
    stays = f", {size(verdict.shared)} stay" if verdict.shared and not verdict.keep else ""
    return size(verdict.nbytes) + stays


def _print(verdicts: "list[Verdict]", going: "list[Verdict]", *, done: bool) -> None:
    gone = "removed" if done else "would go"
    output.print_table(
        ["step", "state", "size", "age", "verdict", "why"],
        [
            (
                v.step,
                v.state,
                _size(v),
                "" if v.created is None else output.since(v.created),
                "kept" if v.keep else gone,
                v.why,
            )
            for v in verdicts
        ],
        right=(0, 2, 3),
    )
    freed = size(sum(v.nbytes - v.shared for v in going))
    print(f"\n{len(going)} {gone} ({freed}), {len(verdicts) - len(going)} kept")
    if going and not done:
        print("nothing was removed; --yes does it")
