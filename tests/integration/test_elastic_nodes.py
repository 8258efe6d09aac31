"""Two nodes train a session; the one that hosts the store and the coordinator is lost.

Copies of what its ranks held are on the other node, so the others go on in place. Where it is not
known what is on which node they go back to what was saved, in a folder that both share.
"""

import os
import signal
from pathlib import Path

import psutil
import pytest
from launches import PLANARIA, TINY, finish, planaria, ranks_of, started, wait_until

from planaria.launch import elastic_events, metrics
from planaria.launch.run_folder import RunFolder

SESSION = ["elastic=session", "elastic.hang_s=600", *TINY, "data.batch_size=8", "steps=60",
           "model.dropout=0.1"]  # fmt: skip
TOKEN = "0123456789abcdef0123"


def losses(folder: Path) -> dict[int, str]:
    records = metrics.kept(metrics.read(RunFolder(folder).metrics))
    return {step: record.loss_hex for step, record in records.items()}


def sizes(folder: Path) -> list[int]:
    events = elastic_events.read(RunFolder(folder).elastic)
    return [len(e["members"]) for e in events if e["kind"] == elastic_events.GENERATION]


def asking(folder: Path) -> int:
    events = elastic_events.read(RunFolder(folder).elastic)
    return sum(e["kind"] == "asks" and e["generation"] > 0 for e in events)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("names", "goes_back"), [(("one", "two"), False), (("same", "same"), True)]
)
def test_the_first_node_is_lost(tmp_path: Path, names: tuple[str, str], goes_back: bool) -> None:
    ended = planaria(tmp_path, "run", "--run", "reference", "-n", "1", *SESSION)
    assert ended.code == 0, ended.err + ended.out
    reference = losses(tmp_path / "reference")
    one, two = tmp_path / "one", tmp_path / "two"
    token = {"PLANARIA_TOKEN": TOKEN}
    slow = {**token, "PLANARIA_NODE": names[0], "PLANARIA_FAULTS": "sleep=0.3@demo.step:times=inf"}
    first = [*PLANARIA, "run", "--run", str(one), "-n", "2", *SESSION, "elastic.policy=shrink",
             "elastic.max_world=4"]  # fmt: skip
    with started(first, tmp_path, **slow) as process:
        wait_until(lambda: len(losses(one)) >= 2, "the first steps")
        # They stand still meanwhile: however long the second one takes, they are not done before.
        for rank in ranks_of(process):
            rank.suspend()
        address = RunFolder(one).address.read_text().strip()
        second = [*PLANARIA, "run", "--run", str(two), "--join", address, "-n", "2"]
        with started(second, tmp_path, **token, PLANARIA_NODE=names[1]) as other:
            wait_until(lambda: asking(one) == 2 or other.poll() is not None, "the second node")
            assert other.poll() is None, finish(other)
            for rank in ranks_of(process):
                rank.resume()
            wait_until(lambda: 4 in sizes(one) or process.poll() is not None, "all four ranks")
            assert process.poll() is None, finish(process)
            at = max(losses(one))
            wait_until(lambda: max(losses(one)) > at + 3, "steps on four ranks")
            there = psutil.Process(process.pid)
            for each in [there, *there.children(recursive=True)]:
                os.kill(each.pid, signal.SIGKILL)
            joined = finish(other)
    assert joined.code == 0, joined.err + joined.out
    assert "step 60/60 " in joined.out, "told of the run as it is, not as this node was started"
    assert ("restored step" in joined.out) == goes_back, joined.out
    found = losses(one) | losses(two)
    assert found == reference
    assert set(losses(two)), "the second node wrote nothing down"
