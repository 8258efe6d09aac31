"""SIGKILL at every named point of a copy to the mirror.

After each, the mirror shows only whole steps and restores the newest of them; no local checkpoint
is lost; and the next run in the folder finishes what was cut off.
"""

import signal
from pathlib import Path

import pytest
from fault_job import Job, check_survival, newest_known
from mirrors import check_restores, check_whole, live_mirrored, mirror_url, mirrored_job
from ranks import RankDied, try_ranks

from planaria.checkpoint import points
from planaria.checkpoint.storage.base import open_storage
from planaria.checkpoint.storage.root import Root

KEEP, LAST = 2, 4
#: From here on the step that is copied exists in the mirror.
EXISTS_FROM = points.MIRROR.index(points.MIRROR_WRITTEN)


def kill_at(point: str) -> str:
    """The fault that ends the copy of step 4, or the removal of step 2 after it."""
    step = LAST - KEEP if point == points.MIRROR_UNLISTED else LAST
    return f"kill@{point}:step={step}" + (",hit=3" if point == points.MIRROR_CHUNK else "")


@pytest.mark.parametrize("point", points.MIRROR)
def test_kill_at_point(tmp_path: Path, point: str) -> None:
    url, notes = mirror_url(tmp_path), tmp_path / "notes"
    notes.mkdir()
    # Each step is in the mirror before the next is saved, so that it is known what is there.
    with mirrored_job(tmp_path, job := Job(), keep=KEEP) as ckpt:
        for step in range(1, LAST):
            job.advance()
            ckpt.save(step).wait_mirrored()
    (result,) = try_ranks(
        1, live_mirrored, str(tmp_path), str(notes), LAST, kill_at(point), KEEP, init_group=False
    )
    assert isinstance(result.error, RankDied), result
    assert result.exitcode == -signal.SIGKILL, result

    copied = points.MIRROR.index(point) >= EXISTS_FROM
    steps = check_whole(url)
    assert steps[-1] == (LAST if copied else LAST - 1)
    assert len(steps) >= KEEP
    assert newest_known(notes) in (LAST, LAST - 1)  # the commit may not have been noted yet

    with mirrored_job(tmp_path, Job(), keep=KEEP) as ckpt:
        report = ckpt.restore()
        assert report is not None
        assert (report.step, report.tier) == (LAST, "durable")
    assert check_whole(url) == [LAST - 1, LAST]
    folders = Root(open_storage(url)).folders()
    assert [f for f in folders if f.state != "committed" or f.mixed] == []
    check_restores(tmp_path, url, LAST)
    assert check_survival(tmp_path / "root", LAST, keep=KEEP) == LAST


def test_every_point_is_passed_in_order(tmp_path: Path) -> None:
    from planaria.core.points import armed

    passed: list[str] = []
    with (
        armed(callbacks={"checkpoint.mirror.*": lambda name, step: passed.append(name)}),
        mirrored_job(tmp_path, job := Job(), keep=1) as ckpt,
    ):
        for step in (1, 2):
            job.advance()
            ckpt.save(step).wait_mirrored()
    assert list(dict.fromkeys(passed[passed.index(points.MIRROR_END) + 1 :])) == points.MIRROR
