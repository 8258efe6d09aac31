"""Agents whose ranks die, hang, crash or are told to stop: the others go on."""

import os
import signal
from pathlib import Path

from elastic_node import Nodes


def test_ranks_train_to_the_end(tmp_path: Path) -> None:
    with Nodes(tmp_path) as nodes:
        first = nodes.start(2, steps=20)
        end = first.end()
    assert end["state"] == "done", first.output()
    assert first.journal(0, "finished")[0]["step"] == 20
    assert [e["members"] for e in first.events("generation")] == [[0, 1]]


def test_survivors_go_on_in_the_same_processes(tmp_path: Path) -> None:
    with Nodes(tmp_path) as nodes:
        first = nodes.start(3, trainer={"group": True})
        first.await_first_step(0, 1)
        os.kill(first.pid_of(1), signal.SIGKILL)
        first.await_first_step(0, 2)
        nodes.enough()
        end = first.end()
    assert end["state"] == "done", first.output()
    assert end["failures"] == [1]
    assert [e["members"] for e in first.events("generation")] == [[0, 1, 2], [0, 2]]
    assert len(first.events("started")) == 3
    assert {e["member"]: e["exit_code"] for e in first.events("ended")} == {0: 0, 1: -9, 2: 0}
    steps = {first.journal(member, "finished")[0]["step"] for member in (0, 2)}
    assert len(steps) == 1


def test_a_lost_rank_is_replaced(tmp_path: Path) -> None:
    rules = {"policy": "shrink_then_replace"}
    with Nodes(tmp_path) as nodes:
        first = nodes.start(2, rules=rules)
        first.await_first_step(0, 1)
        os.kill(first.pid_of(0), signal.SIGKILL)
        first.await_event("generation", members=[1])
        first.await_event("generation", members=[1, 2])
        nodes.enough()
        end = first.end()
    assert end["state"] == "done", first.output()
    assert (first.folder / "logs" / "rank-2.log").exists()


def test_survivors_wait_for_the_replacement(tmp_path: Path) -> None:
    with Nodes(tmp_path) as nodes:
        first = nodes.start(2, rules={"policy": "replace"})
        first.await_first_step(0, 1)
        os.kill(first.pid_of(0), signal.SIGKILL)
        first.await_event("generation", members=[1, 2])
        nodes.enough()
        end = first.end()
    assert end["state"] == "done", first.output()
    assert len(first.events("generation")) == 2


def test_all_ranks_lost_begin_again(tmp_path: Path) -> None:
    """Nobody brings state: there is no step to go on from, as at the start."""
    with Nodes(tmp_path) as nodes:
        first = nodes.start(1, rules={"policy": "replace"})
        first.await_first_step(0, 1)
        os.kill(first.pid_of(0), signal.SIGKILL)
        again = first.await_event("generation", members=[1])
        nodes.enough()
        assert first.end()["state"] == "done"
    assert again["step"] is None
    assert again["joined"] == []


def test_a_rank_that_hangs_is_killed_first(tmp_path: Path) -> None:
    with Nodes(tmp_path) as nodes:
        first = nodes.start(3)
        first.await_first_step(0, 1)
        os.kill(first.pid_of(2), signal.SIGSTOP)
        first.let_seem_silent(2)
        generation = first.await_event("generation", members=[0, 1])
        os.kill(first.pid, 0)
        nodes.enough()
        end = first.end()
    assert end["state"] == "done", first.output()
    ended = next(e for e in first.events() if e["kind"] in ("exits", "ended") and e["member"] == 2)
    assert ended["exit_code"] == -signal.SIGKILL
    assert ended["at"] <= generation["at"]  # proven dead before anything was decided
    assert first.events("fenced")[0]["member"] == 2


def test_a_rank_that_always_crashes_ends_the_job(tmp_path: Path) -> None:
    with Nodes(tmp_path) as nodes:
        first = nodes.start(
            2,
            rules={"policy": "shrink_then_replace", "repeats": 2},
            trainer={"crash_at": 3, "crash_member": 1},
        )
        first.await_event("generation", members=[0, 2])
        nodes.enough()
        end = first.end()
    assert end["state"] == "done"
    assert "exited with code 1" in first.events("failure")[0]["how"]


def test_below_the_minimum_it_waits_and_stops(tmp_path: Path) -> None:
    with Nodes(tmp_path) as nodes:
        first = nodes.start(2, rules={"minimum": 2})
        first.await_first_step(0, 1)
        os.kill(first.pid_of(0), signal.SIGKILL)
        first.let_recovery_take_too_long()
        end = first.end()
    assert end["state"] == "stopped"
    assert "1 of 2 members are left, 2 are the least" in end["reason"]
    (last,) = first.journal(1, "last")
    assert last["members"] == [1]
    assert "1 of 2" in last["why"]


def test_a_request_to_stop_reaches_all_ranks(tmp_path: Path) -> None:
    with Nodes(tmp_path) as nodes:
        first = nodes.start(2)
        first.await_first_step(1, 1)
        os.kill(first.pid, signal.SIGTERM)
        end = first.end()
    assert end["state"] == "preempted", first.output()
    assert all(first.journal(member, "stops") for member in range(2))


def test_a_replacement_that_comes_too_late_is_no_failure(tmp_path: Path) -> None:
    with Nodes(tmp_path) as nodes:
        first = nodes.start(2, rules={"policy": "shrink_then_replace"}, trainer={"late_member": 2})
        first.await_first_step(0, 1)
        os.kill(first.pid_of(0), signal.SIGKILL)
        first.await_event("started", member=2)
        first.await_event("generation", members=[1])
        nodes.enough()
        end = first.end()
    assert end["state"] == "done"
    assert end["failures"] == [0]
    assert [e["member"] for e in first.events("failure")] == [0]


def test_a_replacement_that_hangs_before_it_joins_is_killed(tmp_path: Path) -> None:
    rules = {"policy": "shrink_then_replace"}
    with Nodes(tmp_path) as nodes:
        first = nodes.start(2, rules=rules, trainer={"late_member": 2})
        first.await_first_step(0, 1)
        os.kill(first.pid_of(0), signal.SIGKILL)
        first.await_event("started", member=2)
        first.let_seem_silent(2)
        first.await_event("generation", members=[1, 3])
        nodes.enough()
        assert first.end()["state"] == "done"
    assert [e["member"] for e in first.events("fenced")] == [2]
