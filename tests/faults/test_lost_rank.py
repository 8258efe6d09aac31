"""A rank that dies or hangs in mid-save: the others learn of it in time, and nothing hangs."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fault_job import Job, check_survival, differences, lose_patience, make_checkpointer
from ranks import RankDied, run_ranks, try_ranks

from planaria.checkpoint import Checkpointer, points
from planaria.checkpoint.storage.local import LocalStorage
from planaria.checkpoint.storage.root import Root
from planaria.core.points import arm, arm_callback
from planaria.errors import PlanariaError, SaveFailedError

TIMEOUT_S = 2.0


def own_threads() -> list[str]:
    """The checkpointer's threads that are alive."""
    return [t.name for t in threading.enumerate() if t.name.startswith("planaria-")]


def dies_between_saves(rank: int, path: str) -> list[str]:
    """Rank 1, which writes nothing, dies when the next save has been captured already."""
    state = {"all": torch.ones(8)}
    ckpt = Checkpointer(path, state, timeout_s=60)
    captured = threading.Event()
    if rank == 1:

        def die(name: str, step: int | None) -> None:
            assert captured.wait(60)
            time.sleep(0.2)  # the other rank comes as far
            os.kill(os.getpid(), signal.SIGKILL)

        arm_callback(points.RECORD, die)
    handles = [ckpt.save(1), ckpt.save(2)]
    handles[1].wait_captured()
    captured.set()
    errors = []
    for handle in handles:
        with pytest.raises(SaveFailedError) as info:
            handle.wait_committed()
        errors.append(str(info.value))
    with pytest.raises(SaveFailedError):
        ckpt.close()
    return errors


def test_nobody_commits_alone_what_all_had_captured(tmp_path: Path) -> None:
    first, _ = run_ranks(2, dies_between_saves, str(tmp_path / "root"), expect_dead=[1])
    assert len(first) == 2
    assert Root(LocalStorage(tmp_path / "root")).steps() == []


def meets_a_hung_rank(rank: int, root: str, notes: str, point: str, victim: int) -> dict[str, Any]:
    """One rank stops (SIGSTOP) in its second save; the other must come out of everything."""
    Path(notes, f"pid-{rank}").write_text(str(os.getpid()))
    job, seen = Job(), {}
    ckpt = make_checkpointer(root, job)
    job.advance()
    ckpt.save(1).wait_committed()
    if rank != victim:
        lose_patience(ckpt, TIMEOUT_S)
    arm(f"stop@{point}:rank={victim},step=2")
    job.advance()
    before = job.snapshot()
    dist.barrier()  # the victim comes as far as where it stops
    handle = ckpt.save(2)
    try:
        seen["gate"] = came_out(ckpt.before_update)
        seen["commit"] = came_out(handle.wait_committed)
        seen["next"] = came_out(lambda: ckpt.save(3).wait_committed())
        seen["close"] = came_out(ckpt.close)
        seen["unharmed"] = not differences(job.snapshot(), before)
        seen["threads"] = own_threads()
    finally:
        os.kill(int(Path(notes, f"pid-{1 - rank}").read_text()), signal.SIGKILL)
    return seen


def came_out(call: Callable[[], Any]) -> str:
    """What a call ended with; that it ended is what the run's own deadline checks."""
    try:
        call()
    except PlanariaError as error:
        return type(error).__name__
    return "well"


@pytest.mark.parametrize(
    ("point", "victim"),
    [
        (points.CALLED, 1),
        (points.PLAN, 1),
        (points.WRITE_CHUNK, 1),
        (points.COMMITTED, 0),
        *(
            pytest.param(point, victim, marks=pytest.mark.soak)
            for point, victim in (
                (points.PLAN, 0),
                (points.CAPTURE_CHUNK, 1),
                (points.WRITE_CHUNK, 0),
                (points.FSYNC_END, 1),
                (points.RECORD, 1),
                (points.MANIFEST_BEGIN, 0),
            )
        ),
    ],
)
def test_a_hung_rank_holds_nobody(tmp_path: Path, point: str, victim: int) -> None:
    root, notes = tmp_path / "root", tmp_path / "notes"
    notes.mkdir()
    results = try_ranks(2, meets_a_hung_rank, str(root), str(notes), point, victim)
    assert isinstance(results[victim].error, RankDied)
    assert results[1 - victim].error is None
    seen = results[1 - victim].value
    assert seen["unharmed"]
    assert seen["threads"] == []
    failures = {"SaveFailedError", "DeadlineError", "CollectiveError"}
    assert seen["commit"] in failures
    assert seen["next"] in failures
    assert seen["gate"] in {"well", *failures}
    check_survival(root, 2 if point == points.COMMITTED else 1)


def loses_a_voter(rank: int, root: str) -> tuple[str, str, list[str]]:
    """The other rank dies while a vote on stopping is under way."""
    ckpt = make_checkpointer(root, Job())
    ckpt.step(1)
    ckpt.step(2)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return came_out(ckpt.close), came_out(ckpt.close), own_threads()


def test_close_after_a_loss_ends_everything(tmp_path: Path) -> None:
    """Also where it has to say that the ranks could not agree."""
    seen, _ = run_ranks(2, loses_a_voter, str(tmp_path / "root"), expect_dead=[1])
    first, again, threads = seen
    assert first in {"well", "CollectiveError"}
    assert again == "well"
    assert threads == []
    make_checkpointer(tmp_path / "root", Job()).close()
