"""Copies that are checksummed and looked at on the way: the same bytes, checksums and NaNs."""

import ctypes
import threading
from pathlib import Path
from typing import Any

import crc32c
import numba
import numpy as np
import pytest
import torch
from checkpoints import bits, data_files, must_notice, save_once
from hypothesis import given, settings
from hypothesis import strategies as st

from planaria.checkpoint import Checkpointer, checkpointer, open_checkpoint
from planaria.checkpoint.capture import checked_loops, kernels, loops
from planaria.checkpoint.capture.aligned import aligned_bytes
from planaria.checkpoint.capture.checked import CheckedCopy
from planaria.checkpoint.capture.cutting import ChunkLayout
from planaria.checkpoint.format.dtypes import _BY_NAME

BLOCK = checked_loops.BLOCK
DTYPES = sorted(_BY_NAME)
needs_processor = pytest.mark.skipif(
    not CheckedCopy.available(), reason="the processor has no instructions for it"
)


def layout(sizes: list[tuple[str, int]]) -> ChunkLayout:
    """A chunk of tensors of these dtypes and numbers of elements, each a piece."""
    nbytes = np.array([_BY_NAME[name].itemsize * count for name, count in sizes], np.int64)
    count, places = len(sizes), np.cumsum(nbytes) - nbytes
    runs = [(_BY_NAME[name], i, i + 1) for i, (name, _) in enumerate(sizes)]
    numbers, names = np.arange(count), [f"t{i}" for i in range(count)]
    return ChunkLayout(names, numbers, np.zeros(count, np.int64), places, nbytes, runs,
                       int(nbytes.sum()))  # fmt: skip


def check_copy(sizes: list[tuple[str, int]], seed: int, skipped: int) -> None:
    """By the plain kernels and by the checked one, from and to the same."""
    # As in a file: the largest elements first, so that all lie at multiples of themselves.
    chunk = layout(sorted(sizes, key=lambda each: -_BY_NAME[each[0]].itemsize))
    rng = np.random.default_rng(seed)
    # Of most floats each bit pattern is a number.
    memory = rng.integers(0, 120, chunk.nbytes * 2 + 64 * len(sizes) + 9, np.uint8)
    memory[rng.integers(0, len(memory), len(sizes) // 2)] = 0xFF
    gaps = chunk.places + 16 * np.arange(len(sizes)) + skipped
    sources = memory.ctypes.data + gaps
    target, plain = aligned_bytes(chunk.nbytes + 64), aligned_bytes(chunk.nbytes + 64)
    seen = []
    for run in chunk.runs:
        part = slice(run[1], run[2])
        pieces = chunk.places[part], sources[part], chunk.sizes[part]
        if kernels.copy_looking_for_nan(plain.data_ptr(), *pieces, run[0]):
            seen.append(run)
    found, checksum = CheckedCopy().copy(target.data_ptr(), sources, chunk)
    assert torch.equal(target, plain)
    assert checksum == crc32c.crc32c(plain.numpy().data[: chunk.nbytes])
    assert found == seen


@needs_processor
@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(DTYPES),
            st.integers(0, 40) | st.sampled_from([BLOCK // 8, BLOCK]) | st.integers(0, 9000),
        ),
        max_size=12,
    ),
    st.integers(0, 1 << 30),
    st.integers(0, 9),
)
def test_a_checked_copy_is_a_plain_one(sizes, seed, skipped):
    check_copy(sizes, seed, skipped)


@needs_processor
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("nbytes", [0, 16, BLOCK - 16, BLOCK, BLOCK + 16, 5 * BLOCK, 100_000])
def test_at_the_ends_of_blocks(name, nbytes):
    check_copy([(name, nbytes // _BY_NAME[name].itemsize)], nbytes, 0)
    check_copy([("float64", 3), (name, nbytes // _BY_NAME[name].itemsize)], nbytes, 0)


@needs_processor
def test_sabotage_lanes_put_together_wrongly(monkeypatch):
    finish = checked_loops.finish
    monkeypatch.setattr(checked_loops, "finish", lambda *args: finish(*args) ^ 1)
    must_notice(check_copy, [("float32", 5000)], 1, 0)


def check_what_is_written_is_checksummed() -> None:
    """A source that others write meanwhile: they may tear it, never part bytes and checksum."""
    chunk = layout([("float32", 1 << 20)])
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


STATE = {
    "large": torch.arange(3 << 20, dtype=torch.float32),
    "odd": torch.arange(10_001, dtype=torch.int16)[1:],
    "turned": torch.arange(60_000, dtype=torch.float64).reshape(200, 300).T,
    "nan": torch.tensor([1.0, float("nan")]),
    "none": torch.zeros(0),
}


def test_checkpoints_are_the_same_either_way(tmp_path, monkeypatch):
    written: list[Any] = []
    for checked in (True, False):
        if not checked:
            monkeypatch.setattr(CheckedCopy, "available", staticmethod(lambda: False))
        folder = tmp_path / str(checked)
        save_once(folder, {"t": dict(STATE)}, 3)
        stored = open_checkpoint(folder)
        assert not stored.verify()
        assert stored.manifest.nan_names == ["t.nan"]
        data = [path.read_bytes() for path in data_files(folder, 3)]
        written.append((data, [f.chunk_checksums for f in stored.manifest.files]))
        made = {name: torch.full_like(value, 7) for name, value in STATE.items()}
        with Checkpointer(folder, {"t": made}) as ckpt:
            ckpt.restore()
        assert {n: bits(v) for n, v in made.items()} == {n: bits(v) for n, v in STATE.items()}
    assert (written[0] == written[1]) is True


def check_saves_verify(folder: Path) -> None:
    save_once(folder, {"t": dict(STATE)}, 3)
    assert not open_checkpoint(folder).verify()


@needs_processor
def test_sabotage_a_wrong_checksum_is_written(tmp_path, monkeypatch):
    copy = CheckedCopy.copy

    def wrong(self: CheckedCopy, *args: Any) -> Any:
        found, checksum = copy(self, *args)
        return found, checksum ^ 1

    monkeypatch.setattr(CheckedCopy, "copy", wrong)
    must_notice(check_saves_verify, tmp_path)


def check_nothing_is_compiled_by_a_save(folder: Path) -> None:
    state = {name: torch.zeros(3, dtype=_BY_NAME[name].dtype) for name in DTYPES}
    with Checkpointer(folder, {"t": state}) as ckpt:
        before = len(checked_loops.copy_looking.signatures)
        ckpt.save(1).wait_committed()
        assert len(checked_loops.copy_looking.signatures) == before


@needs_processor
def test_nothing_is_compiled_by_a_save(tmp_path):
    check_nothing_is_compiled_by_a_save(tmp_path)


@needs_processor
def test_sabotage_it_is_not_compiled_ahead(tmp_path, monkeypatch):
    kernel = checked_loops.copy_looking
    monkeypatch.setattr(checked_loops, "copy_looking", loops.compiled(kernel.py_func))
    monkeypatch.setattr(checkpointer, "warm", lambda: None)
    must_notice(check_nothing_is_compiled_by_a_save, tmp_path)
