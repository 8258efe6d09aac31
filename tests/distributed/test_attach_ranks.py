"""Ranks that change while all are alive: some join, rank 0 leaves, what they hold changes."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from changing_ranks import WAIT_S, Members, own_threads
from fault_job import Job, differences, make_checkpointer, reference
from memory_jobs import processes, runtime_folder, tier_of
from mirrors import check_whole, mirror_url, mirrored_job
from mixture import Mixture, begin, check_stored
from ranks import run_ranks

from planaria.checkpoint import LATER, open_checkpoint, points
from planaria.checkpoint.storage.local import LocalStorage
from planaria.checkpoint.storage.root import Root
from planaria.core.collective import Meeting, Ranks
from planaria.core.points import arm_callback
from planaria.errors import CollectiveError, ConfigError, SaveFailedError


def joins(member: int, root: str, broken: bool) -> list[str]:
    """Rank 2 joins two others, of which one waits for the other in a save at that moment."""
    if broken:
        Ranks.abandon = lambda self: None  # type: ignore[method-assign]
    members, job = Members(member), Job()
    ckpt = make_checkpointer(root, job, process_group=LATER, every=1)
    if member < 2:
        ckpt.attach(members.meeting(1, [0, 1]))
        job.advance()
        saved = ckpt.step(1)
        assert saved is not None
        saved.wait_committed()
        job.advance()
        handle = None
        if member == 1:
            # Not woken by rank 0, which waits for nothing and holds its groups yet.
            old, waits = ckpt._job.attached.pipeline, threading.Event()
            arm_callback(points.PLAN, lambda *_: waits.set())
            handle = ckpt.save(2)
            assert waits.wait(WAIT_S)
            time.sleep(0.2)  # it comes from there to where it waits
            ckpt.detach()
            until = time.monotonic() + (2 if broken else WAIT_S)
            while not old.unknown:
                assert time.monotonic() < until, "it waits on"
                time.sleep(0.01)
            members.say("woken")
        else:
            members.hear("woken", [1])
        ckpt.attach(members.meeting(2, [0, 1, 2]))
        if handle is not None:
            with pytest.raises(SaveFailedError, match="given up, because the job's ranks"):
                handle.wait_committed()
    else:
        ckpt.attach(members.meeting(2, [0, 1, 2]))
        report = ckpt.restore()
        assert report is not None
    if member < 2:
        assert ckpt.restore() is not None
    assert not [d for d in differences(job.snapshot(), reference(1)) if "random" not in d]
    job.advance()
    saved = ckpt.step(2)
    assert saved is not None
    saved.wait_committed()
    ckpt.close()
    return own_threads()


def check_join(root: Path, *, broken: bool = False) -> None:
    # Where it is broken the others wait for one that has failed: it is known by then.
    grace_s = 1.0 if broken else 20.0
    for left in run_ranks(3, joins, str(root), broken, init_group=False, grace_s=grace_s):
        assert left == []
    assert Root(LocalStorage(root)).steps() == [1, 2]
    assert open_checkpoint(root).manifest.world_size == 3


def test_a_rank_joins_while_another_saves(tmp_path: Path) -> None:
    check_join(tmp_path / "root")


def test_a_thread_that_waits_on_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="it waits on"):
        check_join(tmp_path / "root", broken=True)


def hands_over(member: int, folder: str) -> dict[str, Any]:
    """Rank 0 leaves, with its lock and its mirror; then what the others hold is cut anew."""
    members, job, seen = Members(member), Job(), {}
    options = {"process_group": LATER, "keep": 2}
    with mirrored_job(Path(folder), job, **options) as ckpt:
        ckpt.attach(members.meeting(1, [0, 1, 2]))
        for step in (1, 2):
            job.advance()
            ckpt.save(step).wait_mirrored()
        if member == 0:
            ckpt.close()
            return seen
        ckpt.attach(members.meeting(2, [1, 2]))
        with pytest.raises(ConfigError, match="state must be a dict"):
            ckpt.attach(members.meeting(3, [1, 2]), state={})
        rows = torch.arange(8.0).reshape(4, 2) + member
        ckpt.attach(members.meeting(4, [1, 2]), state={"mine": {f"rows{member}": rows}})
        handle = ckpt.save(3)
        handle.wait_mirrored()
    return seen


def test_rank_0_hands_over(tmp_path: Path) -> None:
    run_ranks(3, hands_over, str(tmp_path), init_group=False)
    root = tmp_path / "root"
    assert Root(LocalStorage(root)).steps() == [2, 3]
    assert check_whole(mirror_url(tmp_path)) == [2, 3]
    step = open_checkpoint(root)
    assert step.manifest.world_size == 2
    assert torch.equal(step.read("mine.rows2"), torch.arange(8.0).reshape(4, 2) + 2)


def changes_places(member: int, root: str) -> bool:
    """All live on, in another order: the lock goes from hand to hand."""
    members, job = Members(member), Job()
    ckpt = make_checkpointer(root, job, process_group=LATER)
    for generation, order in enumerate(([0, 1], [1, 0], [1, 0], [0, 1]), 1):
        ckpt.attach(members.meeting(generation, order))
        job.advance()
        ckpt.save(generation).wait_committed()
        assert (ckpt._job._lock is not None) == (order[0] == member)
    ckpt.detach()
    with pytest.raises(CollectiveError, match="call attach"):
        ckpt.step(9)
    ckpt.close()
    return own_threads() == []


def test_ranks_change_places(tmp_path: Path) -> None:
    assert run_ranks(2, changes_places, str(tmp_path / "root"), init_group=False) == [True, True]
    assert Root(LocalStorage(tmp_path / "root")).steps() == [1, 2, 3, 4]


def refers_on(member: int, root: str) -> int:
    """One of two ranks is left: it refers to what both have written."""
    members, model = Members(member), Mixture()
    ckpt = begin(root, model, process_group=LATER)
    ckpt.attach(members.meeting(1, [0, 1]))
    ckpt.save(1).wait_committed()
    if member == 0:
        ckpt.close()
        return 0
    ckpt.attach(members.meeting(2, [1]))
    ckpt.before_update()
    model.touch(3)
    handle = ckpt.save(2)
    handle.wait_committed()
    check_stored(Path(root), {2: model.copy()})
    ckpt.close()
    return handle.referenced_nbytes


def test_what_others_have_written_is_referred_to(tmp_path: Path) -> None:
    _, referred = run_ranks(2, refers_on, str(tmp_path / "root"), init_group=False)
    files = open_checkpoint(tmp_path / "root", 2).manifest.files
    assert {f.name.split("-")[1] for f in files if f.step == 1} == {"00000", "00001"}
    assert referred > 0


def remembers(member: int, root: str) -> tuple[bool, str]:
    """Two nodes; the second is left alone, and goes on with snapshots in memory."""
    members, job = Members(member), Job()
    ckpt = make_checkpointer(root, job, process_group=LATER, memory=tier_of(member, nodes=2))
    ckpt.attach(members.meeting(1, [0, 1]))
    job.advance()
    ckpt.save(1).wait_in_memory()
    if member == 0:
        ckpt.close()
        return True, ""
    ckpt.attach(members.meeting(2, [1]))
    job.advance()
    handle = ckpt.save(2)
    handle.wait_in_memory()
    job.advance()
    report = ckpt.restore()
    assert report is not None
    ckpt.close()
    return report.step == 2, report.tier


def test_snapshots_in_memory_go_on(tmp_path: Path) -> None:
    with runtime_folder(tmp_path / "runtime"):
        seen = run_ranks(2, remembers, str(tmp_path / "root"), init_group=False)
        assert seen[1] == (True, "memory")
        assert processes() is not None


def alone(rank: int, root: str) -> list[int]:
    """A job of one process, attached again and again, and with torch's own group."""
    job = Job()
    with make_checkpointer(root, job) as ckpt:
        for step in (1, 2, 3):
            job.advance()
            handle = ckpt.save(step)
            if step > 1:
                handle.wait_committed()
            ckpt.attach(None, state=job.state)
            assert handle.committed == (step > 1 or 1 in ckpt.all_steps())
        ckpt.attach(Meeting(None, 0, 1))
        assert ckpt.restore() is not None
    return Root(LocalStorage(root)).steps()[-2:]


def test_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert alone(0, str(tmp_path / "root")) == [2, 3]
    monkeypatch.setenv("PLANARIA_ELASTIC", "127.0.0.1:1")
    job = Job()
    ckpt = make_checkpointer(tmp_path / "other", job, every=1)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ConfigError, match="does not know its ranks yet"):
        ckpt.step(1)
    ckpt.attach()
    job.advance()
    ckpt.step(1)
    ckpt.close()
    assert Root(LocalStorage(tmp_path / "other")).steps() == [1]
    with pytest.raises(ConfigError, match="every="):
        make_checkpointer(tmp_path / "other", job, every=0)
