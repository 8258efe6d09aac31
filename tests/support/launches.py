"""Starting `planaria` and other commands as a user would, and ending them whatever happens."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from forked import Forked

PLANARIA = [sys.executable, "-m", "planaria.launch.cli"]
DEADLINE_S = 280.0

#: A job that takes a few milliseconds a step, and saves every other one.
TINY = [
    "steps=8", "checkpoint.every=2", "log_every=1", "model.dim=32", "model.layers=1",
    "model.heads=2", "model.ffn_dim=32", "data.seq_len=16", "data.batch_size=4",
    "data.micro_batch_size=1", "data.max_bytes=200000",
]  # fmt: skip


@dataclass
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


#: Instead of `PLANARIA`: the same, see `forked`.
LOADED = ["planaria, loaded already"]

Process = subprocess.Popen[str] | Forked


@contextlib.contextmanager
def started(command: Sequence[str], cwd: Path, **env: str) -> Iterator[Process]:
    """A running command; it is killed when the block ends, and its ranks with it."""
    process: Process
    if command[0] == LOADED[0]:
        process = Forked(command[1:], cwd, {**os.environ, **env})
    else:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
    try:
        yield process
    finally:
        if isinstance(process, Forked):
            process.close()
        else:
            process.kill()
            process.communicate(timeout=DEADLINE_S)


def finish(process: Process) -> Ended:
    """Waits for a command's end."""
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode is not None
    return Ended(process.returncode, out, err)


def run(command: Sequence[str], cwd: Path, **env: str) -> Ended:
    """Runs a command to its end."""
    with started(command, cwd, **env) as process:
        return finish(process)


def planaria(cwd: Path, *args: str, **env: str) -> Ended:
    """Runs `planaria` to its end."""
    return run([*PLANARIA, *args], cwd, **env)


def loaded_planaria(cwd: Path, *args: str, **env: str) -> Ended:
    """Runs `planaria` to its end, sooner."""
    return run([*LOADED, *args], cwd, **env)


def wait_until(condition: Any, what: str) -> None:
    """Waits until a condition holds.

    Raises:
        AssertionError: It does not within the deadline.
    """
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(0.02)


def ranks_of(process: Process) -> list[psutil.Process]:
    """The ranks that a launcher of `PLANARIA` has started."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "RANK" in child.environ()]
