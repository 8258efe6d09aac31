"""What dead jobs left behind in runs and checkpoint roots, and removing what is safely dead.

A root is only cleaned while its lock is held: then no job can be writing there.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from planaria.checkpoint.prune import locked
from planaria.checkpoint.storage.base import open_storage
from planaria.checkpoint.storage.root import MARKER, Root, step_folder
from planaria.core.procs import Identity, is_alive
from planaria.errors import ConfigError, RootLockedError
from planaria.launch.doctor import NOTE, OK, WRONG, Finding
from planaria.launch.run_folder import RUNNING, RunFolder

_SCRATCH = re.compile(r".*\.tmp-[0-9a-f]{8}")
_RUN_SCRATCH = re.compile(r"\.(?:status|versions|config)\.(?:json|yaml)\.(\d+)")


def leftovers(path: Path, *, clean: bool = False) -> Iterator[Finding]:
    """Looks at a run, a root, or all runs in a folder.

    Args:
        path: The folder.
        clean: Whether to remove what is safely dead.
    """
    here = [path]
    if not RunFolder(path).exists() and not (path / MARKER).is_file():
        here = sorted(p for p in path.iterdir() if p.is_dir())
    for folder in here:
        if RunFolder(folder).exists():
            yield from _of_run(RunFolder(folder), clean)
        elif (folder / MARKER).is_file():
            yield from _of_root(folder, clean)
    yield from _probes(path, clean)


def _of_run(run: RunFolder, clean: bool) -> Iterator[Finding]:
    active = run.is_active()
    status = run.read_status()
    if active:
        yield Finding("run", OK, f"{run.path} is being run right now")
    elif status.state == RUNNING:
        yield Finding(
            "run",
            NOTE,
            f"{run.path} lost its launcher at step {status.step}; the same command goes on",
        )
    orphans = [] if active else _orphans(run.path)
    if orphans:
        yield Finding(
            "processes",
            WRONG,
            f"processes {', '.join(map(str, orphans))} of {run.path} outlived its launcher; "
            "end them by hand",
            {"pids": orphans},
        )
    for scratch in sorted(run.path.iterdir()):
        match = _RUN_SCRATCH.fullmatch(scratch.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            yield _removable([scratch], f"half-written {scratch}", clean)
    if (run.ckpt / MARKER).is_file():
        yield from _of_root(run.ckpt, clean and not active)


def _of_root(folder: Path, clean: bool) -> Iterator[Finding]:
    root = Root(open_storage(folder))
    found = _dead(root)
    if not found:
        yield Finding("checkpoints", OK, f"nothing of dead jobs in {folder}")
        return
    lives = _owner_lives(root)
    if lives:
        yield Finding("checkpoints", OK, f"{folder} is in use by a live job")
        return
    text = f"{folder} has {', '.join(found)}"
    if lives is None and not clean:
        yield Finding(
            "checkpoints",
            NOTE,
            f"{text}; whether the job that locked it lives cannot be told from here: --clean "
            "waits for its lease to run out",
            {"leftovers": found},
        )
        return
    if not clean:
        yield Finding(
            "checkpoints",
            WRONG,
            f"{text}, of dead jobs: the next save there clears up, and so does --clean",
            {"leftovers": found},
        )
        return
    try:
        with locked(root):
            root.sweep(lambda step: contextlib.nullcontext(True))
            for found_step in root.folders():
                if found_step.state == "committed":
                    _remove_scratch(root, step_folder(found_step.step))
    except RootLockedError as error:
        yield Finding("checkpoints", WRONG, f"{text}, and was not cleaned: {error}")
        return
    left = _dead(root)
    if left:
        what = f"{folder} still has {', '.join(left)}, next to files of others: look at them"
        yield Finding("checkpoints", WRONG, what, {"leftovers": left})
    else:
        yield Finding("checkpoints", OK, f"removed from {folder}: {', '.join(found)}",
                      {"removed": found})  # fmt: skip


def _dead(root: Root) -> list[str]:
    """What may be left of dead jobs, in words; a live one has some of it, too."""
    names = root.storage.list()
    found = []
    if "lock.json" in names:
        found.append("a lock")
    found += [name for name in names if _SCRATCH.fullmatch(name)]
    for folder in root.folders():
        inside = root.storage.list(step_folder(folder.step))
        if folder.state == "uncommitted":
            found.append(f"the half-written step {folder.step}")
        elif folder.mixed:
            found.append(f"files of another attempt at step {folder.step}")
        elif any(map(_SCRATCH.fullmatch, inside)):
            found.append(f"scratch files of step {folder.step}")
    return found


def _owner_lives(root: Root) -> bool | None:
    """Whether the root's owner lives; None where only its own host, or time, can tell."""
    try:
        owner = json.loads(root.storage.read("lock.json"))
        return is_alive(Identity(*owner["process"]))
    except ConfigError:
        return None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def _remove_scratch(root: Root, folder: str) -> None:
    for name in root.storage.list(folder):
        if _SCRATCH.fullmatch(name):
            root.storage.remove(f"{folder}/{name}")


def _probes(path: Path, clean: bool) -> Iterator[Finding]:
    """What a doctor that was killed left; the one that looks now has ended its own."""
    found = sorted(path.glob("doctor.tmp-*"))
    if found:
        yield _removable(found, f"{len(found)} probe files of killed doctors in {path}", clean)


def _removable(paths: list[Path], what: str, clean: bool) -> Finding:
    if not clean:
        return Finding("scratch files", WRONG, f"{what}: --clean removes it")
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    return Finding("scratch files", OK, f"removed {what}")


def _orphans(run: Path) -> list[int]:
    """Processes of this user that work for a run which nobody launches any more."""
    mark = b"PLANARIA_RUN_DIR=" + os.fsencode(run)
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return sorted(found)
