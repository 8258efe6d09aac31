"""Clearing up after old saves while the next one is under way on another rank."""

import threading
import time
from pathlib import Path

from fault_job import Job, check_survival, make_checkpointer
from ranks import run_ranks

from planaria.checkpoint import open_checkpoint, points
from planaria.checkpoint.storage.local import LocalStorage
from planaria.core.points import armed


class LateList(LocalStorage):
    """When the root is listed after the first save, another rank has begun to write the next."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.asked = threading.Event()

    def list(self, path: str = "") -> list[str]:
        if not path and not self.asked.is_set() and "step-00000001" in super().list():
            self.asked.set()
            until = time.monotonic() + 60
            while not [*Path(self.url).glob("step-00000002/rank-00001*")]:
                assert time.monotonic() < until, "rank 1 did not begin"
                time.sleep(0.005)
        return super().list(path)


def saves_twice(rank: int, path: str) -> None:
    job, storage = Job(), LateList(path)
    with make_checkpointer(storage if rank == 0 else path, job) as ckpt:
        job.advance()
        ckpt.save(1)
        if rank == 0:
            assert storage.asked.wait(60)
        job.advance()
        ckpt.save(2).wait_committed()


def test_what_another_rank_has_just_begun_is_not_swept(tmp_path: Path) -> None:
    run_ranks(2, saves_twice, str(tmp_path / "root"))
    assert check_survival(tmp_path / "root", 2) == 2


def saves_what_is_being_removed(rank: int, path: str) -> list[str]:
    root, job, removing = Path(path), Job(), threading.Event()

    def of_rank_1() -> set[Path]:
        return set(root.glob("step-00000001/rank-00001*"))

    def wait_for_new_file(name: str, step: int | None) -> None:
        old, until = of_rank_1(), time.monotonic() + 0.5
        removing.set()
        # In vain: rank 0 does not agree to the save before it has removed the step.
        while time.monotonic() < until and not of_rank_1() - old:
            time.sleep(0.005)

    with (
        armed(callbacks={points.RETENTION_UNLISTED: wait_for_new_file}),
        make_checkpointer(path, job, keep=1) as ckpt,
    ):
        for step in (1, 2):
            job.advance()
            ckpt.save(step)
        assert rank == 1 or removing.wait(60)
        ckpt.save(1).wait_committed()
        assert ckpt.all_steps() == [1, 2]
        return [str(problem) for problem in open_checkpoint(root, 1).verify()]


def test_a_step_is_not_removed_and_saved_again_at_once(tmp_path: Path) -> None:
    assert run_ranks(2, saves_what_is_being_removed, str(tmp_path / "root")) == [[], []]
