"""A second node joins a session, and a session that is told to stop goes on later."""

import signal
from pathlib import Path

import pytest
from launches import LOADED, PLANARIA, TINY, finish, planaria, started, wait_until

from planaria.launch import elastic_events, metrics
from planaria.launch.run_folder import RunFolder

SESSION = ["elastic=session", "elastic.hang_s=60", *TINY, "data.batch_size=8"]
TOKEN = "0123456789abcdef0123"


def steps_of(folder: Path) -> int:
    return max((r.step for r in metrics.read(RunFolder(folder).metrics)), default=0)


def test_a_node_joins_while_the_others_train(tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    slow = {"PLANARIA_FAULTS": "sleep=0.2@demo.step:times=inf", "PLANARIA_TOKEN": TOKEN}
    first = [*LOADED, "run", "--run", str(one), "-n", "1", "--json", *SESSION,
             "steps=100000"]  # fmt: skip
    with started(first, tmp_path, **slow) as process:
        wait_until(lambda: steps_of(one) >= 2, "the first steps")
        address = RunFolder(one).address.read_text().strip()
        second = [*LOADED, "run", "--run", str(two), "--join", address, "-n", "1"]
        with started(second, tmp_path, **slow) as other:
            wait_until(lambda: grown(one) == 2, "the rank of the second node")
            at = steps_of(one)
            wait_until(lambda: steps_of(one) > at + 2, "steps on two ranks")
            process.send_signal(signal.SIGTERM)
            ended, joined = finish(process), finish(other)
    assert ended.code == 75, ended.err + ended.out
    assert joined.code == 75, joined.err + joined.out
    # The second one took over the configuration.
    assert RunFolder(two).config.read_text() == RunFolder(one).config.read_text()


@pytest.mark.soak
def test_a_session_that_was_stopped_goes_on_with_the_same_numbers(tmp_path: Path):
    planaria(tmp_path, "run", "--run", "reference", "-n", "2", *SESSION, "steps=60")
    command = [*PLANARIA, "run", "--run", str(tmp_path / "run"), *SESSION, "steps=60", "--json",
               "--reference", "reference"]  # fmt: skip
    slow = {"PLANARIA_FAULTS": "sleep=0.2@demo.step:times=inf"}
    with started([*command, "-n", "2"], tmp_path, **slow) as process:
        wait_until(lambda: steps_of(tmp_path / "run") >= 3, "the first steps")
        process.send_signal(signal.SIGTERM)
        stopped = finish(process)
    assert stopped.code == 75, stopped.err + stopped.out
    with started([*command, "-n", "3"], tmp_path) as process:
        ended = finish(process)
    assert ended.code == 0, ended.err + ended.out
    summary = ended.json()
    assert (summary["compared"], summary["identical"]) == (60, 60)
    assert summary["attempts"] == 2
    assert summary["repeated_steps"] == 0


def grown(folder: Path) -> int:
    events = elastic_events.read(RunFolder(folder).elastic)
    sizes = [len(e["members"]) for e in events if e["kind"] == elastic_events.GENERATION]
    return max(sizes, default=0)
