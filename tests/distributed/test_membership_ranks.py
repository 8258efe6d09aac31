"""Members that are processes: they regroup when others die, join, hang or leave."""

import os
import signal
import time
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


def train(
    member: int, steps: int, facts: dict[str, Any] | None = None, pause: float = 0.0
) -> dict[str, Any]:
    """Adds ones up over all members, step after step, through every change of members."""
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
        while step < steps:
            membership.progress(step, "compute")
            time.sleep(pause)
            membership.progress(step, "reduce")
            wanted = membership.change_wanted()
            value = torch.tensor([1.0, float(wanted in ("join", "leave"))])
            try:
                transport = transport or rebuild(view)
                transport.all_reduce(value)(Deadline(BUDGET_S))
                step += 1
                sums[step] = value[0].item()
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


def test_survivors_go_on_when_one_is_killed() -> None:
    with LocalMembers(3, train, 200, None, 0.005) as job:
        job.await_generation(1)
        time.sleep(0.2)
        job.kill(1)
        results = job.wait()
    for member in (0, 2):
        result = results[member].value
        assert result["step"] == 200
        assert [v.members for v in result["views"]] == [(0, 1, 2), (0, 2)]
        assert result["views"][1].lost == (1,)
        assert result["views"][1].step is not None


def test_the_lost_one_is_replaced_later() -> None:
    rules = Rules(3, policy="shrink_then_replace")
    with LocalMembers(3, train, 400, None, 0.005, rules=rules) as job:
        job.await_generation(1)
        job.kill(0)
        results = job.wait()
    last = results[1].value["views"][-1]
    assert last.members == (1, 2, 3)
    assert last.joined == (3,)
    assert results[3].value["step"] == 400


def test_a_joiner_with_other_facts_is_refused() -> None:
    with LocalMembers(1, _with_own_facts, rules=Rules(1, maximum=2)) as job:
        job.await_generation(1)
        job.add()
        results = job.wait()
    assert "threads is 1 here and 0 in the job" in results[1].value["refused"]
    assert results[0].value["step"] == 100


def _with_own_facts(member: int) -> dict[str, Any]:
    return train(member, 100, {"threads": member}, 0.005)


def test_one_that_hangs_is_fenced() -> None:
    rules = Rules(3, hang_s=1.0)
    with LocalMembers(3, train, 400, None, 0.005, rules=rules) as job:
        job.await_generation(1)
        job.kill(2, signal.SIGSTOP)
        results = job.wait()
    assert results[2].exitcode == -signal.SIGKILL
    for member in (0, 1):
        assert results[member].value["step"] == 400
        assert results[member].value["views"][-1].members == (0, 1)
    assert [content["member"] for kind, content, _ in job.notes if kind == "fenced"] == [2]


def test_too_few_stop() -> None:
    rules = Rules(2, minimum=2, recovery_s=1.0, wait_for_joiners=True)
    with LocalMembers(2, train, 10**9, rules=rules) as job:
        job.await_generation(1)
        job.kill(1)
        results = job.wait()
    last = results[0].value["views"][-1]
    assert last.members == (0,)
    assert "1 of 2 members are left" in last.last
    assert job.coordinator.stopped == last.last


@pytest.mark.parametrize("point", REGROUPING)
def test_one_dies_in_the_recovery_of_another(point: str) -> None:
    with LocalMembers(4, train, 200, None, 0.005, env={"FAULTS": f"kill@{point}:rank=2"}) as job:
        job.await_generation(1)
        job.kill(1)
        results = job.wait()
    assert results[2].exitcode == -signal.SIGKILL
    check_survivors(results, (0, 3), 200)


@pytest.mark.parametrize("point", REGROUPING)
def test_one_hangs_in_the_recovery_of_another(point: str) -> None:
    rules = Rules(3, hang_s=1.0, recovery_s=30.0)
    env = {"FAULTS": f"stop@{point}:rank=2"}
    with LocalMembers(3, train, 100, None, 0.005, rules=rules, env=env) as job:
        job.await_generation(1)
        job.kill(1)
        results = job.wait()
    assert results[2].exitcode == -signal.SIGKILL
    check_survivors(results, (0,), 100)


def test_two_are_lost_at_once() -> None:
    with LocalMembers(4, train, 200, None, 0.005) as job:
        job.await_generation(1)
        job.kill(0)
        job.kill(2)
        results = job.wait()
    check_survivors(results, (1, 3), 200)


@pytest.mark.parametrize("point", JOINING)
def test_a_joiner_dies_while_it_joins(point: str) -> None:
    rules = Rules(2, maximum=3)
    env = {"FAULTS": f"kill@{point}:rank=2"}
    with LocalMembers(2, train, 200, None, 0.005, rules=rules, env=env) as job:
        job.await_generation(1)
        job.add()
        results = job.wait()
    assert results[2].exitcode == -signal.SIGKILL
    check_survivors(results, (0, 1), 200)


def test_members_that_leave_are_not_missed() -> None:
    with LocalMembers(3, train, 200, None, 0.005) as job:
        job.await_generation(1)
        job.coordinator.leave([1])
        results = job.wait()
    assert results[1].exitcode == 0
    check_survivors(results, (0, 2), 200)


def check_survivors(results: dict[int, Any], survivors: tuple[int, ...], steps: int) -> None:
    """They have taken all steps, agreed on each generation, and are the last one's members."""
    values = [results[member].value for member in survivors]
    assert [value["step"] for value in values] == [steps] * len(survivors)
    assert values[0]["views"][-1].members == survivors
    seen = [[(v.generation, v.members, v.step) for v in value["views"]] for value in values]
    for other in seen[1:]:
        assert other == seen[0]
