"""DTensors placed by hand: every placement saved, and restored as every other."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.placement_types import _StridedShard
from trainings import checkpointer, digest

from planaria.checkpoint import open_checkpoint
from planaria.errors import StateError

R, S0, S1 = Replicate(), Shard(0), Shard(1)
#: Mesh -> placements over it.
LAYOUTS: dict[tuple[int, ...], list[tuple[Placement, ...]]] = {
    (4,): [(R,), (S0,), (S1,)],
    (2, 2): [
        (R, S0), (S0, R), (S0, S0), (S0, S1), (S1, S0), (S1, S1), (R, S1), (R, R),
        (_StridedShard(0, split_factor=2), S0),
    ],
    (1, 4): [(S0, S0), (S1, S0)],
    (4, 1): [(S0, S0), (S0, S1)],
}  # fmt: skip
#: The last one has a dimension smaller than any mesh, the one before no element at all.
SHAPES = [(7, 5), (8, 4), (5, 3, 2), (0, 4), (1, 9)]
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex128]


def whole_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Values by which every element can be told from its neighbours."""
    numbers = torch.arange(1, math.prod(shape) + 1).reshape(shape)
    return (numbers % 3 == 0) if dtype == torch.bool else numbers.to(dtype)


def _meshes() -> dict[tuple[int, ...], DeviceMesh]:
    return {shape: init_device_mesh("cpu", shape) for shape in LAYOUTS}


def _kinds() -> list[tuple[tuple[int, ...], tuple[Placement, ...]]]:
    return [(shape, p) for shape, placements in LAYOUTS.items() for p in placements]


def _wholes() -> list[torch.Tensor]:
    """One tensor for each layout and shape."""
    dtypes = itertools.cycle(DTYPES)
    return [whole_tensor(shape, next(dtypes)) for _ in _kinds() for shape in SHAPES]


def _placed(turns: int, value: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """The tensors in their layouts, each `turns` further on; torch itself cuts them."""
    kinds, meshes = _kinds(), _meshes()
    found = {}
    for i, whole in enumerate(_wholes()):
        mesh, placements = kinds[(i // len(SHAPES) + turns) % len(kinds)]
        found[str(i)] = distribute_tensor(
            value(whole), meshes[mesh], placements, src_data_rank=None
        )
    return found


def save_layouts(rank: int, root: Path) -> None:
    """Saves a tensor for each layout, shape and dtype."""
    with checkpointer(root, {"tensors": _placed(0, lambda whole: whole)}) as ckpt:
        ckpt.save(0)


def restore_layouts(rank: int, root: Path, turns: list[int]) -> list[tuple[int, str]]:
    """Restores each tensor into other layouts; returns what came back otherwise than saved."""
    wrong = []
    for turn in turns:
        found = _placed(turn, torch.zeros_like)
        expected = _placed(turn, lambda whole: whole)
        with checkpointer(root, {"tensors": found}) as ckpt:
            assert ckpt.restore() is not None
        wrong += [
            (turn, name)
            for name, tensor in found.items()
            if digest(tensor.to_local()) != digest(expected[name].to_local())
        ]
    return wrong


def test_every_placement_to_every_other(tmp_path: Path) -> None:
    run_ranks(4, save_layouts, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    for i, whole in enumerate(_wholes()):
        assert digest(checkpoint.read(f"tensors.{i}")) == digest(whole)
    # What is replicated is written once.
    stored = sum(f.data_nbytes for f in checkpoint.manifest.files)
    assert stored == sum(info.nbytes for info in checkpoint.manifest.tensors.values())
    turns = [0, 1, 2, 5, 9]
    assert run_ranks(4, restore_layouts, tmp_path, turns, timeout=120) == [[]] * 4


@pytest.mark.soak
def test_every_placement_to_all_others(tmp_path: Path) -> None:
    run_ranks(4, save_layouts, tmp_path)
    turns = list(range(len(_kinds())))
    assert run_ranks(4, restore_layouts, tmp_path, turns, timeout=600) == [[]] * 4


def _odd_tensors() -> dict[str, DTensor]:
    """DTensors of which a rank holds no block."""
    mesh, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    whole = torch.arange(64.0).reshape(8, 8)
    found = {
        "partial": DTensor.from_local(whole, mesh, [Partial()], run_check=False),
        "strips": distribute_tensor(
            whole, mesh, [_StridedShard(0, split_factor=2)], src_data_rank=None
        ),
    }
    other_order = distribute_tensor(whole, square, [S0, S0], src_data_rank=None)
    if hasattr(other_order._spec, "shard_order"):
        entry = type(other_order._spec.shard_order[0])
        other_order._spec.shard_order = (entry(tensor_dim=0, mesh_dims=(1, 0)),)
        found["order"] = other_order
    return found


def refuse(rank: int, root: Path) -> dict[str, list[str]]:
    """What is said of each odd tensor when a checkpointer is made, and when it is saved."""
    said: dict[str, list[str]] = {}
    for name, tensor in _odd_tensors().items():
        said[name] = []
        with pytest.raises(StateError) as caught:
            checkpointer(root / name, {"tensors": {"odd": tensor}})
        said[name].append(str(caught.value))
        state: dict[str, Any] = {"fine": torch.ones(2)}
        with checkpointer(root / name, {"tensors": state}) as ckpt:
            ckpt.save(1)
            state["odd"] = tensor
            with pytest.raises(StateError) as caught:
                ckpt.save(2)
            said[name].append(str(caught.value))
            del state["odd"]
            ckpt.save(3).wait_committed()
            assert ckpt.all_steps() == [1, 3]
    return said


def test_what_is_no_block_is_refused(tmp_path: Path) -> None:
    for said in run_ranks(4, refuse, tmp_path):
        assert {"partial", "strips"} <= said.keys()
        for messages in said.values():
            for message in messages:
                assert "'tensors.odd'" in message
                assert "redistribute it" in message
        assert "Partial(sum)" in said["partial"][0]
        assert "strips" in said["strips"][0]


def submesh(rank: int, root: Path, groups: list[list[int]], saves: bool) -> list[bool]:
    """Tensors over a mesh of some ranks only, a scalar among them."""
    wholes = {"matrix": torch.arange(15.0).reshape(5, 3), "scalar": torch.tensor(7.0)}
    meshes = [DeviceMesh("cpu", group) for group in groups]
    state, expected = {}, {}
    for i, mesh in enumerate(meshes):
        for name, whole in wholes.items():
            place = [S0] if whole.dim() else [R]
            expected[f"{name}{i}"] = distribute_tensor(whole + i, mesh, place, src_data_rank=None)
            value = whole + i if saves else torch.zeros_like(whole)
            state[f"{name}{i}"] = distribute_tensor(value, mesh, place, src_data_rank=None)
    with checkpointer(root, {"tensors": state}) as ckpt:
        if saves:
            ckpt.save(1)
        else:
            assert ckpt.restore() is not None
    return [digest(t.to_local()) == digest(expected[n].to_local()) for n, t in state.items()]


def test_a_mesh_of_some_of_the_ranks(tmp_path: Path) -> None:
    assert run_ranks(4, submesh, tmp_path, [[0, 1], [2, 3]], True) == [[True] * 4] * 4
    for i in (0, 1):
        matrix = open_checkpoint(tmp_path).read(f"tensors.matrix{i}")
        assert torch.equal(matrix, torch.arange(15.0).reshape(5, 3) + i)
        assert open_checkpoint(tmp_path).read(f"tensors.scalar{i}").item() == 7 + i
    assert run_ranks(3, submesh, tmp_path, [[1, 2], [0]], False) == [[True] * 4] * 3
