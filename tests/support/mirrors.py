"""What tests of mirrors share: a job with a mirror, and what must hold of the mirror afterwards."""

from pathlib import Path
from typing import Any

import flaky_store  # registers its protocol, in ranks too
from fault_job import Job, differences, live, make_checkpointer, own_random, reference

from planaria.checkpoint import Checkpointer, open_checkpoint
from planaria.checkpoint.storage.base import open_storage
from planaria.checkpoint.storage.root import Root

faults = flaky_store.faults


def mirror_url(folder: Path) -> str:
    """The URL of a mirror below a test's folder."""
    return f"flaky://{folder}/mirror"


def mirrored_job(folder: Path, job: Job, **options: Any) -> Checkpointer:
    """A checkpointer with its root and its mirror below a test's folder."""
    options = {"mirror": mirror_url(folder), **options}
    return make_checkpointer(folder / "root", job, **options)


def train(ckpt: Checkpointer, job: Job, last: int, *, wait: bool = True) -> None:
    """Trains to a step and saves each; waits for the copies or only for the commits."""
    for step in range(job.progress["done"] + 1, last + 1):
        job.advance()
        handle = ckpt.save(step)
        if wait:
            handle.wait_mirrored()
        else:
            handle.wait_committed()


def steps_of(url: str) -> list[int]:
    """Committed steps."""
    return Root(open_storage(url)).steps()


def check_whole(url: str) -> list[int]:
    """Every step that the mirror shows is whole; returns them."""
    steps = steps_of(url)
    for step in steps:
        assert not open_checkpoint(url, step).verify()
    return steps


def check_restores(folder: Path, url: str, step: int) -> None:
    """With nothing but the mirror, the run goes on from exactly the state after a step."""
    with own_random():
        job = Job()
        with make_checkpointer(folder / "elsewhere", job, mirror=url) as ckpt:
            report = ckpt.restore()
            assert report is not None
            assert (report.step, report.tier) == (step, "mirror")
            assert not report.fell_back_from
            assert not differences(job.snapshot(), reference(step))


def live_mirrored(rank: int, folder: str, notes: str, last: int, fault: str, keep: int) -> Any:
    """A rank that saves every step and has a mirror; a fault ends it."""
    options = {"mirror": mirror_url(Path(folder))}
    return live(rank, f"{folder}/root", notes, last, fault, keep, True, options)
