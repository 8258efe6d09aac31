"""Looking into checkpoints: opening, reading boxes, verifying."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import bits, data_files, flip, randomise, save_once
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from planaria.checkpoint import Checkpointer, mapping, open_checkpoint
from planaria.checkpoint.capture import kernels, loops
from planaria.checkpoint.capture.pool import BufferPool
from planaria.checkpoint.layout import plan as planning
from planaria.checkpoint.layout import reading
from planaria.checkpoint.layout.reading import Reader
from planaria.checkpoint.layout.transforms import sources_of
from planaria.checkpoint.state.provider import Target
from planaria.checkpoint.storage.local import LocalStorage
from planaria.core.box import Box
from planaria.errors import ConfigError, CorruptError, NotCommittedError, StateError

TENSORS = {
    "wide": torch.randn(3, 700_000),  # several chunks in a row
    "tall": torch.randn(600_000, 2),
    "cube": torch.randn(5, 6, 7),
    "bytes": torch.arange(10, dtype=torch.uint8),
    "complex": torch.randn(4, 4, dtype=torch.complex128),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("root")
    state = {"t": dict(TENSORS)}
    with Checkpointer(path, state, audit=True) as ckpt:
        ckpt.save(7).wait_committed()
        ckpt.save(12, {"loss": 0.5}).wait_committed()
    return path


def test_opening_by_root_step_and_step_folder(root):
    assert open_checkpoint(root).step == 12
    assert open_checkpoint(str(root), 7).step == 7
    assert open_checkpoint(root / "step-00000007").step == 7
    assert open_checkpoint(f"{root}/step-00000012/").step == 12
    assert open_checkpoint(f"file://{root}").step == 12
    assert open_checkpoint(LocalStorage(root), step=7).step == 7
    assert open_checkpoint(root).metrics == {"loss": 0.5}


def test_opening_a_step_folder_from_inside_the_root(root, monkeypatch):
    monkeypatch.chdir(root)
    assert open_checkpoint("step-00000007").step == 7
    assert open_checkpoint(".").step == 12


def test_what_cannot_be_opened_is_told(root, tmp_path):
    with pytest.raises(NotCommittedError, match="no checkpoint folder"):
        open_checkpoint(tmp_path)
    with pytest.raises(NotCommittedError, match="no checkpoint folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(NotCommittedError, match="no committed step 8; committed: 7, 12"):
        open_checkpoint(root, 8)
    with pytest.raises(NotCommittedError, match="no committed step 8"):
        open_checkpoint(root / "step-00000008")
    save_once(tmp_path / "one", {"t": {"x": 1}})
    os.unlink(tmp_path / "one" / "step-00000001" / "manifest.json")
    with pytest.raises(NotCommittedError, match="holds no committed step"):
        open_checkpoint(tmp_path / "one")
    with pytest.raises(ConfigError, match="Protocol"):
        open_checkpoint("nowhere://x")


def test_opening_takes_the_newest_whole_manifest(tmp_path):
    with Checkpointer(tmp_path, {"t": {"x": torch.ones(1)}}) as ckpt:
        for step in (1, 2):
            ckpt.save(step).wait_committed()
    flip(tmp_path / "step-00000002" / "manifest.json", 200)
    assert open_checkpoint(tmp_path).step == 1
    with pytest.raises(CorruptError):
        open_checkpoint(tmp_path, 2)
    flip(tmp_path / "step-00000001" / "manifest.json", 200)
    with pytest.raises(CorruptError, match="step-00000001"):
        open_checkpoint(tmp_path)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offset = tuple(draw(st.integers(0, n)) for n in shape)
    return Box(
        offset, tuple(draw(st.integers(0, n - o)) for o, n in zip(offset, shape, strict=True))
    )


@settings(
    max_examples=60,
    # The checkpoint is only read.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.sampled_from(sorted(TENSORS)), st.data())
def test_a_box_is_the_slice(root, name, data):
    tensor = TENSORS[name]
    box = data.draw(boxes(tuple(tensor.shape)))
    found = open_checkpoint(root).read(f"t.{name}", box)
    assert found.dtype == tensor.dtype
    assert bits(found) == bits(tensor[box.slices()])


def test_names_shapes_and_what_is_not_there(root):
    whole = open_checkpoint(root)
    assert whole.names() == sorted(f"t.{name}" for name in TENSORS)
    assert whole.shape("t.cube") == (5, 6, 7)
    with pytest.raises(ConfigError, match=r"no tensor 'x\.cube'; did you mean t\.cube"):
        whole.read("x.cube")
    with pytest.raises(ConfigError, match=r"is no part of 't\.cube'"):
        whole.read("t.cube", Box((0, 0, 0), (5, 6, 8)))
    with pytest.raises(ConfigError, match="is no part of"):
        whole.read("t.cube", Box((0,), (5,)))
    with pytest.raises(ConfigError, match="no object 'z' of rank 0; there are rng, t"):
        whole.object("z")
    assert set(whole.object("rng")) == {"python", "numpy", "torch"}


class CountingStorage(LocalStorage):
    """Remembers which ranges are read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.ranges: list[tuple[int, int]] = []

    def read_into(self, path: str, start: int, buffer: memoryview) -> int:
        self.ranges.append((start, len(buffer)))
        return super().read_into(path, start, buffer)


def test_only_the_chunks_that_hold_the_box_are_read(root):
    storage = CountingStorage(root)
    whole = open_checkpoint(storage)
    chunk = whole.manifest.files[0].chunk_nbytes
    whole.read("t.wide", Box((1, 5), (1, 10)))
    assert sum(n for _, n in storage.ranges) <= chunk
    storage.ranges.clear()
    whole.read("t.wide")
    assert sum(n for _, n in storage.ranges) <= TENSORS["wide"].numel() * 4 + 2 * chunk


def test_what_the_pool_has_no_room_for_is_read_into_memory_that_is_used_again(root, monkeypatch):
    made: list[torch.Tensor] = []
    monkeypatch.setattr(reading, "_THREADS", 2)
    fresh = reading.aligned_bytes
    monkeypatch.setattr(reading, "aligned_bytes", lambda n: made.append(fresh(n)) or made[-1])
    whole = open_checkpoint(root)
    source, filled = sources_of(whole.manifest)["t.wide"], torch.zeros_like(TENSORS["wide"])
    target = Target("t.wide", Box.full((3, 700_000)), filled, source)
    pool = BufferPool(0, 4096)
    reader = Reader(LocalStorage(root), whole.manifest, [target], pool)
    assert len(reader._spans) > 2
    reader.verify()
    reader.load()
    assert bits(filled) == bits(TENSORS["wide"])
    assert len(made) <= 2 * 2 * 2, "two passes, two threads, a last piece that is longer"


def test_a_mapped_tensor_is_the_file(root):
    whole = open_checkpoint(root)
    for name, tensor in TENSORS.items():
        assert bits(whole.read(f"t.{name}", mapped=True)) == bits(tensor)
    wide = whole.read("t.wide", mapped=True)
    assert wide.data_ptr() % 64 == 0 or whole.manifest.tensors["t.wide"].boxes[0].start % 64
    wide.zero_()  # stays here
    assert bits(whole.read("t.wide", mapped=True)) == bits(TENSORS["wide"])
    part = Box((1, 5), (1, 10))
    assert bits(whole.read("t.wide", part, mapped=True)) == bits(TENSORS["wide"][1:2, 5:15])
    assert whole.verify() == []


def check_mapped_damage(path: Path) -> None:
    save_once(path, {"model": randomise(nn.Linear(800, 2000), 1)})
    (file,) = data_files(path, 1)
    stored = open_checkpoint(path)
    kept = stored.read("model.weight", mapped=True)
    expected = bits(kept)
    begin = (
        stored.manifest.files[0].data_start + stored.manifest.tensors["model.weight"].boxes[0].start
    )
    for at in (begin, begin + 5_000_000, begin + kept.numel() * 4 - 1):
        flip(file, at)
        with pytest.raises(CorruptError, match=r"damaged.*model\.weight"):
            stored.read("model.weight", mapped=True)
        flip(file, at)
    file.rename(path / "away")
    with pytest.raises(CorruptError, match="is missing"):
        stored.read("model.weight", mapped=True)
    (path / "away").unlink()
    assert bits(kept) == expected, "what is mapped outlives its file"


def test_a_mapped_tensor_is_verified(tmp_path):
    check_mapped_damage(tmp_path)


def test_a_file_that_is_cut_off_is_not_mapped(tmp_path):
    save_once(tmp_path, {"model": randomise(nn.Linear(800, 2000), 1)})
    (file,) = data_files(tmp_path, 1)
    os.truncate(file, file.stat().st_size - 5000)
    with pytest.raises(CorruptError, match=r"cut off"):
        open_checkpoint(tmp_path).read("model.weight", mapped=True)


def test_sabotage_mapped_and_not_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(mapping, "checksum", lambda *_: AnyNumber())
    with pytest.raises(pytest.fail.Exception):
        check_mapped_damage(tmp_path)


class AnyNumber:
    def __ne__(self, other: object) -> bool:
        return False


def test_a_sound_step_has_no_problems(root):
    assert open_checkpoint(root).verify() == []


@pytest.fixture
def small(tmp_path) -> Path:
    model = randomise(nn.Sequential(nn.Linear(800, 900), nn.Linear(900, 800)), 1)
    save_once(tmp_path, {"model": model})
    return tmp_path


def test_verify_names_file_chunk_and_tensors(small):
    (file,) = data_files(small, 1)
    info = open_checkpoint(small).manifest.files[0]
    assert len(info.chunk_checksums) == 2
    flip(file, info.data_start + info.chunk_nbytes + 5)
    (problem,) = open_checkpoint(small).verify()
    assert (problem.file, problem.chunk) == (file.name, 1)
    assert problem.tensors == ["model.1.weight"]
    assert str(problem).startswith(f"{file.name}, chunk 1: does not match its checksum")
    flip(file, info.data_start + 5)
    assert [p.chunk for p in open_checkpoint(small).verify()] == [0, 1]
    assert "model.0.bias" in open_checkpoint(small).verify()[0].tensors


def test_verify_finds_damage_in_the_header_a_cut_and_an_addition(small):
    (file,) = data_files(small, 1)
    whole = file.read_bytes()
    for at in (0, 9, 300, 4095):
        flip(file, at)
        assert [p.what for p in open_checkpoint(small).verify()] == ["header is damaged"]
        flip(file, at)
    file.write_bytes(whole[:-1])
    problems = open_checkpoint(small).verify()
    assert {p.chunk for p in problems} == {None, 1}
    assert f"has {len(whole) - 1} bytes instead of {len(whole)}" in str(problems[0])
    file.write_bytes(whole + b"x")
    (problem,) = open_checkpoint(small).verify()
    assert "bytes instead of" in problem.what
    file.unlink()
    (problem,) = open_checkpoint(small).verify()
    assert (problem.what, len(problem.tensors)) == ("is missing", 4)


def test_verify_sees_every_byte(tmp_path):
    save_once(tmp_path, {"t": {"x": torch.arange(40), "y": torch.ones(3, dtype=torch.uint8)}})
    (file,) = data_files(tmp_path, 1)
    whole = open_checkpoint(tmp_path)
    for at in (*range(0, 4096, 29), *range(4096, file.stat().st_size)):
        flip(file, at, 0x01)
        assert len(whole.verify()) == 1, at
        flip(file, at, 0x01)
    assert whole.verify() == []


# Who writes what: a pure function of what the ranks announce.


@st.composite
def announcements(draw: st.DrawFn):
    """Up to four ranks that hold random boxes of some tensors; the whole of each is held."""
    ranks = draw(st.integers(1, 4))
    told: list[list] = [[] for _ in range(ranks)]
    for i in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 6), max_size=2)))
        slabs = Box.full(shape).split_rows(draw(st.integers(1, 4)))
        pinned = draw(st.booleans())
        holders: list[list[Box]] = [[] for _ in range(ranks)]
        for slab in slabs:
            for rank in draw(st.sets(st.integers(0, ranks - 1), min_size=1)):
                holders[rank].append(slab)
        for rank, held in enumerate(holders):
            for box in held[:1]:  # one box a rank, as state has it
                told[rank].append([f"t{i}", "float32", shape, box.offset, box.extent, None, pinned])
    return told


@settings(max_examples=150)
@given(announcements())
def test_a_plan_stores_each_element_once_by_a_holder(told):
    held = {name: torch.zeros(shape) for rank in told for name, _, shape, *_ in rank}
    for rank in told:
        for name, _, _, offset, extent, *_ in rank:
            held[name][Box(offset, extent).slices()] = 1
    if not all(bool(grid.all()) for grid in held.values()):
        with pytest.raises(StateError, match="no rank holds"):
            planning.make_plan(told)
        return
    plan = planning.make_plan(json.loads(json.dumps(told)))
    stored = {name: torch.zeros_like(grid) for name, grid in held.items()}
    for rank, entries in plan.entries.items():
        for entry in entries:
            stored[entry.name][entry.box.slices()] += 1
            assert any(
                name == entry.name and Box(offset, extent).contains(entry.box)
                for name, _, _, offset, extent, *_ in told[rank]
            )
    assert all(bool((grid == 1).all()) for grid in stored.values())


def test_writing_is_balanced_over_replicas():
    shape = (1024, 4096)  # 16 MiB, worth cutting
    told = [
        [["big", "float32", shape, (0, 0), shape, None, False]]
        + [[f"t{i}", "float32", (64, 64), (0, 0), (64, 64), None, False] for i in range(40)]
        for _ in range(4)
    ]
    plan = planning.make_plan(told)
    load = [sum(e.nbytes for e in entries) for entries in plan.entries.values()]
    assert len(load) == 4
    assert max(load) <= 1.05 * min(load)


@pytest.mark.parametrize(
    "nbytes", [0, 1, 63, 64, *(loops.STREAMED_NBYTES + i for i in (-1, 0, 1, 65, 127))]
)
def test_what_is_placed_past_the_caches_is_all_there_and_nothing_else(nbytes: int) -> None:
    rng = np.random.default_rng(nbytes)
    source = rng.integers(1, 256, nbytes + 256, np.uint8)
    for skipped, into in ((0, 0), (1, 0), (0, 1), (7, 33), (64, 63)):
        target = np.zeros(nbytes + 256, np.uint8)
        kernels.place_pieces(
            np.array([target.ctypes.data + into, target.ctypes.data + into + nbytes + 9]),
            np.array([source.ctypes.data + skipped, source.ctypes.data]),
            np.array([nbytes, 5]),
        )
        expected = np.zeros_like(target)
        expected[into : into + nbytes] = source[skipped : skipped + nbytes]
        expected[into + nbytes + 9 :][:5] = source[:5]
        assert np.array_equal(target, expected)
