"""``planaria ls``: the runs of a folder, or the checkpoints of a run or root."""

import time
from typing import Any

import typer

from planaria.errors import ConfigError, NotCommittedError, StorageError
from planaria.launch import output
from planaria.launch.cli import places
from planaria.launch.output import size
from planaria.launch.run_folder import RunFolder, Status


def ls(
    path: str = typer.Argument("runs", help="A run, a checkpoint root (or URL), or their parent."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> int:
    """List the runs in a folder, or the checkpoints of a run."""
    runs = places.runs_in(path)
    rows = [_run(run) for run in runs] if runs else _steps(places.find(path))
    if as_json:
        output.print_json(rows)
    elif runs:
        output.print_table(
            ["run", "state", "step", "of", "attempts", "age"],
            [(r["run"], r["state"], r["step"], r["steps"], r["attempts"], r["age"]) for r in rows],
            right=(2, 3, 4, 5),
        )
    elif rows:
        output.print_table(
            ["step", "state", "size", "age", "ranks", "metrics"],
            [
                (
                    r["step"],
                    r["state"],
                    "" if r["bytes"] is None else size(r["bytes"]),
                    "" if r["created"] is None else output.since(r["created"]),
                    r["ranks"] or "",
                    r["error"] or _short(r["metrics"]),
                )
                for r in rows
            ],
            right=(0, 2, 3, 4),
        )
    else:
        print("no checkpoints")
    return 0


def _run(run: RunFolder) -> dict[str, Any]:
    try:
        status = run.read_status()
    except ConfigError:
        status = Status("status unreadable")
    lost = status.state == "running" and not run.is_active()
    changed = run.status.stat().st_mtime if run.status.exists() else run.config.stat().st_mtime
    return {
        "run": run.path.name,
        "state": "lost its launcher" if lost else status.state,
        "step": status.step,
        "steps": status.steps,
        "attempts": len(status.attempts),
        "age": output.age(time.time() - changed),
        "path": str(run.path),
    }


def _steps(place: places.Place) -> list[dict[str, Any]]:
    from planaria.checkpoint.reader import open_root
    from planaria.checkpoint.storage.base import open_storage
    from planaria.checkpoint.storage.root import Root

    # A run may not have come to its first checkpoint; anything else is a checkpoint root, or none.
    held = open_root(place.root) if place.run is None else Root(open_storage(place.root))
    rows = [_step(held, folder.step, folder.state) for folder in held.folders()]
    return [row for row in rows if row is not None]


def _step(held: Any, step: int, state: str) -> dict[str, Any] | None:
    """None for a step that was removed since it was seen."""
    row: dict[str, Any] = {"step": step, "state": state, "bytes": None, "created": None,
                           "ranks": None, "metrics": {}, "nan": [], "error": None}  # fmt: skip
    if state == "referenced":
        from planaria.checkpoint.prune import files_nbytes

        return {**row, "bytes": files_nbytes(held, step)}
    if state == "uncommitted":
        return row
    try:
        manifest = held.manifest(step)
    except NotCommittedError:
        return None
    except StorageError as error:
        return {**row, "state": "damaged", "error": str(error)}
    return {
        **row,
        "bytes": manifest.nbytes,
        "created": manifest.created,
        "ranks": manifest.world_size,
        "metrics": manifest.metrics,
        "nan": manifest.nan_names,
    }


def _short(metrics: dict[str, Any]) -> str:
    return "  ".join(
        f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in metrics.items()
    )
