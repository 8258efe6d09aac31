"""A step's folder as others read it: safetensors, and torch's Hugging Face reader."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from trainings import checkpointer, digest, whole

from planaria.checkpoint import open_checkpoint

STEP = 5
FOLDER = f"step-{STEP:08d}"
#: The dtypes that torch's reader knows.
DTYPES = ["float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"]


def _numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).mul(9).to(dtype)


def _wholes() -> dict[str, tuple[torch.Tensor, str, list[Placement]]]:
    """Values, and over which mesh they are placed how: "" where every rank has them whole.

    Two are so large that their replicas share the writing.
    """
    found: dict[str, tuple[torch.Tensor, str, list[Placement]]] = {
        "large": (_numbers((1500, 1100), torch.float32), "", []),
        "wide": (_numbers((1, 1_500_000), torch.bfloat16), "", []),
        "scalar": (torch.tensor(3.5), "", []),
        "complex": (torch.complex(*2 * [_numbers((3, 5), torch.float64)]), "", []),
    }
    for i, name in enumerate(DTYPES):
        value = _numbers((9 + i, 7), getattr(torch, name))
        found[f"rows-{name}"] = value, "4", [Shard(0)]
        found[f"columns-{name}"] = value, "4", [Shard(1)]
    value = _numbers((11, 6), torch.float32)
    found["grid"] = value, "2x2", [Shard(0), Shard(1)]
    found["hybrid"] = value, "2x2", [Replicate(), Shard(0)]
    found["both"] = value, "2x2", [_StridedShard(0, split_factor=2), Shard(0)]
    return found


def _tensors() -> dict[str, Any]:
    """What a rank holds of them."""
    meshes = {"4": init_device_mesh("cpu", (4,)), "2x2": init_device_mesh("cpu", (2, 2))}
    return {
        name: distribute_tensor(value, meshes[mesh], places, src_data_rank=None) if mesh else value
        for name, (value, mesh, places) in _wholes().items()
    }


def _model(mesh_shape: int) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(13, 11), nn.ReLU(), nn.Linear(11, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (mesh_shape,)))
    return model


def save(rank: int, root: Path) -> dict[str, str]:
    """Saves all of it; returns the digests of the whole tensors."""
    tensors, model = _tensors(), _model(4)
    with checkpointer(root, {"t": tensors, "model": model}) as ckpt:
        ckpt.save(STEP)
    wholes = {f"t.{name}": digest(value) for name, (value, _, _) in _wholes().items()}
    return wholes | {f"model.{n}": digest(whole(p)) for n, p in model.named_parameters()}


def load_with_torch(rank: int, folder: Path) -> dict[str, str]:
    """Loads the model's part through torch alone, on other ranks than saved it."""
    model = _model(dist.get_world_size())
    target = {f"model.{n}": torch.zeros_like(p) for n, p in model.named_parameters()}
    dcp.load(target, storage_reader=HuggingFaceStorageReader(str(folder)))
    return {name: digest(whole(t)) for name, t in target.items()}


Saved = tuple[Path, dict[str, str]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A step that 4 ranks saved."""
    root = tmp_path_factory.mktemp("interop")
    digests = run_ranks(4, save, root)
    assert all(d == digests[0] for d in digests)
    return root, digests[0]


def test_every_file_is_plain_safetensors(saved: Saved) -> None:
    root, digests = saved
    files = sorted((root / FOLDER).glob("*.safetensors"))
    assert len(files) == 4
    found: dict[str, int] = dict.fromkeys(digests, 0)
    for path in files:
        with safe_open(path, "pt") as file:
            boxes = json.loads(file.metadata()["planaria"])["boxes"]
            assert sorted(boxes) == sorted(file.keys())
            for name in file.keys():  # noqa: SIM118 - not a dict
                dtype, shape, offset, extent = boxes[name]
                part = open_checkpoint(root).read(name)
                assert list(part.shape) == shape
                for dim, (start, size) in enumerate(zip(offset, extent, strict=True)):
                    part = part.narrow(dim, start, size)
                stored = file.get_tensor(name)
                if dtype == "complex128":  # kept as pairs
                    stored = torch.view_as_complex(stored)
                assert torch.equal(stored, part)
                found[name] += part.numel()
    for name, count in found.items():
        assert count == open_checkpoint(root).read(name).numel()


def test_large_replicas_are_shared_out(saved: Saved) -> None:
    root, digests = saved
    checkpoint = open_checkpoint(root)
    for name in ("t.large", "t.wide"):
        boxes = checkpoint.manifest.tensors[name].boxes
        assert sorted(b.file for b in boxes) == [0, 1, 2, 3]
        assert max(b.box.volume for b in boxes) <= 1.01 * checkpoint.read(name).numel() / 4
    assert {name: digest(checkpoint.read(name)) for name in checkpoint.names()} == digests


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_the_folder_whole(saved: Saved) -> None:
    root, digests = saved
    checkpoint = open_checkpoint(root)
    # A complex128 tensor lies there as pairs of float64.
    names = [name for name in digests if name != "t.complex"]
    target: dict[str, Any] = {name: torch.zeros_like(checkpoint.read(name)) for name in names}
    reader = HuggingFaceStorageReader(str(root / FOLDER))
    dcp.load(target, storage_reader=reader, no_dist=True)
    assert {name: digest(t) for name, t in target.items()} == {n: digests[n] for n in names}


def test_torch_reads_the_folder_sharded_otherwise(saved: Saved) -> None:
    root, digests = saved
    for loaded in run_ranks(3, load_with_torch, root / FOLDER):
        assert loaded == {n: d for n, d in digests.items() if n.startswith("model.")}
