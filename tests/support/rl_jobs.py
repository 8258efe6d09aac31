"""Rollout processes and trainers for the fault tests, each a rank of one run without a group."""

import hashlib
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from rl_models import bits, nudge, rollout, trainer

from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.core.procs import identity, is_alive
from planaria.errors import PlanariaError
from planaria.rl_sync import Publisher, Subscriber


def state(model: torch.nn.Module) -> str:
    """A hash of all bits of a model."""
    return hashlib.sha256(b"".join(v for _, v in sorted(bits(model).items()))).hexdigest()


def wait_for(path: Path, what: str) -> str:
    """The text of a file once it is there."""
    deadline = Deadline(60)
    while not path.exists():
        deadline.check(what)
        time.sleep(0.02)
    return path.read_text()


def say(path: Path, text: str) -> None:
    """Makes a file that appears whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.rename(path)


def follow(url: str, until: int, rank: int) -> list[tuple[int, str, bool]]:
    """Follows a publisher; what was served after each update, and whether an audit agrees."""
    there = rollout(trainer())
    seen = []
    with Subscriber(there, url, worker=f"w{rank}", timeout=60) as subscriber:
        while subscriber.version != until:
            version = -1 if subscriber.version is None else subscriber.version
            subscriber.update(at_least=version + 1)
            assert subscriber.version is not None
            seen.append((subscriber.version, state(there), subscriber.audit()))
    return seen


def process_state(pid: int) -> str:
    """The letter that Linux has for it; nothing if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def killed_and_stopped(rank: int, port: int, folder: str) -> list | dict[int, str]:
    """Rank 0 publishes; 1 is healthy, 2 is killed and 3 stopped in the middle of version 1."""
    url, place = f"tcp://127.0.0.1:{port}", Path(folder)
    if rank:
        say(place / f"pid{rank}", str(os.getpid()))
        action = {2: "kill", 3: "stop"}.get(rank)
        if action:
            points.arm(f"{action}@rl.apply.block:step=1,hit=2")
        return follow(url, 3, rank)
    model, states, stopped = trainer(), {}, 0
    with Publisher(model, url, dtype=torch.bfloat16, block_elements=500) as publisher:
        assert publisher.log is not None

        def until(version: int, workers: set[str]) -> None:
            deadline = Deadline(60)
            while not workers <= {
                r["worker"] for r in publisher.workers() if r["version"] >= version
            }:
                deadline.check(f"{workers} to serve version {version}")
                time.sleep(0.02)

        for version in range(4):
            nudge(model, version)
            publisher.publish(version)
            states[version] = state(model)
            until(version, {"w1"} if version else {"w1", "w2", "w3"})  # then for the healthy one
            if version == 1:  # slow ones would skip it otherwise, and nothing would befall them
                killed, stopped = (int(wait_for(place / f"pid{n}", f"rank {n}")) for n in (2, 3))
                deadline = Deadline(60)
                while process_state(killed) not in ("", "Z") or process_state(stopped) != "T":
                    deadline.check("rank 2 to be killed and rank 3 to stop")
                    time.sleep(0.02)
        os.kill(stopped, signal.SIGCONT)
        until(3, {"w1", "w3"})
    return states


def replaced(rank: int, port: int, folder: str) -> list[str]:
    """Rank 0 trains and is killed, rank 2 takes its place with other weights, rank 1 follows."""
    url, place = f"tcp://127.0.0.1:{port}", Path(folder)
    if rank == 1:
        there, served = rollout(trainer()), []
        with Subscriber(there, url, timeout=60) as subscriber:
            subscriber.update(at_least=1)
            served.append(state(there))
            said = wait_for(place / "first", "the first trainer")
            killed = identity(int(said.split()[0]))
            say(place / "kill", said)
            deadline = Deadline(60)
            while is_alive(killed):
                deadline.check("the first trainer to be gone")
                time.sleep(0.02)
            with pytest.raises(PlanariaError):
                subscriber.update(timeout=0.5)
            served.append(state(there))
            say(place / "killed", "")
            report = subscriber.update(at_least=3)
            assert report is not None
            assert report.full
            served.append(state(there))
            served.append(wait_for(place / "second", "the second trainer"))
            say(place / "done", "")
        return [wait_for(place / "first", "").split()[1], *served]
    if rank == 2:
        wait_for(place / "killed", "the first trainer to be killed")
    model = trainer(seed=7 * rank)
    with Publisher(model, url, dtype=torch.bfloat16) as publisher:
        for version in range(4 if rank else 2):
            nudge(model, version)
            publisher.publish(version)
        if rank == 2:
            say(place / "second", state(model))
            wait_for(place / "done", "the rollout to be done")
            return []
        say(place / "first", f"{os.getpid()} {state(model)}")
        wait_for(place / "kill", "the rollout to be there")
        os.kill(os.getpid(), signal.SIGKILL)
    return []


def killed_while_writing(rank: int, folder: str, fault: str) -> None:
    """A trainer that dies while it writes version 2 to a folder; says what version 1 was."""
    model = trainer()
    points.arm(f"kill@{fault}:step=2")
    previous = ""
    with Publisher(model, f"{folder}/versions", dtype=torch.bfloat16) as publisher:
        for version in range(3):
            nudge(model, version)
            if version == 2:
                say(Path(folder) / "state", previous)
            publisher.publish(version)
            previous = state(model)
