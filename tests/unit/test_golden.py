"""Checkpoints that earlier versions wrote are read for ever, bit for bit."""

import shutil
from pathlib import Path

import pytest
import torch
from golden import FOLDER, make_state

from planaria.checkpoint import Checkpointer, open_checkpoint
from planaria.checkpoint.format.manifest import FORMAT

FORMATS = sorted(FOLDER.glob("format-*"))


def test_there_is_one_for_every_format() -> None:
    assert [f.name for f in FORMATS] == [f"format-{n}" for n in range(1, FORMAT + 1)]


@pytest.mark.parametrize("folder", FORMATS, ids=lambda f: f.name)
def test_it_is_restored(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "root")
    state, expected = make_state(filled=False), make_state(filled=True)
    with Checkpointer(tmp_path / "root", state) as ckpt:
        report = ckpt.restore()
    assert report is not None
    assert (report.step, report.world_size) == (120, 2)
    assert report.metrics == {"loss": 1.5}
    assert report.nan_names == ["extra.nan"]
    for name, tensor in expected["model"].state_dict().items():
        assert torch.equal(state["model"].state_dict()[name], tensor), name
    pairs = zip(state["model"].parameters(), expected["model"].parameters(), strict=True)
    for mine, golden in pairs:
        slots = expected["optim"].state[golden]
        assert state["optim"].state[mine].keys() == slots.keys()
        assert all(torch.equal(state["optim"].state[mine][k], v) for k, v in slots.items())
    for name, tensor in expected["zoo"].items():
        assert torch.equal(state["zoo"][name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert torch.equal(state["extra"]["nan"], expected["extra"]["nan"]) is False  # NaN != NaN
    assert torch.isnan(state["extra"]["nan"]).tolist() == [False, False, True, False]
    assert state["extra"]["scalar"].item() == 42
    assert state["note"] == expected["note"]
    assert state["optim"].param_groups[0]["lr"] == 0.125
    assert state["sched"].last_epoch == 3


@pytest.mark.parametrize("folder", FORMATS, ids=lambda f: f.name)
def test_it_is_read_without_a_job(folder: Path) -> None:
    stored = open_checkpoint(folder)
    assert stored.verify() == []
    expected = make_state(filled=True)["model"].state_dict()
    assert torch.equal(stored.read("model.head.weight"), expected["embed.weight"])
    assert torch.equal(stored.read("model.embed.weight"), expected["embed.weight"])
