"""Layouts of any shape over any ranks, planned, written and read back in one process.

What the ranks of a job would do, one after the other: announce, plan, copy into files, read.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from planaria.checkpoint.capture.copying import ChunkCopier
from planaria.checkpoint.capture.cutting import cut
from planaria.checkpoint.capture.file_sources import FileSources
from planaria.checkpoint.capture.pool import BufferPool
from planaria.checkpoint.format.checksum import checksum
from planaria.checkpoint.format.dtypes import dtype_by_name
from planaria.checkpoint.format.manifest import FileInfo, Manifest
from planaria.checkpoint.format.safetensors import data_nbytes, header_bytes, parse_header
from planaria.checkpoint.layout import plan as plan_module
from planaria.checkpoint.layout.plan import SavePlan, announce, make_plan
from planaria.checkpoint.layout.reading import Reader
from planaria.checkpoint.layout.transforms import sources_of
from planaria.checkpoint.state.dtensors import placed_box
from planaria.checkpoint.state.entries import TensorEntry
from planaria.checkpoint.state.provider import Target
from planaria.checkpoint.storage.base import Storage
from planaria.core.box import Box
from planaria.errors import StateError

BUFFER_NBYTES = 4096
STEP = 3


@dataclass
class Tensor:
    """A logical tensor: its values and the box that each rank holds of it."""

    whole: np.ndarray
    boxes: list[Box]


class Files:
    """As much of a storage as reading needs."""

    url = "files"
    local = None

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def read_into(self, path: str, start: int, buffer: memoryview) -> int:
        """See `Storage.read_into`."""
        data = self.files[path][start : start + len(buffer)]
        buffer[: len(data)] = data
        return len(data)


@st.composite
def grids(draw: st.DrawFn, shape: tuple[int, ...], most: int) -> list[Box]:
    """Cuts an index space into at most `most` boxes along a grid."""
    cuts: list[list[tuple[int, int]]] = []
    for size in shape:
        inner = draw(st.lists(st.integers(1, max(1, size - 1)), max_size=2, unique=True))
        edges = sorted({0, size, *(c for c in inner if c < size)})
        cuts.append(list(itertools.pairwise(edges)) or [(0, 0)])
        if math.prod(map(len, cuts)) > most:
            cuts[-1] = [(0, size)]
    return [
        Box(tuple(a for a, _ in cell), tuple(b - a for a, b in cell))
        for cell in itertools.product(*cuts)
    ]


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    """Any box in an index space, empty ones too."""
    offset, extent = [], []
    for size in shape:
        start = draw(st.integers(0, size))
        offset.append(start)
        extent.append(draw(st.integers(0, size - start)))
    return Box(tuple(offset), tuple(extent))


shapes = st.lists(st.integers(0, 24), max_size=3).map(tuple)


@st.composite
def tensors(draw: st.DrawFn, world: int) -> Tensor:
    """A tensor whose parts lie on the ranks, each on one at least, and anything on the rest."""
    shape = draw(shapes)
    kind = draw(st.sampled_from(["float32", "float64", "int16", "uint8", "complex128", "bool"]))
    numbers = np.arange(math.prod(shape)) % 251
    whole = (numbers % 2 if kind == "bool" else numbers).astype(kind).reshape(shape)
    parts = draw(grids(shape, world))
    for _ in range(world - len(parts)):
        parts.append(draw(st.one_of(st.sampled_from(parts), boxes_in(shape))))
    return Tensor(whole, draw(st.permutations(parts)))


@st.composite
def jobs(draw: st.DrawFn) -> dict[str, Tensor]:
    """Some tensors over some ranks."""
    world = draw(st.integers(1, 6))
    return {f"t{i}": draw(tensors(world)) for i in range(draw(st.integers(1, 4)))}


def _entry(name: str, tensor: Tensor, rank: int, turned: bool) -> TensorEntry:
    box = tensor.boxes[rank]
    local = torch.from_numpy(tensor.whole.copy())[box.slices()]
    if turned:  # the same values in memory that is not row-major
        back = tuple(reversed(range(local.dim())))
        local = local.permute(back).contiguous().permute(back)
    dtype = dtype_by_name(str(tensor.whole.dtype))
    return TensorEntry(name, tensor.whole.shape, box, dtype, local)


def save(job: dict[str, Tensor], turned: bool) -> tuple[Files, Manifest, SavePlan]:
    """What all ranks together write, each from nothing but what it holds."""
    world = len(next(iter(job.values())).boxes)
    held = [{n: _entry(n, t, rank, turned) for n, t in job.items()} for rank in range(world)]
    plan = make_plan([announce(entries.values()) for entries in held])
    files, infos, file_of_rank = Files(), [], {}
    for rank, entries in plan.entries.items():
        pool = BufferPool(2 * BUFFER_NBYTES, BUFFER_NBYTES)
        header, data, sums = header_bytes(entries, STEP), bytearray(), []
        sources = FileSources(entries, held[rank])
        copier = ChunkCopier(sources, cut(entries, BUFFER_NBYTES), pool, {}, timeout_s=5)
        for chunk in copier.chunks(lambda: None):
            data += chunk.buffer.view(chunk.nbytes)
            sums.append(chunk.checksum)
            pool.release(chunk.buffer, chunk.generation)
        assert len(data) == data_nbytes(entries)
        assert len(parse_header(header)) == len(entries)
        name = f"rank-{rank:05d}.safetensors"
        files.files[f"step-{STEP:08d}/{name}"] = header + bytes(data)
        file_of_rank[rank] = len(infos)
        infos.append(FileInfo(name, len(header), len(data), BUFFER_NBYTES, checksum(header), sums))
    manifest = Manifest(STEP, "attempt", 0.0, world, infos, plan.tensors(file_of_rank, set()),
                        plan.aliases)  # fmt: skip
    return files, Manifest.from_bytes(manifest.to_bytes(), "here"), plan


@settings(max_examples=60)
@given(jobs(), st.booleans(), st.integers(16, 400), st.data())
def test_any_box_read_back_is_that_slice(
    job: dict[str, Tensor], turned: bool, slab_nbytes: int, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "MIN_SLAB_NBYTES", slab_nbytes)
        files, manifest, _ = save(job, turned)
    targets, expected = [], []
    for name, source in sources_of(manifest).items():
        whole = job[name].whole
        for box in [*data.draw(st.lists(boxes_in(whole.shape), max_size=3)), Box.full(whole.shape)]:
            local = torch.from_numpy(np.zeros(box.extent, whole.dtype, order="F"))
            targets.append(Target(name, box, local, source))
            expected.append(whole[box.slices()])
    pool = BufferPool(data.draw(st.integers(0, 3)) * BUFFER_NBYTES, BUFFER_NBYTES)
    reader = Reader(cast(Storage, files), manifest, targets, pool)
    reader.verify()
    reader.load()
    for target, values in zip(targets, expected, strict=True):
        np.testing.assert_array_equal(target.local.numpy(), values)


def test_several_targets_may_want_the_same_long_tensor() -> None:
    whole = np.arange(40 * BUFFER_NBYTES // 8).reshape(40, -1)
    files, manifest, _ = save({"t": Tensor(whole, [Box.full(whole.shape)])}, turned=False)
    boxes = [
        Box.full(whole.shape),
        Box((0, 3), (30, 1)),
        Box.full(whole.shape),
        Box((39, 0), (1, 9)),
    ]
    source = sources_of(manifest)["t"]
    targets = [
        Target("t", box, torch.zeros(box.extent, dtype=torch.int64), source) for box in boxes
    ]
    reader = Reader(cast(Storage, files), manifest, targets, BufferPool(0, BUFFER_NBYTES))
    reader.verify()
    reader.load()
    for target in targets:
        np.testing.assert_array_equal(target.local.numpy(), whole[target.box.slices()])


@given(jobs(), st.integers(16, 400))
def test_every_element_is_written_once_by_a_rank_that_holds_it(
    job: dict[str, Tensor], slab_nbytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "MIN_SLAB_NBYTES", slab_nbytes)
        _, _, plan = save(job, turned=False)
    written = {name: np.zeros(t.whole.shape, int) for name, t in job.items()}
    for rank, entries in plan.entries.items():
        for entry in entries:
            assert job[entry.name].boxes[rank].contains(entry.box)
            written[entry.name][entry.box.slices()] += 1
    for counts in written.values():
        assert (counts == 1).all()


def _announce_whole(shapes: list[tuple[int, ...]]) -> list[list[Any]]:
    return [
        [f"t{i}", "float32", shape, (0,) * len(shape), shape, None, False]
        for i, shape in enumerate(shapes)
    ]


def _loads(plan: SavePlan, world: int) -> list[int]:
    return [data_nbytes(plan.entries.get(rank, [])) for rank in range(world)]


@given(
    st.lists(
        st.lists(st.integers(1, 3000), min_size=1, max_size=3).map(tuple), min_size=1, max_size=30
    ),
    st.integers(1, 16),
)
def test_replicas_share_the_writing_fairly(shapes: list[tuple[int, ...]], world: int) -> None:
    plan = make_plan([_announce_whole(shapes)] * world)
    loads = _loads(plan, world)
    total = 4 * sum(map(math.prod, shapes))
    assert sum(loads) == total
    mean = total / world
    # A box is cut in as many parts as it has indices along its longest dimension, so that only
    # the last part can be too much; what is below a MiB is never cut.
    roundest = max(math.prod(s) * 4 / max(min(world, max(s)), 1) for s in shapes)
    assert max(loads) <= 1.5 * mean + max(plan_module.MIN_SLAB_NBYTES, 2 * roundest)
    for entries in plan.entries.values():
        assert len({e.name for e in entries}) == len(entries), "a tensor twice in one file"


@pytest.mark.parametrize("shape", [(4096, 1024), (1, 4_000_000), (3, 7, 200_000), (4_000_001,)])
@pytest.mark.parametrize("world", [2, 3, 8])
def test_a_large_replicated_tensor_is_cut_for_all_its_replicas(
    shape: tuple[int, ...], world: int
) -> None:
    loads = _loads(make_plan([_announce_whole([shape])] * world), world)
    assert max(loads) <= 1.01 * sum(loads) / world


def test_hybrid_shards_are_written_once_and_by_all() -> None:
    # Two replicas of two shards each, and one tensor that all four hold.
    shards = [Box((0, 0), (512, 4096)), Box((512, 0), (512, 4096))]
    announced = [
        [
            ["w", "float32", (1024, 4096), shard.offset, shard.extent, None, False],
            *_announce_whole([(1024, 1024)]),
        ]
        for shard in (*shards, *shards)
    ]
    plan = make_plan(announced)
    assert _loads(plan, 4) == [5 << 20] * 4


def test_what_no_rank_holds_is_refused_by_name() -> None:
    half = [["w", "float32", (4, 4), (0, 0), (2, 4), None, False]]
    with pytest.raises(StateError, match=r"no rank holds .* of tensor 'w'"):
        make_plan([half, half])
    other = [["w", "float32", (4, 5), (0, 0), (4, 5), None, False]]
    with pytest.raises(StateError, match=r"'w' is .*rank 0 and .*rank 1"):
        make_plan([half, other])


class Place:
    """As much of a device mesh as `placed_box` looks at, seen from one of its coordinates."""

    def __init__(self, shape: Sequence[int], coordinate: Sequence[int]) -> None:
        self.shape, self._coordinate = tuple(shape), list(coordinate)

    def get_coordinate(self) -> list[int]:
        """See `DeviceMesh.get_coordinate`."""
        return self._coordinate

    def size(self, mesh_dim: int) -> int:
        """See `DeviceMesh.size`."""
        return self.shape[mesh_dim]


def _boxes(
    shape: tuple[int, ...], mesh: Sequence[int], placements: Sequence[Placement]
) -> dict[tuple[int, ...], Box]:
    return {
        coordinate: placed_box("t", shape, cast(DeviceMesh, Place(mesh, coordinate)), placements)
        for coordinate in itertools.product(*map(range, mesh))
    }


meshes = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@given(shapes.filter(len), meshes, st.data())
def test_placements_cut_as_torch_chunk_does(
    shape: tuple[int, ...], mesh: list[int], data: st.DataObject
) -> None:
    dims = st.sampled_from([None, *range(len(shape))])
    cuts = data.draw(st.lists(dims, min_size=len(mesh), max_size=len(mesh)))
    placements = [Replicate() if d is None else Shard(d) for d in cuts]
    whole = torch.arange(math.prod(shape)).reshape(shape)
    for coordinate, box in _boxes(shape, mesh, placements).items():
        local = whole
        for i, dim in enumerate(cuts):
            if dim is not None:
                local = _chunk(local, mesh[i], dim, coordinate[i])
        assert torch.equal(whole[box.slices()].reshape(-1), local.reshape(-1))


@given(shapes.filter(len), st.integers(1, 4), st.integers(2, 4), st.data())
def test_fsdp_cuts_what_tensor_parallelism_has_left(
    shape: tuple[int, ...], dp: int, tp: int, data: st.DataObject
) -> None:
    tp_dim = data.draw(st.integers(0, len(shape) - 1))
    fsdp: Placement = _StridedShard(0, split_factor=tp) if tp_dim == 0 else Shard(0)
    whole = torch.arange(math.prod(shape)).reshape(shape)
    # Replicated outermost, as hybrid sharding is.
    boxes = _boxes(shape, (2, dp, tp), [Replicate(), fsdp, Shard(tp_dim)])
    for (_, i, j), box in boxes.items():
        local = _chunk(_chunk(whole, tp, tp_dim, j), dp, 0, i)
        assert torch.equal(whole[box.slices()].reshape(-1), local.reshape(-1))


def _chunk(tensor: torch.Tensor, parts: int, dim: int, index: int) -> torch.Tensor:
    chunks = tensor.chunk(parts, dim)
    return chunks[index] if index < len(chunks) else tensor.narrow(dim, 0, 0)
