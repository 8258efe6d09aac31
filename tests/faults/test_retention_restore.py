"""A restore while old steps are removed: it takes a whole step or none, and says which."""

from pathlib import Path

import pytest
import torch
from checkpoints import data_files, flip, held

from planaria.checkpoint import Checkpointer, KeepLast, open_checkpoint, points
from planaria.checkpoint.prune import prune
from planaria.checkpoint.storage.local import LocalStorage
from planaria.checkpoint.storage.root import Root
from planaria.errors import NotCommittedError


def test_a_restore_in_the_midst_of_retention(tmp_path: Path) -> None:
    state = {"v": {"w": torch.zeros(500)}}
    with Checkpointer(tmp_path, state, keep=1, audit=True) as ckpt:
        for step in (1, 2):
            state["v"]["w"].fill_(step)
            with held(points.RETENTION_UNLISTED) as hold:
                ckpt.save(step).wait_committed()
                if step == 1:
                    continue
                hold.wait_reached()  # step 1 has lost its manifest, its data is there yet
                with pytest.raises(NotCommittedError, match="no committed step 1"):
                    ckpt.restore(step=1)
                state["v"]["w"].fill_(9)
                report = ckpt.restore()
                assert report is not None
                assert (report.step, float(state["v"]["w"].mean())) == (2, 2.0)
    assert ckpt.all_steps() == [2]


def test_a_step_that_goes_while_it_is_read_is_not_half_loaded(tmp_path: Path) -> None:
    """Another process prunes, as soon as a lock of the root lets it, what a reader has opened."""
    state = {"v": {"w": torch.zeros(500)}}
    with Checkpointer(tmp_path, state, audit=True) as ckpt:
        for step in (1, 2):
            state["v"]["w"].fill_(step)
            ckpt.save(step).wait_committed()
    reader = open_checkpoint(tmp_path, 1)
    prune(Root(LocalStorage(tmp_path)), KeepLast(1))
    with pytest.raises(NotCommittedError, match="was removed, or saved anew"):
        reader.read("v.w")


def test_what_is_restored_in_place_of_a_damaged_one_is_never_pruned(tmp_path: Path) -> None:
    state = {"v": {"w": torch.zeros(500)}}
    with Checkpointer(tmp_path, state, audit=True) as ckpt:
        for step in (1, 2, 3):
            state["v"]["w"].fill_(step)
            ckpt.save(step).wait_committed()
    flip(data_files(tmp_path, 3)[0], -1)
    with Checkpointer(tmp_path, state, keep=1, audit=True) as ckpt:
        with pytest.warns(UserWarning, match="step 3 cannot be restored"):
            report = ckpt.restore()
        assert report is not None
        assert (report.step, float(state["v"]["w"].mean())) == (2, 2.0)
        # Saving goes on from there; what stood in for the damaged one goes only for a newer.
        ckpt.save(3).wait_committed()
    assert ckpt.all_steps() == [3]
    assert open_steps(tmp_path) == {3: []}


def open_steps(path: Path) -> dict[int, list[str]]:
    """What is wrong with each committed step."""
    root = Root(LocalStorage(path))
    return {s: [str(p) for p in open_checkpoint(path, s).verify()] for s in root.steps()}
