"""What ranks have of their own, and what happens when they do not agree."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from trainings import checkpointer

from planaria.checkpoint import Checkpointer, open_checkpoint
from planaria.checkpoint.storage.local import LocalStorage
from planaria.errors import PlanariaError, RootError


class Reader:
    """A data loader of which each rank has its own position."""

    def __init__(self, position: int) -> None:
        self.position, self.buffered = position, torch.full((3,), float(position))

    def state_dict(self) -> dict[str, Any]:
        """See `Stateful`."""
        return {"position": self.position, "buffered": self.buffered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Stateful`."""
        self.position, self.buffered = state["position"], state["buffered"]


def _said(call: Any, *args: Any) -> tuple[str, str]:
    """Class and message of the error that a call raises."""
    with pytest.raises(PlanariaError) as caught:
        call(*args)
    return type(caught.value).__name__, str(caught.value)


def _draw() -> list[float]:
    return [random.random(), float(np.random.rand()), torch.rand(()).item()]


# State of a rank's own


def save_own(rank: int, root: Path) -> list[float]:
    """Saves a reader and random numbers that differ between ranks; returns what is drawn next."""
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)
    state: dict[str, Any] = {"reader": Reader(10 + rank), "weights": {"w": torch.ones(4)}}
    if rank == 0:
        state["log"] = {"lines": 7}
    with checkpointer(root, state) as ckpt:
        ckpt.save(1)
        return _draw()


def restore_own(rank: int, root: Path) -> dict[str, Any]:
    """Restores it, strictly and then not."""
    reader, weights = Reader(0), {"w": torch.zeros(4)}
    state: dict[str, Any] = {"reader": reader, "weights": weights}
    log = {"lines": 0}
    if rank == 0:
        state["log"] = log
    found: dict[str, Any] = {}
    with checkpointer(root, state) as ckpt:
        if dist.get_world_size() == 2:
            found["strict"] = None
            report = ckpt.restore()
        else:
            found["strict"] = _said(ckpt.restore)
            assert (reader.position, weights["w"].sum().item(), log["lines"]) == (0, 0.0, 0)
            report = ckpt.restore(strict=False)
    assert report is not None
    found |= {"skipped": report.skipped, "missing": report.missing, "drawn": _draw()}
    found |= {"position": reader.position, "buffered": reader.buffered.tolist()}
    return found | {"weights": weights["w"].sum().item(), "log": log["lines"]}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[float]]]:
    """Two ranks' own state, and what each drew after the save."""
    root = tmp_path_factory.mktemp("own")
    return root, run_ranks(2, save_own, root)


Own = tuple[Path, list[list[float]]]


def test_each_rank_gets_its_own_back(own: Own) -> None:
    root, drawn = own
    restored = run_ranks(2, restore_own, root)
    for rank, found in enumerate(restored):
        assert found["position"] == 10 + rank
        assert found["buffered"] == [10.0 + rank] * 3
        assert found["drawn"] == drawn[rank]
        assert found["skipped"] == {}
        assert found["weights"] == 4
    assert restored[0]["log"] == 7


def test_on_other_ranks_it_is_refused_or_reported(own: Own) -> None:
    root, drawn = own
    restored = run_ranks(3, restore_own, root)
    for rank, found in enumerate(restored):
        kind, message = found["strict"]
        assert kind == "MismatchError"
        assert "reader: differs between the 2 ranks that saved it" in message
        assert "strict=False" in message
        assert found["position"] == 0
        assert found["weights"] == 4
        assert "differs between the 2 ranks" in found["skipped"]["reader"]
        assert ("rng" in found["skipped"]) == (rank == 2)
    assert restored[0]["log"] == 7
    assert [found["drawn"] for found in restored[:2]] == drawn
    assert restored[2]["drawn"] not in drawn
    # The new streams are a function of what was saved.
    assert run_ranks(3, restore_own, root)[2]["drawn"] == restored[2]["drawn"]


# Disagreement


def disagree(rank: int, root: Path) -> dict[str, Any]:
    """Goes through saves on which ranks do not agree, each followed by one on which they do."""
    said: dict[str, Any] = {}
    tree: dict[str, Any] = {"same": torch.ones(3), "odd": torch.full((2, 2), float(rank == 2))}
    model = nn.Linear(4, 3)
    with checkpointer(root, {"tree": tree, "model": model}) as ckpt:
        # A tensor of a plain tree is one tensor: it cannot be several things.
        handle = ckpt.save(1)
        said["unequal"] = _said(handle.wait_committed)
        said["unequal, next call"] = _said(ckpt.step, 2)
        tree["odd"].zero_()
        ckpt.save(3).wait_committed()

        # One rank has what cannot be saved.
        if rank == 1:
            tree["bad"] = object()
            said["bad"] = _said(ckpt.save, 4)
            del tree["bad"]
            assert ckpt.step(5) is None  # it has been told
        else:
            handle = ckpt.save(4)
            said["bad"] = _said(handle.wait_committed)
            said["bad, next call"] = _said(ckpt.step, 5)
        ckpt.save(6).wait_committed()

        # One rank's metrics cannot be saved.
        if rank == 1:
            said["metrics"] = _said(ckpt.save, 7, {"loss": object()})
            assert ckpt.step(8) is None
        else:
            handle = ckpt.save(7)
            said["metrics"] = _said(handle.wait_committed)
            said["metrics, next call"] = _said(ckpt.step, 8)
        ckpt.save(9).wait_committed()

        # One name, two shapes.
        model.bias = nn.Parameter(torch.zeros(3 + (rank == 0)))
        said["shape"] = _said(ckpt.save(10).wait_committed)
        said["shape, next call"] = _said(ckpt.step, 11)
        model.bias = nn.Parameter(torch.zeros(3))
        ckpt.save(12).wait_committed()

        # Two steps at once.
        handle = ckpt.save(13 + rank)
        said["steps"] = _said(handle.wait_committed)
        said["steps, next call"] = _said(ckpt.step, 20)
        ckpt.save(21).wait_committed()
        said["committed"] = ckpt.all_steps()
    return said


def test_a_save_on_which_ranks_disagree_fails_on_all_of_them(tmp_path: Path) -> None:
    said = run_ranks(3, disagree, tmp_path)
    for rank, of_rank in enumerate(said):
        assert of_rank["unequal"] == of_rank["unequal, next call"]
        kind, message = of_rank["unequal"]
        assert kind == "SaveFailedError"
        assert "rank 2: tensor 'tree.odd' differs from rank 0's" in message
        for what, name in (("bad", "tree.bad"), ("metrics", "metrics.loss")):
            kind, message = of_rank[what]
            assert name in message
            if rank == 1:
                assert kind == "StateError"
            else:
                assert kind == "SaveFailedError"
                assert "rank 1" in message
                assert of_rank[f"{what}, next call"] == of_rank[what]
        kind, message = of_rank["shape"]
        assert kind == "SaveFailedError"
        assert "'model.bias' is float32[4] on rank 0 and float32[3] on rank 1" in message
        kind, message = of_rank["steps"]
        assert kind == "SaveFailedError"
        assert "[13, 14, 15]" in message
        assert of_rank["steps"][1].replace(str(13 + rank), "") == message.replace(
            str(13 + rank), ""
        )
        assert of_rank["committed"] == [3, 6, 9, 12, 21]
    assert open_checkpoint(tmp_path).verify() == []


def large_state_of_its_own(rank: int, root: Path) -> tuple[str, str]:
    """Saves an object whose large tensor differs between ranks."""
    reader = Reader(rank)
    reader.buffered = torch.full((50_000,), float(rank))
    ckpt = checkpointer(root, {"reader": reader})
    handle = ckpt.save(1)
    said = _said(handle.wait_committed)
    assert _said(ckpt.close) == said
    return said


def test_large_tensors_of_a_ranks_own_are_refused_by_name(tmp_path: Path) -> None:
    for kind, message in run_ranks(2, large_state_of_its_own, tmp_path):
        assert kind == "SaveFailedError"
        assert "rank 1: tensor 'reader.buffered' differs from rank 0's" in message


def open_badly(rank: int, root: Path) -> list[tuple[str, str]]:
    """Makes checkpointers that one rank cannot make; then one that all can."""
    tree: dict[str, Any] = {"w": torch.zeros(2)}
    if rank == 1:
        tree["bad"] = object()
    said = [_said(checkpointer, root / "a", {"tree": tree})]
    tree.pop("bad", None)
    if rank == 0:
        (root / "foreign").mkdir()
        (root / "foreign" / "thesis.tex").write_text("")
    dist.barrier()
    said.append(_said(checkpointer, root / "foreign", {"tree": tree}))
    said.append(_said(checkpointer, root / f"of-node-{rank // 2}", {"tree": tree}))
    with checkpointer(root / "a", {"tree": tree}) as ckpt:
        ckpt.save(1)
    return said


def test_a_checkpointer_that_one_rank_cannot_make_is_made_by_none(tmp_path: Path) -> None:
    for rank, (bad, foreign, apart) in enumerate(run_ranks(3, open_badly, tmp_path)):
        assert bad[0] == "StateError"
        assert "'tree.bad' holds a builtins.object" in bad[1]
        assert bad[1].startswith("rank 1: ") == (rank != 1)
        assert foreign[0] == "RootError"
        assert "thesis.tex" in foreign[1]
        assert foreign[1].startswith("rank 0: ") == (rank != 0)
        assert apart[0] == "RootError"
        assert "of-node-1 is not the folder that rank 0 saves to" in apart[1]


def test_a_folder_that_another_rank_makes_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.path.isdir

    def isdir(path: str) -> bool:
        found = real(path)
        (tmp_path / "step").mkdir(exist_ok=True)
        return found

    monkeypatch.setattr(os.path, "isdir", isdir)
    LocalStorage(tmp_path).make_folder("step")
    (tmp_path / "file").touch()
    with pytest.raises(RootError, match="is a file"):
        LocalStorage(tmp_path).make_folder("file")


def restore_badly(rank: int, root: Path) -> tuple[str, str]:
    """Restores into a model that does not fit on one rank; nothing may change on any."""
    model = nn.Linear(4, 3 + (rank == 1))
    with torch.no_grad():
        model.weight.fill_(5)
    with checkpointer(root, {"model": model}) as ckpt:
        said = _said(ckpt.restore)
        assert (model.weight == 5).all()
    return said


def save_linear(rank: int, root: Path) -> None:
    """Saves a linear layer."""
    with checkpointer(root, {"model": nn.Linear(4, 3)}) as ckpt:
        ckpt.save(1)


def test_a_restore_that_one_rank_cannot_do_is_done_by_none(tmp_path: Path) -> None:
    run_ranks(1, save_linear, tmp_path)
    for kind, message in run_ranks(2, restore_badly, tmp_path):
        assert kind == "MismatchError"
        assert "model.weight: shape [3, 4] in the checkpoint, [4, 4] here" in message


# Groups


def in_groups(rank: int, root: Path) -> dict[str, Any]:
    """Two independent groups of ranks, each with a root of its own; then again, and as one."""
    groups = [dist.new_group(members, backend="gloo") for members in ([0, 2], [1, 3, 4])]
    mine = rank % 2 if rank < 4 else 1
    found: dict[str, Any] = {}
    for turn in range(2):
        value = {"w": torch.full((1000,), float(mine)), "turn": turn}
        with checkpointer(root / f"{mine}", {"v": value}, process_group=groups[mine]) as ckpt:
            found[f"restored {turn}"] = getattr(ckpt.restore(), "step", None)
            value["turn"] = turn
            # The groups go at their own pace.
            for step in range(1, 2 + 2 * mine):
                ckpt.save(10 * turn + step)
    if rank == 0:
        found["not a member"] = _said(_make_in, root / "other", groups[1])
    with checkpointer(root / "all", {"v": {"r": torch.zeros(3)}}) as ckpt:
        ckpt.save(1)
    found["steps"] = [Checkpointer.all_steps(ckpt)]
    return found


def _make_in(root: Path, group: Any) -> Checkpointer:
    return checkpointer(root, {"v": {"w": torch.zeros(2)}}, process_group=group)


def test_groups_save_for_themselves(tmp_path: Path) -> None:
    for rank, found in enumerate(run_ranks(5, in_groups, tmp_path)):
        assert found["restored 0"] is None
        assert found["restored 1"] == (1 if rank in (0, 2) else 3)
        if rank == 0:
            kind, message = found["not a member"]
            assert kind == "ConfigError"
            assert "process_group" in message
    for group, world in ((0, 2), (1, 3)):
        checkpoint = open_checkpoint(tmp_path / str(group))
        assert checkpoint.manifest.world_size == world
        assert checkpoint.step == 11 + 2 * group
        assert checkpoint.read("v.w").tolist() == [group] * 1000
        assert checkpoint.object("v")["turn"] == 1
        assert checkpoint.verify() == []
    assert open_checkpoint(tmp_path / "all").manifest.world_size == 5
