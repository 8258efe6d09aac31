"""Copies that are checksummed and looked at on the way: the same bytes, checksums and NaNs."""

import ctypes
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import crc32c
import llvmlite.binding
import numba
import numpy as np
import pytest
import torch
from checkpoints import bits, data_files, must_notice, save_once
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from planaria.checkpoint import Checkpointer, checkpointer, open_checkpoint
from planaria.checkpoint.capture import checked_loops, loops
from planaria.checkpoint.capture.aligned import aligned_bytes
from planaria.checkpoint.capture.checked import CheckedCopy
from planaria.checkpoint.capture.cutting import ChunkLayout, cut
from planaria.checkpoint.capture.kernels import has_nan
from planaria.checkpoint.format import checksum as checksums
from planaria.checkpoint.format.dtypes import _BY_NAME, StoredDtype
from planaria.checkpoint.format.safetensors import FileEntry, place
from planaria.core.box import Box

BLOCK = checked_loops.BLOCK
DTYPES = sorted(_BY_NAME)
needs_processor = pytest.mark.skipif(
    not CheckedCopy.available(), reason="the processor has no instructions for it"
)


def entries_of(sizes: list[tuple[str, int]]) -> list[FileEntry]:
    """Tensors of these dtypes and numbers of elements, as they lie in a file."""
    parts = [
        (f"t{i}", (count,), Box.full((count,)), _BY_NAME[name])
        for i, (name, count) in enumerate(sizes)
    ]
    return place(parts)


def put_nan(data: np.ndarray, dtype: StoredDtype, rng: np.random.Generator) -> None:
    """Puts the largest that is none into some element, the smallest NaN into some; uint8[n]."""
    if dtype.nan_above is None or not data.size:
        return
    flip, _, limit = dtype.nan_above
    width, last = dtype.nan_width, data.size // dtype.nan_width - 1
    for value in (limit, limit + 1)[: rng.integers(1, 3)]:
        i = int(rng.choice(np.array([0, last, rng.integers(0, last + 1)]))) * width
        data[i : i + width] = list((value ^ flip).to_bytes(width, "little"))


def check_copy(
    sizes: list[tuple[str, int]], seed: int, skipped: int, chunk_nbytes: int = 1 << 24
) -> None:
    """All chunks of a file, from sources that begin anywhere; nothing else is written."""
    entries, rng = entries_of(sizes), np.random.default_rng(seed)
    starts = np.array([e.start + 16 * i + skipped for i, e in enumerate(entries)], np.int64)
    ends = [start + e.nbytes for start, e in zip(starts, entries, strict=True)]
    memory = rng.integers(0, 120, max(ends, default=0), np.uint8)  # of such bytes none is a NaN
    parts = [memory[start:end] for start, end in zip(starts, ends, strict=True)]
    for part, entry in zip(parts, entries, strict=True):
        put_nan(part, entry.dtype, rng)
    data = np.concatenate([*parts, memory[:0]])
    copy, chunks = CheckedCopy(), cut(entries, chunk_nbytes)
    assert sum(chunk.nbytes for chunk in chunks) == data.size
    for chunk in chunks:
        expected, data = data[: chunk.nbytes], data[chunk.nbytes :]
        target = aligned_bytes(64 + chunk.nbytes + 64).numpy()
        sources = memory.ctypes.data + starts[chunk.numbers] + chunk.starts
        found, checksum = copy.copy(target.ctypes.data + 64, sources, chunk)
        assert np.array_equal(target[64:-64], expected)
        assert not target[:64].any()
        assert not target[-64:].any()
        assert checksum == crc32c.crc32c(expected.data)
        held = [has_nan(expected[chunk.span(*run[1:])].data, run[0]) for run in chunk.runs]
        assert found == [run for run, nan in zip(chunk.runs, held, strict=True) if nan]


@needs_processor
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(DTYPES),
            st.integers(0, 40) | st.sampled_from([BLOCK // 8, BLOCK]) | st.integers(0, 3000),
        ),
        max_size=8,
    ),
    st.integers(0, 1 << 30),
    st.integers(0, 9),
    st.sampled_from([4096, 3 * 4096, 1 << 24]),
)
def test_a_checked_copy_is_a_plain_one(sizes, seed, skipped, chunk_nbytes):
    check_copy(sizes, seed, skipped, chunk_nbytes)


@needs_processor
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("nbytes", [0, 16, BLOCK - 16, BLOCK, BLOCK + 16, 5 * BLOCK, 100_000])
def test_at_the_ends_of_blocks(name, nbytes):
    for seed in range(4):
        check_copy([(name, nbytes // _BY_NAME[name].itemsize)], seed, 0)
        check_copy([("float64", 3), (name, nbytes // _BY_NAME[name].itemsize)], seed, 0)


@needs_processor
def test_an_empty_chunk():
    empty = np.zeros(0, np.int64)
    chunk = ChunkLayout([], empty, empty, empty, empty, [], 0)
    assert CheckedCopy().copy(aligned_bytes(64).data_ptr(), empty, chunk) == ([], 0)


def check_nans_are_seen() -> None:
    for seed in range(8):
        check_copy([("float32", 50), ("bfloat16", 9000)], seed, 0)


@needs_processor
def test_sabotage_nans_are_looked_for_in_whole_blocks_only(monkeypatch):
    copy_looking = checked_loops.copy_looking

    def look(target: int, places: Any, sources: Any, sizes: Any, *rest: Any) -> bool:
        found = copy_looking(target, places, sources, sizes, *rest)
        return found and places[0] // BLOCK < (places[-1] + sizes[-1]) // BLOCK

    check_nans_are_seen()
    monkeypatch.setattr(checked_loops, "copy_looking", look)
    must_notice(check_nans_are_seen)


def check_a_failure_leaves_nothing() -> None:
    """A copy that stops in the middle, and then one that does not."""
    (chunk,) = cut(entries_of([("float32", 5000)]), 1 << 24)
    source, target = np.arange(5000, dtype=np.float32), aligned_bytes(chunk.nbytes)
    sources, copy = np.array([source.ctypes.data]), CheckedCopy()
    broken: Any = [*chunk.runs, (None, 0, 1)]
    with pytest.raises(AttributeError):
        copy.copy(target.data_ptr(), sources, replace(chunk, runs=broken))
    assert copy.copy(target.data_ptr(), sources, chunk) == ([], crc32c.crc32c(source.data))


@needs_processor
def test_a_failure_leaves_nothing():
    check_a_failure_leaves_nothing()


@needs_processor
def test_sabotage_a_checksum_goes_on(monkeypatch):
    copy = CheckedCopy.copy

    def go_on(self: Any, *args: Any) -> Any:
        left, add = self._state.copy(), self._add

        def first(*pieces: Any) -> bool:
            self._state[:], self._add = left, add
            return add(*pieces)

        self._add = first
        return copy(self, *args)

    monkeypatch.setattr(CheckedCopy, "copy", go_on)
    must_notice(check_a_failure_leaves_nothing)


def check_two_at_once(a: Any, b: Any) -> None:
    """One copies a chunk while another one is in the middle of one."""
    (chunk,) = cut(entries_of([("float32", 5000)]), 1 << 24)
    source, others = np.arange(5000, dtype=np.float32), np.ones(5000, np.float32)
    target, elsewhere = aligned_bytes(chunk.nbytes), aligned_bytes(chunk.nbytes)
    add = a._add

    def and_another(*pieces: Any) -> bool:
        found = add(*pieces)
        del a._add
        b.copy(elsewhere.data_ptr(), np.array([others.ctypes.data]), chunk)
        return found

    a._add = and_another
    _, checksum = a.copy(target.data_ptr(), np.array([source.ctypes.data]), chunk)
    assert target.numpy().tobytes() == source.tobytes()
    assert checksum == crc32c.crc32c(source.data)


@needs_processor
def test_two_at_once():
    check_two_at_once(CheckedCopy(), CheckedCopy())


@needs_processor
def test_sabotage_both_use_the_same_memory():
    one = CheckedCopy()
    must_notice(check_two_at_once, one, one)


def check_is_fenced() -> None:
    """Nothing else orders stores past the caches; what other threads see is hard to test."""
    # Compiled here: numba does not show the code of what it has loaded from its cache.
    finish: Any = numba.njit(checked_loops.finish.py_func)
    finish(0, 0, 0, np.zeros(1, np.uint64))
    assert "fence seq_cst" in "".join(finish.inspect_llvm().values())


@needs_processor
def test_what_is_written_is_seen_by_all():
    check_is_fenced()


@needs_processor
def test_sabotage_there_is_no_fence(monkeypatch):
    monkeypatch.setattr(checked_loops, "_fence", numba.njit(lambda: None))
    must_notice(check_is_fenced)


@needs_processor
def test_sabotage_lanes_put_together_wrongly(monkeypatch):
    finish = checked_loops.finish
    monkeypatch.setattr(checked_loops, "finish", lambda *args: finish(*args) ^ 1)
    must_notice(check_copy, [("float32", 5000)], 1, 0)


def check_what_is_written_is_checksummed() -> None:
    """A source that others write meanwhile: they may tear it, never part bytes and checksum."""
    (chunk,) = cut(entries_of([("float32", 1 << 20)]), 1 << 24)
    source, target = np.zeros(1 << 20, np.float32), aligned_bytes(4 << 20)
    stop = threading.Event()

    def write() -> None:
        value = 0.0
        while not stop.is_set():
            value += 1.0
            source.fill(value)  # numpy gives up the GIL while it does

    writer = threading.Thread(target=write)
    writer.start()
    try:
        copy = CheckedCopy()
        for _ in range(60):
            _, checksum = copy.copy(target.data_ptr(), np.array([source.ctypes.data]), chunk)
            assert checksum == crc32c.crc32c(target.numpy().data)
    finally:
        stop.set()
        writer.join()


@needs_processor
def test_what_is_checksummed_is_what_is_written():
    check_what_is_written_is_checksummed()


@needs_processor
def test_sabotage_the_source_is_checksummed(monkeypatch):
    copy = CheckedCopy.copy

    def of_the_source(self: CheckedCopy, target: int, sources: Any, chunk: ChunkLayout) -> Any:
        source = memory_at(int(sources[0]), chunk.nbytes)
        checksum = crc32c.crc32c(source.tobytes())
        source += 1  # as another thread might, in between
        return copy(self, target, sources, chunk)[0], checksum

    monkeypatch.setattr(CheckedCopy, "copy", of_the_source)
    must_notice(check_what_is_written_is_checksummed)


def memory_at(address: int, nbytes: int) -> np.ndarray:
    """Memory at an address, uint8[n]."""
    memory: Any = (ctypes.c_uint8 * nbytes).from_address(address)
    return np.frombuffer(memory, np.uint8)


def test_only_lines_of_the_cache_are_served():
    assert CheckedCopy.serves(4096)
    assert not CheckedCopy.serves(4096 + 32)


def test_another_processor_is_not_taken_for_this_one(monkeypatch):
    monkeypatch.setattr(numba.config, "CPU_NAME", "generic", raising=False)
    assert not CheckedCopy.available()
    monkeypatch.setattr(numba.config, "CPU_NAME", None)
    monkeypatch.setattr(numba.config, "CPU_FEATURES", "", raising=False)
    assert not CheckedCopy.available()


@needs_processor
def test_another_checksum_is_not_made_on_the_way(monkeypatch):
    monkeypatch.setattr(checksums, "DEFAULT", "another")
    assert not CheckedCopy.available()


@pytest.mark.parametrize("missing", ["sse4.2", "pclmul", "avx", None])
def test_each_instruction_is_needed(monkeypatch, missing):
    features = {name: name != missing for name in ("sse4.2", "pclmul", "avx")}
    monkeypatch.setattr(llvmlite.binding, "get_host_cpu_features", lambda: features)
    assert checked_loops._has_instructions.__wrapped__() == (missing is None)


def test_a_processor_that_is_not_known_has_none(monkeypatch):
    def unknown() -> None:
        raise RuntimeError("failed to get host cpu features.")

    monkeypatch.setattr(llvmlite.binding, "get_host_cpu_features", unknown)
    assert not checked_loops._has_instructions.__wrapped__()


STATE = {
    "large": torch.arange(3 << 20, dtype=torch.float32),
    "odd": torch.arange(10_001, dtype=torch.int16)[1:],
    "turned": torch.arange(60_000, dtype=torch.float64).reshape(200, 300).T,
    "nan": torch.tensor([1.0, float("nan")]),
    "none": torch.zeros(0),
}


def module_of(state: Mapping[str, torch.Tensor]) -> nn.Module:
    """A module, as what is not plain in a dictionary is copied at the call."""
    module = nn.Module()
    for name, value in state.items():
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return module


def test_checkpoints_are_the_same_either_way(tmp_path, monkeypatch):
    written: list[Any] = []
    for checked in (True, False):
        if not checked:
            monkeypatch.setattr(CheckedCopy, "available", staticmethod(lambda: False))
        folder = tmp_path / str(checked)
        save_once(folder, {"t": module_of(STATE)}, 3)
        stored = open_checkpoint(folder)
        assert not stored.verify()
        assert stored.manifest.nan_names == ["t.nan"]
        data = [path.read_bytes() for path in data_files(folder, 3)]
        written.append((data, [f.chunk_checksums for f in stored.manifest.files]))
        made = {name: torch.full_like(value, 7) for name, value in STATE.items()}
        with Checkpointer(folder, {"t": module_of(made)}) as ckpt:
            ckpt.restore()
        assert all(bits(made[name]) == bits(value) for name, value in STATE.items())
    same = written[0] == written[1]
    assert same  # how megabytes differ is not explained


def check_saves_verify(folder: Path) -> None:
    save_once(folder, {"t": module_of(STATE)}, 3)
    assert not open_checkpoint(folder).verify()


@needs_processor
def test_to_other_buffers_it_is_copied_as_before(tmp_path, monkeypatch):
    monkeypatch.setattr(CheckedCopy, "serves", staticmethod(lambda _: False))
    monkeypatch.setattr(CheckedCopy, "copy", None)
    check_saves_verify(tmp_path)


@needs_processor
def test_sabotage_a_wrong_checksum_is_written(tmp_path, monkeypatch):
    copy = CheckedCopy.copy

    def wrong(self: CheckedCopy, *args: Any) -> Any:
        found, checksum = copy(self, *args)
        return found, checksum ^ 1

    monkeypatch.setattr(CheckedCopy, "copy", wrong)
    must_notice(check_saves_verify, tmp_path)


def check_nothing_is_compiled_by_a_save(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {name: torch.zeros(3, dtype=_BY_NAME[name].dtype) for name in DTYPES}
    fresh = []
    for name in ("copy_looking", "finish"):  # of which no other test has called any
        fresh.append(loops.compiled(getattr(checked_loops, name).py_func))
        monkeypatch.setattr(checked_loops, name, fresh[-1])
    with Checkpointer(folder, {"t": state}) as ckpt:
        before = [len(kernel.signatures) for kernel in fresh]
        ckpt.save(1).wait_committed()
        assert [len(kernel.signatures) for kernel in fresh] == before


@needs_processor
def test_nothing_is_compiled_by_a_save(tmp_path, monkeypatch):
    check_nothing_is_compiled_by_a_save(tmp_path, monkeypatch)


@needs_processor
def test_sabotage_it_is_not_compiled_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointer, "warm", lambda: None)
    must_notice(check_nothing_is_compiled_by_a_save, tmp_path, monkeypatch)
