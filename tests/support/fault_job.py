"""A small training job whose state after n steps depends on n alone, to be broken in tests.

Whatever is done to it (killed, starved of disk, restored elsewhere), what a restore brings back can
be compared bit for bit to what an undisturbed run had after that step.
"""

import contextlib
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from failing_files import QuickFiles
from torch import nn

import planaria.checkpoint.opening as opening_module
from planaria.checkpoint import Checkpointer, RestoreReport, SaveHandle, open_checkpoint
from planaria.checkpoint.capture.pool import BufferPool
from planaria.checkpoint.restore import restore
from planaria.checkpoint.state.stateset import StateSet
from planaria.checkpoint.storage.base import Storage
from planaria.checkpoint.storage.local import LocalStorage
from planaria.checkpoint.storage.root import Root
from planaria.core import points
from planaria.core.collective import Ranks
from planaria.errors import PlanariaError

#: Small, so that a small state has many chunks.
CHUNK_NBYTES = 4096
#: How long ranks wait for each other, and for everything else.
TIMEOUT_S = 60.0


class Net(nn.Module):
    """Parameters of two dtypes, and a buffer; it is never run."""

    count: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, 8, dtype=torch.bfloat16)
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))


class Job:
    """The state of the job, and its step.

    Args:
        width: Of its model.
        optim: Further arguments of its optimizer.
    """

    def __init__(self, width: int = 64, **optim: Any) -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        self.model = Net(width)
        self.optim = torch.optim.AdamW(self.model.parameters(), **{"lr": 0.05, **optim})
        self.sched = torch.optim.lr_scheduler.StepLR(self.optim, 3, 0.9)
        self.progress: dict[str, Any] = {"done": 0, "mean": torch.zeros(11)}
        self.state = {
            "model": self.model,
            "optim": self.optim,
            "sched": self.sched,
            "progress": self.progress,
        }

    def advance(self) -> None:
        """One step; what it does hangs on the state alone, and is the same on all ranks."""
        self.progress["done"] += 1
        generator = torch.Generator().manual_seed(self.progress["done"])
        for parameter in self.model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.to(parameter.dtype)
        self.optim.step()
        self.sched.step()
        self.model.count += 1
        self.progress["mean"] += torch.rand(11, generator=generator)
        # The common generators move on, too: a rank that the last world lacked has others.
        torch.rand(1)
        random.random()
        np.random.rand()

    def snapshot(self) -> dict[str, Any]:
        """A copy of everything, by name."""
        return {
            **{f"model.{k}": v.clone() for k, v in self.model.state_dict().items()},
            **{
                f"optim.{i}.{k}": v.clone()
                for i, slots in self.optim.state_dict()["state"].items()
                for k, v in slots.items()
            },
            "sched": dict(self.sched.state_dict()),
            "lr": self.optim.param_groups[0]["lr"],
            "progress": {**self.progress, "mean": self.progress["mean"].clone()},
            "random.torch": torch.get_rng_state(),
            "random.python": random.getstate(),
            "random.numpy": [np.asarray(v).tobytes() for v in np.random.get_state()],
        }


_trajectories: dict[int, list[dict[str, Any]]] = {}


def reference(step: int, width: int = 64) -> dict[str, Any]:
    """The state after `step` steps of a run that nothing happened to."""
    states = _trajectories.get(width, [])
    if step >= len(states):
        with own_random():
            job = Job(width)
            states = [job.snapshot()]
            while len(states) <= max(step, 16):
                job.advance()
                states.append(job.snapshot())
        _trajectories[width] = states
    return states[step]


@contextlib.contextmanager
def own_random() -> Iterator[None]:
    """A block in which the common random generators may be used, and are put back."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def differences(one: Any, other: Any, path: str = "state") -> list[str]:
    """Where two snapshots differ, in whatever bit."""
    if type(one) is not type(other):
        return [f"{path}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, dict):
        keys = [] if list(one) == list(other) else [f"{path}: other names or order"]
        return keys + [
            d for k in one if k in other for d in differences(one[k], other[k], f"{path}.{k}")
        ]
    if isinstance(one, torch.Tensor):
        alike = one.shape == other.shape and one.dtype == other.dtype
        return [] if alike and _bytes(one) == _bytes(other) else [path]
    return [] if one == other else [path]


def _bytes(t: torch.Tensor) -> bytes:
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def make_checkpointer(path: "str | Path | Storage", job: Job, **options: Any) -> Checkpointer:
    """A checkpointer with small chunks, short deadlines, a full audit, and no waiting for disks."""
    before = opening_module.CHUNK_NBYTES
    opening_module.CHUNK_NBYTES = CHUNK_NBYTES
    try:
        storage = LocalStorage(path, QuickFiles()) if isinstance(path, str | Path) else path
        return Checkpointer(
            storage, job.state, **{"timeout_s": TIMEOUT_S, "audit": True, **options}
        )
    finally:
        opening_module.CHUNK_NBYTES = before


def lose_patience(ckpt: Checkpointer, seconds: float) -> None:
    """From now on nothing is waited for any longer; to be made, it must wait for all ranks."""
    attached = ckpt._job.attached
    ckpt._timeout_s = attached.pipeline._timeout_s = seconds
    for ranks in attached._groups:
        ranks._set_timeout(seconds)


def settle(ckpt: Checkpointer) -> None:
    """Waits until nothing is under way on this rank, clearing up included."""
    until = time.monotonic() + TIMEOUT_S
    steps = ckpt._job.attached.pipeline.steps
    while not steps.idle:
        assert time.monotonic() < until, "a save did not end"
        time.sleep(0.001)


@dataclass
class Life:
    """What one rank saw of a run.

    Attributes:
        restored: The step it went on from, None for a fresh start.
        committed: Steps whose commit it knew of.
        errors: What its checkpointer raised, class and message.
        wrong: Where the state that it restored differed from the reference.
    """

    restored: int | None = None
    committed: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def live(
    rank: int,
    path: str,
    notes: str,
    last: int,
    faults: str = "",
    keep: int | None = None,
    wait: bool = True,
    options: dict[str, Any] | None = None,
) -> Life:
    """The body of a rank: restores what there is, trains to step `last`, saves every step.

    Args:
        rank: This rank.
        path: The root.
        notes: Folder that outlives the rank: it notes each commit that it knows of.
        last: Where to stop.
        faults: Armed before the first save.
        keep: How many checkpoints to keep.
        wait: Whether to wait for each commit; else saves overlap.
        options: Further ones of the checkpointer.
    """
    seen = Life()
    job = Job()
    pending: list[SaveHandle] = []
    Path(notes, f"pid-{rank}").write_text(str(os.getpid()))
    log = os.open(Path(notes, f"committed-{rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note() -> None:
        for handle in [h for h in pending if h._done.is_set()]:
            pending.remove(handle)
            if handle.committed:
                os.write(log, f"{handle.step}\n".encode())
                seen.committed.append(handle.step)

    ckpt = make_checkpointer(path, job, keep=keep, **(options or {}))
    try:
        report = ckpt.restore()
        if report is not None:
            seen.restored = report.step
            wrong = differences(job.snapshot(), reference(report.step))
            seen.wrong = [w for w in wrong if rank == 0 or not w.startswith("state.random")]
        points.arm(faults)
        Path(notes, f"started-{rank}").touch()
        for step in range((seen.restored or 0) + 1, last + 1):
            job.advance()
            pending.append(ckpt.save(step))
            if wait:
                pending[-1].wait_committed()
            note()
        ckpt.close()
    except PlanariaError as error:
        seen.errors.append(f"{type(error).__name__}: {error}")
        with contextlib.suppress(PlanariaError):
            ckpt.close()
    note()
    os.close(log)
    return seen


def newest_known(notes: Path) -> int:
    """The newest step that any rank knew to be committed, 0 for none."""
    steps = [0]
    for file in notes.glob("committed-*"):
        steps += [int(line) for line in file.read_text().split()]
    return max(steps)


def restored(root: Path, job: Job, step: int | None = None) -> RestoreReport | None:
    """Restores without a checkpointer: it needs no lock, and leaves the root as it is."""
    return restore(
        Root(LocalStorage(root)),
        StateSet(job.state),
        Ranks(),
        step=step,
        only=None,
        strict=True,
        transforms=(),
        pool=BufferPool(1 << 20, 1 << 18),
    )


def check_survival(path: Path, newest: int, *, keep: int | None = None, width: int = 64) -> int:
    """What must hold of a root after whatever happened to the job that wrote to it.

    A restore in this process brings back exactly a committed state, none older than `newest`;
    everything that is committed is whole; training goes on, saves, and leaves no litter.

    Returns:
        The step that was restored, 0 if there was none.
    """
    for step in Root(LocalStorage(path)).steps():
        problems = open_checkpoint(path, step).verify()
        assert not problems, f"step {step}: {problems}"
    with own_random():
        job = Job(width)
        with make_checkpointer(path, job, keep=keep) as ckpt:
            report = ckpt.restore()
            found = report.step if report else 0
            assert found >= newest, f"restored step {found}, but step {newest} was committed"
            assert not (report and report.fell_back_from), report
            wrong = differences(job.snapshot(), reference(found, width))
            assert not wrong, f"step {found} came back wrong: {wrong}"
            for step in (found + 1, found + 2):
                job.advance()
                ckpt.save(step).wait_committed()
        folders = Root(LocalStorage(path)).folders()
        assert [f for f in folders if f.state != "committed"] == [], folders
        assert folders[-1].step == found + 2
        assert keep is None or len(folders) <= keep
        assert not litter(path)
        again = Job(width)
        with make_checkpointer(path, again) as ckpt:
            report = ckpt.restore()
            assert report is not None
            assert report.step == found + 2
            assert not differences(again.snapshot(), reference(found + 2, width))
    return found


def litter(path: Path) -> list[str]:
    """Files in a root that no committed step refers to."""
    found = [str(p) for p in path.rglob("*.tmp-*")]
    for folder in path.glob("step-*"):
        files = {f.name for f in open_checkpoint(folder).manifest.files} | {"manifest.json"}
        found += [str(p) for p in folder.iterdir() if p.name not in files]
    return found
