"""Members that are processes: they regroup when others die, join, hang or leave."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from members import LocalMembers

from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.elastic.membership import Standing, View, connect
from planaria.elastic.membership.groups import make_group
from planaria.elastic.membership.points import JOINING, REGROUPING
from planaria.elastic.membership.rules import Rules
from planaria.elastic.reduction.transport import GroupTransport
from planaria.errors import CollectiveError, ConfigError, DeadlineError, StoppedError

BUDGET_S = 60.0


def train(member: int, enough: Path, facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """Adds ones up over all members, step after step, through every change of members.

    Args:
        member: This one.
        enough: A file; all end after the step in which any of them sees it.
        facts: What has to be equal on all.
    """
    import torch

    points.arm(os.environ.get("FAULTS", ""))  # the server of ranks had none when it loaded them
    membership = connect()
    views: list[View] = []
    sums: dict[int, float] = {}

    def rebuild(view: View) -> GroupTransport:
        views.append(view)
        return GroupTransport(make_group(membership, view, "train", Deadline(BUDGET_S)))

    try:
        view = membership.join(facts or {}, Deadline(BUDGET_S))
        transport: GroupTransport | None = None
        step = view.step or 0
        while True:
            membership.progress(step, "compute")
            time.sleep(0.002)
            membership.progress(step, "reduce")
            wanted = membership.change_wanted()
            changes = wanted in ("join", "leave")
            value = torch.tensor([1.0, float(changes), float(enough.exists())])
            try:
                transport = transport or rebuild(view)
                transport.all_reduce(value)(Deadline(BUDGET_S))
                step += 1
                sums[step] = value[0].item()
                if value[2].item():
                    break
                if not value[1].item():
                    continue
                reason = "a change"
                if wanted == "leave":
                    transport.close()
                    membership.leave("told to", Deadline(BUDGET_S))
                    return {"views": views, "sums": sums, "step": step}
            except (CollectiveError, DeadlineError) as error:
                reason = str(error)
            if transport is not None:
                transport.close()
                transport = None
            view = membership.regroup(Standing(view.generation, step, reason), Deadline(BUDGET_S))
            assert view.step is not None
            # Whoever was a step behind takes the others' word for it.
            step = view.step
            if view.last:
                views.append(view)
                break
        membership.finish(Deadline(BUDGET_S))
    except StoppedError as error:
        return {"stopped": str(error), "views": views, "sums": sums}
    except ConfigError as error:
        return {"refused": str(error), "views": views, "sums": sums}
    finally:
        membership.close()
    return {"views": views, "sums": sums, "step": step}


@pytest.fixture
def enough(tmp_path: Path) -> Path:
    """The file that ends a run: no run is over before the test has seen what is to be seen."""
    return tmp_path / "enough"


def test_survivors_go_on_when_one_is_killed(enough: Path) -> None:
    with LocalMembers(3, train, enough) as job:
        job.await_generation(1)
        job.kill(1)
        results = end(job, enough, (0, 2))
    for member in (0, 2):
        result = results[member].value
        assert [v.members for v in result["views"]] == [(0, 1, 2), (0, 2)]
        assert result["views"][1].lost == (1,)
        assert result["views"][1].step is not None


def test_the_lost_one_is_replaced_later(enough: Path) -> None:
    rules = Rules(3, policy="shrink_then_replace")
    with LocalMembers(3, train, enough, rules=rules) as job:
        job.await_generation(1)
        job.kill(0)
        results = end(job, enough, (1, 2, 3))
    assert results[1].value["views"][-1].joined == (3,)


def test_a_joiner_with_other_facts_is_refused(enough: Path) -> None:
    with LocalMembers(1, _with_own_facts, enough, rules=Rules(1, maximum=2)) as job:
        job.await_generation(1)
        job.add()
        job.await_note("refused")
        results = end(job, enough, (0,))
    assert "threads is 1 here and 0 in the job" in results[1].value["refused"]


def _with_own_facts(member: int, enough: Path) -> dict[str, Any]:
    return train(member, enough, {"threads": member})


def test_one_that_hangs_is_fenced(enough: Path) -> None:
    with LocalMembers(3, train, enough) as job:
        job.await_generation(1)
        job.kill(2, signal.SIGSTOP)
        job.let_seem_silent(2)
        results = end(job, enough, (0, 1))
    assert results[2].exitcode == -signal.SIGKILL
    assert [content["member"] for kind, content, _ in job.notes if kind == "fenced"] == [2]


def test_too_few_stop(enough: Path) -> None:
    rules = Rules(2, minimum=2, recovery_s=60.0, hang_s=1000.0, wait_for_joiners=True)
    with LocalMembers(2, train, enough, rules=rules) as job:
        job.await_generation(1)
        job.kill(1)
        job.await_note("stands")
        job.pass_time(61.0)
        results = job.wait()
    last = results[0].value["views"][-1]
    assert last.members == (0,)
    assert "1 of 2 members are left" in last.last
    assert job.coordinator.stopped == last.last


@pytest.mark.parametrize("point", REGROUPING)
def test_one_dies_in_the_recovery_of_another(point: str, enough: Path) -> None:
    with LocalMembers(4, train, enough, env={"FAULTS": f"kill@{point}:rank=2"}) as job:
        job.await_generation(1)
        job.kill(1)
        results = end(job, enough, (0, 3))
    assert results[2].exitcode == -signal.SIGKILL


@pytest.mark.parametrize("point", REGROUPING)
def test_one_hangs_in_the_recovery_of_another(point: str, enough: Path) -> None:
    with LocalMembers(3, train, enough, env={"FAULTS": f"stop@{point}:rank=2"}) as job:
        job.await_generation(1)
        job.kill(1)
        job.let_seem_silent(2)
        results = end(job, enough, (0,))
    assert results[2].exitcode == -signal.SIGKILL


def test_two_are_lost_at_once(enough: Path) -> None:
    with LocalMembers(4, train, enough) as job:
        job.await_generation(1)
        job.kill(0)
        job.kill(2)
        end(job, enough, (1, 3))


@pytest.mark.parametrize("point", JOINING)
def test_a_joiner_dies_while_it_joins(point: str, enough: Path) -> None:
    rules = Rules(2, maximum=3)
    env = {"FAULTS": f"kill@{point}:rank=2"}
    with LocalMembers(2, train, enough, rules=rules, env=env) as job:
        job.await_generation(1)
        job.await_end(job.add())
        results = end(job, enough, (0, 1))
    assert results[2].exitcode == -signal.SIGKILL


def test_members_that_leave_are_not_missed(enough: Path) -> None:
    with LocalMembers(3, train, enough) as job:
        job.await_generation(1)
        job.coordinator.leave([1])
        results = end(job, enough, (0, 2))
    assert results[1].exitcode == 0


def end(job: LocalMembers, enough: Path, survivors: tuple[int, ...]) -> dict[int, Any]:
    """Ends a run once these are its members.

    They have taken the same steps, agreed on each generation, and are the last one's members.
    """
    job.await_members(survivors)
    enough.touch()
    results = job.wait()
    values = [results[member].value for member in survivors]
    assert len({value["step"] for value in values}) == 1
    assert values[0]["step"] > (values[0]["views"][-1].step or 0)
    assert values[0]["views"][-1].members == survivors
    seen = [[(v.generation, v.members, v.step) for v in value["views"]] for value in values]
    for member, views in zip(survivors, seen, strict=True):
        there = [view for view in seen[0] if view[0] >= views[0][0]]
        assert views == there
        assert len(there) == len(seen[0]) or member not in seen[0][0][1]
    return results
