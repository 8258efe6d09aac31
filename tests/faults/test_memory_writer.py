"""Snapshot processes write the durable checkpoints: ranks that die in mid-save cost none."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_job import Job, check_survival, differences, make_checkpointer, reference
from memory_jobs import Seen, eventually, live, processes, runtime_folder, tier_of
from ranks import RankResult, try_ranks

from planaria.checkpoint import open_checkpoint, points
from planaria.checkpoint.memory import starting
from planaria.checkpoint.storage.local import LocalStorage
from planaria.checkpoint.storage.root import Root
from planaria.errors import ConfigError

OPTIONS = {"every": 2, "writer": "snapshot", "keep": 2}


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path) -> Iterator[Path]:
    with runtime_folder(tmp_path / "runtime") as folder:
        yield folder


def run(
    tmp_path: Path, last: int, faults: str = "", env: dict[str, str] | None = None, **memory: Any
) -> list[RankResult]:
    notes = tmp_path / "notes"
    notes.mkdir(exist_ok=True)
    return try_ranks(2, live, str(tmp_path / "root"), str(notes), last, faults, memory, OPTIONS,
                     timeout=150, env=env)  # fmt: skip


def seen(results: list[RankResult]) -> list[Seen]:
    for result in results:
        assert result.error is None, result.error
        assert not result.value.wrong, result.value
        assert not result.value.errors, result.value
    return [result.value for result in results]


def steps(tmp_path: Path) -> list[int]:
    return Root(LocalStorage(tmp_path / "root")).steps()


def test_the_nodes_write_and_the_ranks_tidy_up(tmp_path: Path) -> None:
    for each in seen(run(tmp_path, 7, nodes=2)):
        assert each.durable == [2, 4, 6]
        assert each.known == [1, 2, 3, 4, 5, 6, 7]
        assert not each.warned
    eventually(lambda: not processes(), "the end of the job's processes")
    assert steps(tmp_path) == [4, 6]
    for step in (4, 6):
        assert not open_checkpoint(tmp_path / "root", step).verify()
    assert check_survival(tmp_path / "root", 6, keep=2) == 6


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_a_rank_that_dies_once_all_is_described_costs_no_checkpoint(
    tmp_path: Path, rank: int
) -> None:
    place = points.SNAPSHOT_DESCRIBED if rank == 0 else points.SNAPSHOT_END
    results = run(tmp_path, 6, f"kill@{place}:rank={rank},step=4")
    assert results[rank].exitcode == -signal.SIGKILL
    for each in seen(run(tmp_path, 5)):
        assert each.restored == 4
    assert 4 in steps(tmp_path)
    eventually(lambda: not processes(), "the end of the job's processes")
    assert check_survival(tmp_path / "root", 4, keep=2) == 4


def test_sabotage_with_the_ranks_as_writers_it_does(tmp_path: Path) -> None:
    """The same death with the ranks as writers leaves the step unwritten."""
    notes = tmp_path / "notes"
    notes.mkdir()
    options = {**OPTIONS, "writer": "trainer"}
    fault = f"kill@{points.WRITE_CHUNK}:rank=0,step=4"
    results = try_ranks(2, live, str(tmp_path / "root"), str(notes), 6, fault, {}, options)
    assert results[0].exitcode == -signal.SIGKILL
    assert steps(tmp_path) == [2]


@pytest.mark.parametrize(
    "point",
    [points.WRITE_CHUNK]
    + [
        pytest.param(p, marks=pytest.mark.soak)
        for p in (points.WRITE_END, points.FSYNC_END, points.MANIFEST_BEGIN,
                  points.MANIFEST_WRITTEN, points.MANIFEST_RENAMED, points.COMMITTED)
    ],
)  # fmt: skip
def test_a_node_that_dies_in_its_writing_leaves_nothing_torn(tmp_path: Path, point: str) -> None:
    env = {starting.SNAPSHOT_FAULTS_ENV: f"kill@{point}:step=4"}
    results = run(tmp_path, 6, env=env)
    for result in results:
        assert result.error is None, result.error
        assert not result.value.wrong
    exists = point in (points.MANIFEST_RENAMED, points.COMMITTED)
    assert (4 in steps(tmp_path)) == exists
    assert check_survival(tmp_path / "root", 4 if exists else 2) in (2, 4, 6)


def test_what_a_node_that_is_lost_in_its_writing_held_is_decoded_and_written(
    tmp_path: Path,
) -> None:
    """The other one finds half a file of it, and writes it from its parity."""
    env = {starting.SNAPSHOT_FAULTS_ENV: f"kill@{points.WRITE_CHUNK}:step=4"}
    results = run(tmp_path, 4, env=env, nodes=2, losses=1, faulty="n1")
    for result in results:
        assert result.error is None, result.error
        assert not result.value.wrong
    assert results[0].value.durable == [2, 4]
    assert steps(tmp_path) == [2, 4]
    assert not open_checkpoint(tmp_path / "root", 4).verify()
    assert check_survival(tmp_path / "root", 4, keep=2) == 4


def test_a_full_disk_for_the_nodes_is_left_to_the_ranks(tmp_path: Path) -> None:
    env = {starting.SNAPSHOT_FAULTS_ENV: f"enospc@{points.WRITE_CHUNK}:step=4,times=inf"}
    for each in seen(run(tmp_path, 6, env=env)):
        assert each.durable == [2, 4, 6]
    assert steps(tmp_path) == [4, 6]
    assert check_survival(tmp_path / "root", 6, keep=2) == 6


def test_it_needs_a_memory_tier_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="memory="):
        make_checkpointer(tmp_path / "root", Job(), writer="snapshot")
    with pytest.raises(ConfigError, match="'trainer' or 'snapshot'"):
        make_checkpointer(tmp_path / "root", Job(), writer="nobody", memory=tier_of(0))


def test_after_a_rewind_the_ranks_write_once(tmp_path: Path) -> None:
    """What was left behind is set aside with the commit, which the nodes know nothing of."""
    job = Job()
    with make_checkpointer(
        tmp_path / "root", job, memory=tier_of(0), every=2, writer="snapshot"
    ) as ckpt:
        ckpt.restore()
        for step in range(1, 7):
            job.advance()
            handle = ckpt.step(step)
            if handle is not None:
                handle.wait_committed()
        ckpt.restore(2)
        job.advance()
        handle = ckpt.step(3)
        assert handle is not None
        handle.wait_committed()
        assert ckpt.all_steps() == [2, 3]
        report = ckpt.restore()
        assert report is not None
        assert report.step == 3
        assert not differences(job.snapshot(), reference(3))
