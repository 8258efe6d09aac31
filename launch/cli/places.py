"""What a path on the command line points at: runs, a run, its checkpoints, or one of them."""

import re
from dataclasses import dataclass
from pathlib import Path

from planaria.errors import ConfigError, NotCommittedError
from planaria.launch.run_folder import RunFolder

_STEP = re.compile(r"step-(\d{8,})")
_EMPTY = "the path is empty; . stands for the current folder"


@dataclass(frozen=True)
class Place:
    """A checkpoint root, the step in it that is meant, and the run that it belongs to.

    Attributes:
        root: Path or URL of the checkpoint root.
        step: The step, where the path names one.
        run: The run, where the path is a run's folder.
    """

    root: str
    step: int | None = None
    run: RunFolder | None = None


def find(path: str) -> Place:
    """Finds the checkpoints that a path or URL means.

    Raises:
        ConfigError: There is nothing, or nothing that is a run or holds checkpoints.
    """
    if not path:  # a variable of the shell that is not set must not stand for the current folder
        raise ConfigError(_EMPTY)
    if "://" in path:
        parent, _, name = path.rstrip("/").rpartition("/")
        match = _STEP.fullmatch(name)
        return Place(parent, int(match[1])) if match else Place(path)
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {path}")
    match = _STEP.fullmatch(folder.absolute().name)
    if match:
        return Place(str(folder.absolute().parent), int(match[1]))
    run = RunFolder(folder)
    if run.exists():
        return Place(str(run.ckpt), run=run)
    if (folder / "planaria.json").is_file():
        return Place(path)
    if (folder / "ckpt" / "planaria.json").is_file():
        return Place(str(folder / "ckpt"))
    raise ConfigError(
        f"{path} is neither the folder of a run nor a checkpoint root; planaria ls shows the runs "
        "of a folder"
    )


def runs_in(path: str) -> list[RunFolder] | None:
    """The runs directly inside a folder; None if the path is no folder or is itself a run."""
    folder = Path(path)
    if not path or "://" in path or not folder.is_dir() or RunFolder(folder).exists():
        return None
    runs = [RunFolder(child) for child in sorted(folder.iterdir())]
    return [run for run in runs if run.exists()] or None


def newest(root: str, step: int | None) -> int:
    """The step asked for, else the newest committed one.

    Raises:
        NotCommittedError: There is none.
    """
    from planaria.checkpoint.storage.base import open_storage
    from planaria.checkpoint.storage.root import Root

    if step is not None:
        return step
    steps = Root(open_storage(root)).steps()
    if not steps:
        raise NotCommittedError(f"{root} holds no committed checkpoint")
    return steps[-1]


def run_of(path: str) -> RunFolder:
    """The run at a path.

    Raises:
        ConfigError: There is none.
    """
    folder = Path(path)
    if not path or "://" in path or not folder.is_dir():
        raise ConfigError(f"there is no folder {path}" if path else _EMPTY)
    run = RunFolder(folder)
    if not run.exists():
        raise ConfigError(
            f"{path} is not the folder of a run (it has no config.yaml); planaria ls shows the "
            "runs of a folder"
        )
    return run
