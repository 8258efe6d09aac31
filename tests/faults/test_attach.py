"""Ranks die in mid-save; those that are left attach to a new group, and go on."""

from pathlib import Path
from typing import Any

import pytest
from changing_ranks import Members, own_threads
from fault_job import Job, check_survival, make_checkpointer
from ranks import RankDied, try_ranks

import planaria.checkpoint.job as job_module
import planaria.checkpoint.opening as opening_module
from planaria.checkpoint import LATER, points
from planaria.checkpoint.past import Past
from planaria.checkpoint.storage.local import LocalStorage
from planaria.checkpoint.storage.root import Root
from planaria.core.points import arm


def sabotage(how: str) -> None:
    """Breaks a promise that the tests below must see kept."""
    if how == "does not look":
        looks = opening_module._claim_root
        opening_module._claim_root = lambda root, here, saves, *, follows: looks(
            root, here, set(), follows=follows
        )
    elif how == "owes nothing":
        merged = opening_module.merged

        class Forgets(Past):
            """Owes nothing, whatever it is told."""

            def __setattr__(self, name: str, value: Any) -> None:
                super().__setattr__(name, False if name == "owes" else value)

        opening_module.merged = lambda pasts: Forgets(**merged(pasts).to_json())
    elif how == "keeps what is given up":
        job_module._give_up = lambda job: job.handle._finish(None)  # type: ignore[assignment]


def survives(member: int, root: str, point: str, victim: int, broken: str) -> dict[str, Any]:
    """Three ranks; one dies in its second save. The others go on without it."""
    sabotage(broken)
    seen: dict[str, Any] = {}
    members, job = Members(member), Job()
    ckpt = make_checkpointer(root, job, process_group=LATER)
    ckpt.attach(members.meeting(1, [0, 1, 2]))
    job.advance()
    ckpt.save(1).wait_committed()
    arm(f"kill@{point}:rank={victim},step=2")
    job.advance()
    handle = ckpt.save(2)
    members.wait_dead(victim)
    ckpt.detach()
    ckpt.before_update()  # the gate is open
    left = [m for m in range(3) if m != victim]
    ckpt.attach(members.meeting(2, left), timeout_s=10 if broken else None)
    seen["committed"] = handle.committed
    seen["there"] = 2 in ckpt.all_steps()
    job.advance()
    owed = ckpt.step(3)
    seen["owed"] = owed is not None
    (owed or ckpt.save(3)).wait_committed()
    ckpt.close()
    seen["threads"] = own_threads()
    return seen


def check_survivors(
    tmp_path: Path, point: str, victim: int, *, committed: bool | None, broken: str = ""
) -> None:
    root = tmp_path / "root"
    results = try_ranks(3, survives, str(root), point, victim, broken, init_group=False)
    assert isinstance(results[victim].error, RankDied)
    there = False
    for result in (r for r in results if r.rank != victim):
        if result.error is not None:
            raise AssertionError(str(result.error)) from result.error
        seen = result.value
        there = seen["there"]
        assert seen["committed"] == seen["there"]
        assert committed is None or seen["committed"] == committed
        assert seen["owed"] != seen["committed"], "what was given up is made up for, and only that"
        assert seen["threads"] == []
    assert Root(LocalStorage(root)).steps() == ([1, 2, 3] if there else [1, 3])
    check_survival(root, 3)


@pytest.mark.parametrize(
    ("point", "victim", "committed"),
    [
        (points.PLAN, 0, False),
        (points.WRITE_CHUNK, 0, False),
        (points.MANIFEST_RENAMED, 0, True),
        (points.WRITE_CHUNK, 1, False),
        *(
            pytest.param(point, victim, committed, marks=pytest.mark.soak)
            for point, victim, committed in (
                (points.CAPTURE_CHUNK, 0, False),
                (points.FSYNC_END, 0, False),
                (points.RECORD, 0, False),
                (points.MANIFEST_WRITTEN, 0, False),
                (points.COMMITTED, 0, True),
                (points.RETENTION_BEGIN, 0, True),
                (points.PLAN, 2, False),
                (points.CAPTURE_END, 1, False),
                (points.RECORD, 2, False),
            )
        ),
    ],
)
def test_survivors_go_on(tmp_path: Path, point: str, victim: int, committed: bool) -> None:
    check_survivors(tmp_path, point, victim, committed=committed)


@pytest.mark.parametrize(
    ("broken", "point"),
    [
        ("does not look", points.COMMITTED),
        ("owes nothing", points.WRITE_CHUNK),
        ("keeps what is given up", points.WRITE_CHUNK),
    ],
)
def test_a_broken_attach_is_noticed(tmp_path: Path, broken: str, point: str) -> None:
    with pytest.raises(AssertionError):
        check_survivors(tmp_path, point, 0, committed=None, broken=broken)
