"""Several agents: ranks that join a job, and what becomes of it when an agent is lost."""

import os
import signal
from pathlib import Path

from elastic_node import Nodes

SLOW = {"hang_s": 20.0, "recovery_s": 40.0}


def test_a_second_agent_brings_ranks(tmp_path: Path) -> None:
    with Nodes(tmp_path) as nodes:
        first = nodes.start(2, rules={"maximum": 4, **SLOW})
        first.await_first_step(0, 1)
        second = nodes.start(2, join=first.address)
        first.await_event("generation", members=[0, 1, 2, 3])
        nodes.enough()
        ends = [first.end(), second.end()]
    assert [end["state"] for end in ends] == ["done", "done"], first.output() + second.output()
    assert second.events("adopted")[0]["offer"] == {"config": "of the first"}
    for member in range(4):
        assert first.journal(member, "finished")


def test_the_coordinators_agent_is_lost(tmp_path: Path) -> None:
    """Its ranks die with it, which the other agent, on the same machine, can prove."""
    rules = {"world": 4, "minimum": 2, **SLOW}
    with Nodes(tmp_path) as nodes:
        first = nodes.start(2, rules=rules)
        second = nodes.start(2, rules=rules, join=first.address)
        before = first.await_first_step(3, 1)
        os.kill(first.pid, signal.SIGKILL)
        second.await_event("generation", members=[2, 3])
        after = second.await_first_step(3, 2)
        nodes.enough()
        end = second.end()
    assert end["state"] == "done", second.output()
    assert second.events("elected")[0]["dead"] == [0, 1]
    assert after["step"] >= before["step"]
    assert len({tuple(v["store"]) for v in second.journal(3, "view")}) == 2  # it has a new home


def test_an_agent_with_other_facts_is_refused(tmp_path: Path) -> None:
    with Nodes(tmp_path) as nodes:
        first = nodes.start(1, rules={"maximum": 2}, facts={"code": "a", "torch": "2.13"})
        first.await_first_step(0, 1)
        second = nodes.start(1, join=first.address, facts={"code": "b", "torch": "2.13"})
        end = second.end()
        stranger = nodes.start(1, join=first.address, token="another token altogether").end()
        nodes.enough()
        assert first.end()["state"] == "done"
    assert "ConfigError" in end["reason"]
    assert "code is 'b' here and 'a' in the job" in end["reason"]
    assert "WireError" in stranger["reason"]
    assert not second.events("started")


def test_a_side_without_quorum_stops(tmp_path: Path) -> None:
    """The agent with one of three members falls silent; when it is back, it is told to stop."""
    rules = {"world": 3, "hang_s": 3.0, "recovery_s": 30.0}
    with Nodes(tmp_path) as nodes:
        first = nodes.start(2, rules=rules)
        second = nodes.start(1, rules=rules, join=first.address)
        first.await_first_step(2, 1)
        os.kill(second.pid, signal.SIGSTOP)
        first.await_event("agent_lost")
        os.kill(first.pid_of(0), signal.SIGUSR1)  # has it regroup
        first.await_event("generation", members=[0, 1])
        os.kill(second.pid, signal.SIGCONT)
        end = second.end()
        nodes.enough()
        assert first.end()["state"] == "done"
    assert end["state"] == "stopped"
    assert "the job went on without members [2]" in end["reason"]
    assert "went on without" in second.journal(2, "stopped")[0]["why"]
    assert [v["generation"] for v in second.journal(2, "view")] == [1]


def test_a_coordinator_that_was_replaced_steps_down(tmp_path: Path) -> None:
    """It falls silent, with one of three members; the others have a quorum without any proof."""
    rules = {"world": 3, "hang_s": 3.0, "recovery_s": 30.0}
    with Nodes(tmp_path) as nodes:
        first = nodes.start(1, rules=rules)
        second = nodes.start(2, rules=rules, join=first.address)
        first.await_first_step(2, 1)
        os.kill(first.pid, signal.SIGSTOP)
        elected = second.await_event("elected")
        second.await_event("generation", members=[1, 2])
        os.kill(first.pid, signal.SIGCONT)
        end = first.end()
        nodes.enough()
        assert second.end()["state"] == "done", second.output()
    assert elected["dead"] == []
    assert end["state"] == "stopped"
    assert "the job went on without members [0]" in end["reason"]
    assert [v["generation"] for v in first.journal(0, "view")] == [1]


def test_a_minority_does_not_elect(tmp_path: Path) -> None:
    """The coordinator's agent falls silent with two of three members: the other one waits."""
    rules = {"world": 3, "hang_s": 2.0, "recovery_s": 5.0}
    with Nodes(tmp_path) as nodes:
        first = nodes.start(2, rules=rules)
        second = nodes.start(1, rules=rules, join=first.address)
        first.await_first_step(2, 1)
        os.kill(first.pid, signal.SIGSTOP)
        end = second.end()
        os.kill(first.pid, signal.SIGCONT)
        first.await_event("generation", members=[0, 1])
        nodes.enough()
        assert first.end()["state"] == "done", first.output()
    assert "no quorum" in end["reason"]
    assert not second.events("elected")
    assert [v["generation"] for v in second.journal(2, "view")] == [1]


def test_three_agents_elect_one(tmp_path: Path) -> None:
    rules = {"world": 3, "minimum": 2, **SLOW}
    with Nodes(tmp_path) as nodes:
        first = nodes.start(1, rules=rules)
        second = nodes.start(1, rules=rules, join=first.address)
        first.await_event("asks", member=1)
        third = nodes.start(1, rules=rules, join=first.address)
        first.await_first_step(2, 1)
        os.kill(first.pid, signal.SIGKILL)
        second.await_event("generation", members=[1, 2])
        second.await_first_step(2, 2)
        nodes.enough()
        ends = [second.end(), third.end()]
    assert [end["state"] for end in ends] == ["done", "done"], second.output() + third.output()
    assert len(second.events("elected")) == 1
    assert not third.events("elected")


def test_the_coordinators_agent_leaves(tmp_path: Path) -> None:
    """A notice for its machine: its ranks hand over and go, and the others elect."""
    rules = {"world": 3, "policy": "shrink", **SLOW}
    with Nodes(tmp_path) as nodes:
        first = nodes.start(1, rules=rules)
        second = nodes.start(2, rules=rules, join=first.address)
        first.await_first_step(2, 1)
        os.kill(first.pid, signal.SIGUSR1)
        end = first.end()
        second.await_event("elected")
        second.await_first_step(2, 2)
        nodes.enough()
        assert second.end()["state"] == "done", second.output()
    assert end["state"] == "preempted"
    assert end["failures"] == []
    assert second.journal(2, "view")[-1]["members"] == [1, 2]


def test_the_coordinator_dies_as_it_decides(tmp_path: Path) -> None:
    """Nobody was told of the generation that it had in mind: the next coordinator decides anew."""
    faults = "kill@elastic.membership.proposed:hit=2"
    rules = {"world": 3, **SLOW}
    with Nodes(tmp_path) as nodes:
        first = nodes.start(1, rules=rules, faults=faults)
        second = nodes.start(2, rules=rules, join=first.address)
        first.await_first_step(2, 1)
        os.kill(second.pid_of(2), signal.SIGKILL)
        second.await_event("generation", members=[1])
        nodes.enough()
        assert second.end()["state"] == "done", second.output()
    assert first.process.exitcode == -signal.SIGKILL
    assert [v["generation"] for v in second.journal(1, "view")] == [1, 2]


def test_the_next_coordinator_dies_as_it_takes_over(tmp_path: Path) -> None:
    rules = {"world": 3, **SLOW}
    with Nodes(tmp_path) as nodes:
        first = nodes.start(1, rules=rules)
        second = nodes.start(
            1, rules=rules, join=first.address, faults="kill@elastic.membership.elected"
        )
        first.await_event("asks", member=1)
        third = nodes.start(1, rules=rules, join=first.address)
        first.await_first_step(2, 1)
        os.kill(first.pid, signal.SIGKILL)
        third.await_event("generation", members=[2])
        nodes.enough()
        assert third.end()["state"] == "done", third.output()
    assert second.process.exitcode == -signal.SIGKILL
    assert third.events("elected")[0]["dead"] == [0, 1]
