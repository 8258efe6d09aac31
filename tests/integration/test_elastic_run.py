"""`planaria run elastic=session`: ranks are lost and replaced, and the losses stay the same."""

from pathlib import Path

import pytest
from launches import TINY, loaded_planaria, planaria

from planaria.launch import elastic_events, metrics
from planaria.launch.run_folder import RunFolder

SESSION = ["elastic=session", "model.dropout=0.1", "elastic.hang_s=60", *TINY, "steps=16",
           "data.batch_size=8"]  # fmt: skip


def losses(folder: Path) -> dict[int, str]:
    records = metrics.kept(metrics.read(RunFolder(folder).metrics))
    return {step: record.loss_hex for step, record in records.items()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    ended = loaded_planaria(folder, "run", "--run", "reference", "-n", "1", *SESSION)
    assert ended.code == 0, ended.err + ended.out
    return folder / "reference"


def test_a_rank_is_killed_and_another_takes_its_place(tmp_path: Path, reference: Path):
    ended = loaded_planaria(
        tmp_path, "run", "--run", "run", "-n", "2", "--json", "--reference", str(reference),
        *SESSION, "elastic.policy=replace",
        PLANARIA_FAULTS="kill@demo.step:rank=1,step=5",
    )  # fmt: skip
    assert ended.code == 0, ended.err + ended.out
    summary = ended.json()
    assert (summary["compared"], summary["identical"]) == (16, 16)
    events = elastic_events.read(RunFolder(tmp_path / "run").elastic)
    lost = [e["member"] for e in events if e["kind"] == elastic_events.LOST]
    assert lost == [1]
    assert summary["transitions"][0]["lost"] == [1]
    assert summary["attempts"] == 1
    assert losses(tmp_path / "run") == losses(reference)


@pytest.mark.soak
def test_the_others_go_on_without_it(tmp_path: Path, reference: Path):
    ended = planaria(
        tmp_path, "run", "--run", "run", "-n", "4", "--json", "--reference", str(reference),
        *SESSION, "elastic.policy=shrink",
        PLANARIA_FAULTS="kill@elastic.session.committed:rank=0,step=7",
    )  # fmt: skip
    assert ended.code == 0, ended.err + ended.out
    summary = ended.json()
    assert (summary["compared"], summary["identical"]) == (16, 16)
    (change,) = summary["transitions"]
    assert (change["lost"], change["world_size"]) == ([0], 3)
