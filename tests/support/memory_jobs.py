"""Jobs that keep snapshots in memory, and the snapshot processes that they leave behind."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_job import Job, differences, make_checkpointer, reference

from planaria.checkpoint import MemoryTier
from planaria.checkpoint.memory import runtime
from planaria.checkpoint.memory.runtime import Info, places
from planaria.checkpoint.memory.starting import SNAPSHOT_FAULTS_ENV
from planaria.core import points
from planaria.errors import PlanariaError

#: How long anything may take on a machine that has much else to do.
PATIENCE_S = 60.0


@dataclass
class Seen:
    """What one rank saw of a run.

    Attributes:
        restored: The step that it went on from, None for a fresh start.
        tier: Where that came from.
        fell_back: Steps that could not be read.
        known: Steps that it knew to be in memory.
        durable: Steps that it knew to be durable.
        errors: What was raised, class and message.
        warned: What was warned of.
        wrong: Where the state that it restored differed from the reference.
    """

    restored: int | None = None
    tier: str | None = None
    fell_back: list[int] = field(default_factory=list)
    known: list[int] = field(default_factory=list)
    durable: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def tier_of(rank: int, **options: Any) -> MemoryTier:
    """A small memory tier. With ``nodes=n``, rank r is on logical node r % n.

    Only the node ``faulty``, if it is named, gets the faults of snapshot processes.
    """
    nodes = options.pop("nodes", 1)
    if options.pop("faulty", f"n{rank % nodes}") != f"n{rank % nodes}":
        os.environ.pop(SNAPSHOT_FAULTS_ENV, None)
    return MemoryTier(
        **{
            "budget": 16 << 20,
            "node": f"n{rank % nodes}",
            "idle_s": PATIENCE_S,
            "timeout_s": 20.0,
            "losses": 0,
            **options,
        }
    )


def live(
    rank: int,
    root: str,
    notes: str,
    last: int,
    faults: str = "",
    memory: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    die_after: int | None = None,
) -> Seen:
    """The body of a rank: goes on from what there is to step `last`, a snapshot at each step.

    Args:
        rank: This rank.
        root: The checkpoint root.
        notes: Folder that outlives the rank: it notes each snapshot that it knows of.
        last: Where to stop.
        faults: Armed before the first step.
        memory: Options of the tier, see `tier_of`.
        options: Further ones of the checkpointer.
        die_after: Kills itself after this step.
    """
    import warnings

    seen, job = Seen(), Job()
    Path(notes, f"pid-{rank}").write_text(str(os.getpid()))
    log = os.open(Path(notes, f"known-{rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ckpt = make_checkpointer(
            root, job, memory=tier_of(rank, **(memory or {})), **(options or {})
        )
        try:
            report = ckpt.restore()
            if report is not None:
                seen.restored, seen.tier = report.step, report.tier
                seen.fell_back = [step for step, _ in report.fell_back_from]
                wrong = differences(job.snapshot(), reference(report.step))
                seen.wrong = [w for w in wrong if rank == 0 or not w.startswith("state.random")]
            points.arm(faults)
            for step in range((seen.restored or 0) + 1, last + 1):
                job.advance()
                durable, snapshot = ckpt.step(step), ckpt.last_snapshot
                with contextlib.suppress(PlanariaError):
                    if snapshot is not None and snapshot.step == step:
                        snapshot.wait_committed(PATIENCE_S)
                        os.write(log, f"{step}\n".encode())
                        seen.known.append(step)
                if durable is not None:
                    durable.wait_committed(PATIENCE_S)
                    seen.durable.append(step)
                if step == die_after:
                    if snapshot is not None:  # also one of the restore
                        snapshot.wait_committed(PATIENCE_S)
                    os.kill(os.getpid(), signal.SIGKILL)
            ckpt.close()
        except PlanariaError as error:
            seen.errors.append(f"{type(error).__name__}: {error}")
            with contextlib.suppress(PlanariaError):
                ckpt._close_and_warn()
    seen.warned = [str(w.message) for w in caught]
    os.close(log)
    return seen


def newest_known(notes: Path) -> int:
    """The newest step that any rank knew to be in memory, 0 for none."""
    steps = [int(line) for file in notes.glob("known-*") for line in file.read_text().split()]
    return max(steps, default=0)


def processes() -> list[Info]:
    """The snapshot processes that live, in this test's runtime folder."""
    found = (place.info() for place in places())
    return [info for info in found if info is not None and info.alive]


def end_all() -> None:
    """Kills what is left in this test's runtime folder."""
    for info in processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(info.process.pid, signal.SIGKILL)
    until = time.monotonic() + PATIENCE_S
    while processes() and time.monotonic() < until:
        time.sleep(0.01)


@contextlib.contextmanager
def runtime_folder(path: Path) -> Iterator[Path]:
    """A runtime folder of one's own; nothing that was started in it outlives the block."""
    before = os.environ.get(runtime.ENV)
    os.environ[runtime.ENV] = str(path)
    try:
        yield path
    finally:
        end_all()
        if before is None:
            del os.environ[runtime.ENV]
        else:
            os.environ[runtime.ENV] = before


def eventually(true: Any, what: str) -> None:
    """Waits until a condition holds."""
    until = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < until, f"never: {what}"
        time.sleep(0.02)


def kill(info: Info) -> None:
    """Kills a snapshot process, and waits until it is dead."""
    os.kill(info.process.pid, signal.SIGKILL)
    eventually(lambda: not info.alive, f"the end of {info.node}")
