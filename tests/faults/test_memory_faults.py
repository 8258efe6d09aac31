"""What befalls snapshot processes: training goes on, and what is restored is right."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_job import Job, check_survival, differences, make_checkpointer, reference
from memory_jobs import (
    Seen,
    eventually,
    kill,
    live,
    newest_known,
    processes,
    runtime_folder,
    tier_of,
)
from ranks import RankDied, RankResult, try_ranks

from planaria.checkpoint import MemoryTier
from planaria.checkpoint.memory import points as node_points
from planaria.checkpoint.memory import starting
from planaria.checkpoint.memory.runtime import places
from planaria.errors import ConfigError, NotSupportedError, SaveFailedError


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path) -> Iterator[Path]:
    with runtime_folder(tmp_path / "runtime") as folder:
        yield folder


def run(
    tmp_path: Path, world: int, last: int, *args: Any, env: dict[str, str] | None = None
) -> list[RankResult]:
    notes = tmp_path / "notes"
    notes.mkdir(exist_ok=True)
    root = str(tmp_path / "root")
    return try_ranks(
        world, live, root, str(notes), last, *args, init_group=world > 1, timeout=150, env=env
    )


def values(results: list[RankResult]) -> list[Seen]:
    for result in results:
        assert result.error is None, result.error
        assert not result.value.wrong, result.value
    return [result.value for result in results]


def open_one(root: Path, **options: Any) -> tuple[Any, Job]:
    job = Job()
    memory = tier_of(0, **options.pop("memory", {}))
    return make_checkpointer(root, job, memory=memory, **options), job


def take(ckpt: Any, job: Job, step: int) -> None:
    """A step with a snapshot in memory alone."""
    job.advance()
    ckpt.step(step)
    ckpt.last_snapshot.wait_committed()


def test_without_its_process_training_goes_on_and_then_with_a_new_one(tmp_path: Path) -> None:
    ckpt, job = open_one(tmp_path / "root", every=2)
    assert ckpt.restore() is None
    take(ckpt, job, 1)
    (info,) = processes()
    kill(info)
    job.advance()
    ckpt.step(2).wait_committed()
    take(ckpt, job, 3)
    (again,) = processes()
    assert again.uuid != info.uuid
    ckpt._close_and_warn()  # as a job does that fails
    other = Job()
    with make_checkpointer(tmp_path / "root", other, memory=tier_of(0)) as ckpt:
        report = ckpt.restore()
        assert report is not None
        assert (report.step, report.tier) == (3, "memory")
        assert not differences(other.snapshot(), reference(3))


def test_a_stopped_process_holds_up_nothing_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from planaria.checkpoint.memory import saving

    monkeypatch.setattr(starting, "_ANSWER_S", 1.0)
    monkeypatch.setattr(saving, "_PING_S", 1.0)
    ckpt, job = open_one(tmp_path / "root", every=2)
    ckpt.restore()
    take(ckpt, job, 1)
    (info,) = processes()
    os.kill(info.process.pid, signal.SIGSTOP)
    job.advance()
    handle = ckpt.step(2)
    handle.wait_committed()
    ckpt.last_snapshot.wait_committed()
    (again,) = processes()
    assert again.uuid != info.uuid
    ckpt.close()
    assert check_survival(tmp_path / "root", 2) == 2


@pytest.mark.parametrize(
    "policy", ["retry", pytest.param("degrade", marks=pytest.mark.soak), "fatal"]
)
def test_a_budget_too_small_costs_snapshots_not_checkpoints(tmp_path: Path, policy: Any) -> None:
    memory = {"budget": 1 << 16}
    ckpt, job = open_one(tmp_path / "root", every=2, on_failure=policy, memory=memory)
    ckpt.restore()
    job.advance()
    if policy == "fatal":
        ckpt.step(1)
        with pytest.raises(SaveFailedError, match="larger budget"):
            ckpt.last_snapshot.wait_committed()
        with pytest.raises(SaveFailedError, match="larger budget"):
            ckpt.close()
        return

    def train() -> None:
        for step in (1, 2, 3, 4):
            handle = ckpt.step(step)
            with pytest.raises(SaveFailedError, match="larger budget"):
                ckpt.last_snapshot.wait_committed()
            if handle is not None:
                handle.wait_committed()
            job.advance()
        ckpt.close()

    with pytest.warns(UserWarning, match=r"larger budget.*durable checkpoints alone") as told:
        train()
    assert len([w for w in told if "budget" in str(w.message)]) == 1
    assert check_survival(tmp_path / "root", 4) == 4


def flip(ckpt: Any, step: int) -> None:
    """Changes a byte of a snapshot where it lies."""
    client = ckpt._job.attached.memory.client
    (found,) = [s for s in client.recoverable(_soon()) if s.key.step == step]
    (file,) = found.files
    image = client.local(found.key, file)
    image[-100] ^= 1


def _soon() -> Any:
    from planaria.core.deadline import Deadline

    return Deadline(30)


def test_flipped_bytes_are_noticed_and_storage_is_taken(tmp_path: Path) -> None:
    ckpt, job = open_one(tmp_path / "root", every=2)
    ckpt.restore()
    for step in (1, 2, 3):
        job.advance()
        handle = ckpt.step(step)
        if handle is not None:
            handle.wait_committed()
        ckpt.last_snapshot.wait_committed()
    flip(ckpt, 3)
    with pytest.warns(UserWarning, match="step 3 cannot be restored"):
        report = ckpt.restore()
    assert report is not None
    assert (report.step, report.tier) == (2, "durable")
    assert [step for step, _ in report.fell_back_from] == [3]
    assert not differences(job.snapshot(), reference(2))
    # What was fallen back from is of another past now: it does not come back.
    job.advance()
    handle = ckpt.step(3)
    assert handle is not None  # the first after it is durable, whatever the policy
    handle.wait_committed()
    ckpt.last_snapshot.wait_committed()
    report = ckpt.restore()
    assert report is not None
    assert (report.step, report.tier) == (3, "memory")
    ckpt.close()


def test_sabotage_unverified_memory_restores_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above sees what it is to see: without checksums the flip comes through."""
    from planaria.checkpoint.layout import reading

    ckpt, job = open_one(tmp_path / "root")
    ckpt.restore()
    take(ckpt, job, 1)
    before = job.snapshot()
    flip(ckpt, 1)
    monkeypatch.setattr(reading, "checksum", lambda *_: ANY)
    ckpt.restore()
    assert differences(job.snapshot(), before)
    ckpt.close()


class _Any:
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


ANY = _Any()


def test_a_step_that_was_left_behind_does_not_come_back_out_of_memory(tmp_path: Path) -> None:
    ckpt, job = open_one(tmp_path / "root", every=2)
    ckpt.restore()
    for step in range(1, 6):
        job.advance()
        handle = ckpt.step(step)
        if handle is not None:
            handle.wait_committed()
    ckpt.last_snapshot.wait_committed()
    report = ckpt.restore(2)
    assert report is not None
    assert report.step == 2
    for step in (3, 4):
        job.advance()
        handle = ckpt.step(step)
        if handle is not None:
            handle.wait_committed()
        ckpt.last_snapshot.wait_committed()
    report = ckpt.restore()
    assert report is not None
    assert (report.step, report.tier) == (4, "memory")
    assert not differences(job.snapshot(), reference(4))
    ckpt.close()


def test_a_new_root_does_not_find_the_snapshots_of_the_old_one(tmp_path: Path) -> None:
    """Removed and made again at the same place, it is another run."""
    import shutil

    ckpt, job = open_one(tmp_path / "root")
    ckpt.restore()
    take(ckpt, job, 1)
    ckpt._close_and_warn()
    shutil.rmtree(tmp_path / "root")
    ckpt, _ = open_one(tmp_path / "root")
    assert ckpt.restore() is None
    assert len(processes()) == 2  # the first waits for its idle time
    ckpt.close()


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotSupportedError, match="dedup"):
        open_one(tmp_path / "a", dedup=True)
    with pytest.raises(ConfigError, match="MemoryTier"):
        make_checkpointer(tmp_path / "b", Job(), memory=3)
    with pytest.raises(ConfigError, match="token"):
        open_one(tmp_path / "c", memory={"host": "0.0.0.0"})
    wrongs: list[dict[str, Any]] = [
        {"budget": 3}, {"every": 0}, {"losses": 16}, {"idle_s": 0.0}, {"losses": -1},
    ]  # fmt: skip
    for wrong in wrongs:
        with pytest.raises(ConfigError):
            MemoryTier(**wrong)
    assert not processes()


SOME_NODE_POINTS = (node_points.COMMIT,)


@pytest.mark.parametrize(
    "point",
    [
        p if p in SOME_NODE_POINTS else pytest.param(p, marks=pytest.mark.soak)
        for p in node_points.SNAPSHOT
    ],
)
def test_a_node_killed_at(tmp_path: Path, point: str) -> None:
    """All snapshot processes that reach the point in step 3 are killed there, and then the ranks.

    With no more lost than parity makes up for, the newest that any rank knew of comes back.
    """
    memory: dict[str, Any] = {"nodes": 3, "losses": 2 if point == node_points.STORE else 1}
    env = {starting.SNAPSHOT_FAULTS_ENV: f"kill@{point}:step=3"}
    victim = "n0" if point in (node_points.DECIDED, node_points.COMMIT, node_points.COMPLETE) else (
        "n1"
    )  # fmt: skip
    memory["faulty"] = victim
    results = run(tmp_path, 3, 4, "", memory, None, 4, env=env)
    memory.pop("faulty")
    assert all(isinstance(result.error, RankDied) for result in results)
    known = newest_known(tmp_path / "notes")
    assert known in (2, 3, 4)
    logs = [place.log.read_text() for place in places() if place.log.exists()]
    died = [log for log in logs if log.count(" serves ") == 2]  # one was started in its place
    assert len(died) == 1, logs
    for seen in values(run(tmp_path, 3, 5, "", memory)):
        assert seen.tier == "memory"
        assert seen.restored is not None
        assert seen.restored >= known
        assert not seen.errors
    eventually(lambda: not processes(), "the end of the job's processes")
