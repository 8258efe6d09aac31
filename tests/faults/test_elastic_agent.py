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
        first = nodes.start(3, steps=150, trainer={"group": True})
        first.await_first_step(0, 1)
        os.kill(first.pid_of(1), signal.SIGKILL)
        end = first.end()
    assert end["state"] == "done", first.output()
    assert end["failures"] == [1]
    assert [e["members"] for e in first.events("generation")] == [[0, 1, 2], [0, 2]]
    assert len(first.events("started")) == 3
    assert {e["member"]: e["exit_code"] for e in first.events("ended")} == {0: 0, 1: -9, 2: 0}
    for member in (0, 2):
        assert first.journal(member, "finished")[0]["step"] == 150
