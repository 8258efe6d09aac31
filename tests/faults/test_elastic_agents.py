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
