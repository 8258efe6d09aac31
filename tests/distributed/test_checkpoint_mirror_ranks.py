"""A mirror of several ranks: rank 0 copies for all, all know, all restore from it."""

import shutil
from pathlib import Path

from checkpoints import data_files, flip
from fault_job import Job, differences, reference
from mirrors import check_whole, mirror_url, mirrored_job
from ranks import run_ranks


def saves(rank: int, folder: str) -> list[bool]:
    with mirrored_job(Path(folder), job := Job()) as ckpt:
        handles = []
        for step in (1, 2):
            job.advance()
            handles.append(ckpt.save(step))
            handles[-1].wait_mirrored()
        return [handle.mirrored for handle in handles]


def restores(rank: int, folder: str) -> tuple[int, str, list[str]]:
    with mirrored_job(Path(folder), job := Job()) as ckpt:
        report = ckpt.restore()
        assert report is not None
        wrong = differences(job.snapshot(), reference(report.step))
        return report.step, report.tier, [w for w in wrong if not w.startswith("state.random")]


def test_two_ranks(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert run_ranks(2, saves, folder) == [[True, True], [True, True]]
    assert check_whole(mirror_url(tmp_path)) == [1, 2]
    assert run_ranks(2, restores, folder) == [(2, "durable", [])] * 2
    # What one rank cannot read, all take from the mirror.
    flip(data_files(tmp_path / "root", 2)[-1], -1)
    assert run_ranks(2, restores, folder) == [(2, "mirror", [])] * 2
    shutil.rmtree(tmp_path / "root")
    assert run_ranks(3, restores, folder) == [(2, "mirror", [])] * 3
