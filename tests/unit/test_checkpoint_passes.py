"""Restores in two passes: what was read is in place at once, and put back unless all is well."""

import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from checkpoints import bits, data_files, flip, must_notice, save_once
from hypothesis import given, settings
from hypothesis import strategies as st

from planaria.checkpoint import Checkpointer, open_checkpoint, restore
from planaria.checkpoint.capture import kernels
from planaria.checkpoint.capture import pool as pools
from planaria.checkpoint.capture.aligned import aligned_bytes
from planaria.checkpoint.capture.pool import BufferPool
from planaria.checkpoint.layout import pieces, reading
from planaria.checkpoint.layout.pieces import Span, runs_of
from planaria.checkpoint.layout.reading import Reader
from planaria.checkpoint.layout.transforms import sources_of
from planaria.checkpoint.state.provider import Target
from planaria.checkpoint.storage.local import LocalStorage
from planaria.core.box import Box
from planaria.errors import CollectiveError, CorruptError

TENSORS = {
    "wide": torch.randn(3, 1_500_000),  # several chunks in a row
    "tall": torch.randn(600_000, 2),
    "cube": torch.randn(5, 6, 7),
    "bytes": torch.arange(10, dtype=torch.uint8),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
}
WIDE = tuple(TENSORS["wide"].shape)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("root")
    save_once(path, {"t": dict(TENSORS)})
    return path


POOLS = pytest.mark.parametrize("room", [0, 1 << 23, 1 << 28], ids=["none", "a part", "all"])


def filled(value: float) -> dict[str, torch.Tensor]:
    return {n: torch.full_like(t, value) for n, t in TENSORS.items()}


def same(made: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    # Told as a whole: to explain how megabytes differ takes minutes.
    return all(bits(made[name]) == bits(tensor) for name, tensor in expected.items())


def unchanged(made: dict[str, torch.Tensor]) -> bool:
    return same(made, filled(3))


def reader_into(root: Path, made: dict[str, torch.Tensor], room: int) -> tuple[Reader, BufferPool]:
    whole = open_checkpoint(root)
    sources = sources_of(whole.manifest)
    targets = [
        Target(f"t.{n}", Box.full(tuple(t.shape)), t, sources[f"t.{n}"]) for n, t in made.items()
    ]
    pool = BufferPool(room, 1 << 22 if room else 4096)
    pool.reserve(room)
    return Reader(LocalStorage(root), whole.manifest, targets, pool), pool


@POOLS
def test_reading_in_two_passes_with_any_memory(root, room):
    """What the first pass may not keep is read again by the second."""
    made = filled(3)
    reader, pool = reader_into(root, made, room)
    reader.verify()
    assert any(s.exchanged for s in reader._spans) == bool(room)
    reader.load()
    assert same(made, TENSORS)
    assert pool.idle, "a buffer was not given back"


def check_put_back(root: Path, room: int) -> None:
    made = filled(3)
    reader, pool = reader_into(root, made, room)
    reader.verify()
    reader.close()
    assert unchanged(made)
    assert pool.idle, "a buffer was not given back"


@POOLS
def test_what_no_second_pass_follows_is_put_back(root, room):
    check_put_back(root, room)


def test_sabotage_what_was_there_is_not_put_back(root, monkeypatch):
    exchange = Span.exchange
    monkeypatch.setattr(Span, "exchange", lambda self: None if self.exchanged else exchange(self))
    must_notice(check_put_back, root, 1 << 28)


@POOLS
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_damage_is_told_and_leaves_everything_as_it_was(tmp_path, room, where):
    save_once(tmp_path, {"t": dict(TENSORS)})
    (file,) = data_files(tmp_path, 1)
    info = open_checkpoint(tmp_path).manifest.files[0]
    flip(file, info.data_start + int(where * (info.data_nbytes - 1)))
    made = filled(3)
    reader, pool = reader_into(tmp_path, made, room)
    with pytest.raises(CorruptError, match="is damaged"):
        reader.verify()
    assert unchanged(made)
    assert pool.idle


@pytest.mark.parametrize("shared", ["bytes", "memory"])
def test_what_is_shared_does_not_change_places(root, shared):
    """Else a second target would get what was in the first one, or that would be put back last."""
    whole = open_checkpoint(root)
    sources = sources_of(whole.manifest)
    first = torch.full_like(TENSORS["wide"], 3)
    targets = [Target("a", Box.full(WIDE), first, sources["t.wide"])]
    if shared == "bytes":
        second = torch.full_like(first, 3)
        targets.append(Target("b", Box.full(WIDE), second, sources["t.wide"]))
    else:
        second = first.view(-1)[100:1_200_100].view(600_000, 2)
        targets.append(Target("b", Box.full((600_000, 2)), second, sources["t.tall"]))
    for ends in ("put back", "loaded"):
        pool = BufferPool(1 << 28, 1 << 22)
        reader = Reader(LocalStorage(root), whole.manifest, targets, pool)
        reader.verify()
        if ends == "loaded":
            reader.load()
        else:
            reader.close()
            assert (first == 3).all()
            assert (second == 3).all()
    if shared == "bytes":
        both = {"first": first, "second": second}
        assert same(both, dict.fromkeys(both, TENSORS["wide"]))


def check_unchanged_when_a_rank_is_gone(path: Path, patch: pytest.MonkeyPatch) -> None:
    def lost(ranks: object, error: object) -> None:
        assert error is None
        raise CollectiveError("another rank is gone")

    made = filled(3)
    save_once(path, {"t": dict(TENSORS)})
    with Checkpointer(path, {"t": made}) as ckpt:
        with patch.context() as patched:
            patched.setattr(restore, "_vote", lost)
            with pytest.raises(CollectiveError):
                ckpt.restore()
        assert unchanged(made)
        ckpt.restore()  # the buffers were given back, and nothing else was done
        assert same(made, TENSORS)
        assert ckpt._job.attached.pool.idle


def test_a_rank_that_is_lost_at_the_vote_leaves_everything_as_it_was(tmp_path, monkeypatch):
    check_unchanged_when_a_rank_is_gone(tmp_path, monkeypatch)


def test_sabotage_a_reader_is_left_open_when_a_rank_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(Reader, "close", lambda self: None)
    must_notice(check_unchanged_when_a_rank_is_gone, tmp_path, monkeypatch)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=12))
def test_disjoint_intervals_overlap_with_no_other(parts):
    intervals = [(start, start + length) for start, length in parts]
    found = pieces._disjoint(intervals)
    for i, (start, end) in enumerate(intervals):
        others = intervals[:i] + intervals[i + 1 :]
        assert found[i] == (not any(s < end and start < e for s, e in others))


def test_neighbours_are_read_in_one_go(root):
    made = {"wide": torch.zeros_like(TENSORS["wide"])}
    reader, _ = reader_into(root, made, 1 << 28)
    reader._keep()
    spans = reader._spans
    assert len(spans) > 2
    runs = list(runs_of(spans * 40, 2 * len(spans), 3))
    assert [span for run in runs for span in run] == spans * 40
    assert max(map(len, runs)) == len(spans), "what follows the last is the first again"
    lengths = list(map(len, runs_of(spans, len(spans), 1)))
    assert lengths[0] == len(spans) // 2
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == 1, "the last is short"
    buffers = [span.kept for span in spans]
    spans[0].kept, spans[1].kept = buffers[1], buffers[0]
    assert all(len(run) == 1 for run in runs_of(spans[:2], 8, 1)), "in memory they are none"
    spans[0].kept, spans[1].kept = buffers[0], None
    assert all(len(run) == 1 for run in runs_of(spans[:2], 8, 1)), "it is not kept"
    reader.close()


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, 127, 128, 4096, 100_003])
def test_what_is_exchanged_is_all_there_and_nothing_else(nbytes: int) -> None:
    rng = np.random.default_rng(nbytes)
    for skipped, into in ((0, 0), (1, 0), (0, 1), (7, 33), (64, 63)):
        source, target = rng.integers(0, 256, (2, nbytes + 256), np.uint8)
        before = source.copy(), target.copy()
        tables = (
            np.array([target.ctypes.data + into, target.ctypes.data + into + nbytes + 9]),
            np.array([source.ctypes.data + skipped, source.ctypes.data + skipped + nbytes]),
            np.array([nbytes, 5]),
        )
        kernels.exchange_pieces(*tables)
        expected = before[0].copy(), before[1].copy()
        expected[1][into : into + nbytes] = before[0][skipped : skipped + nbytes]
        expected[0][skipped : skipped + nbytes] = before[1][into : into + nbytes]
        expected[1][into + nbytes + 9 :][:5] = before[0][skipped + nbytes :][:5]
        expected[0][skipped + nbytes :][:5] = before[1][into + nbytes + 9 :][:5]
        assert np.array_equal(source, expected[0])
        assert np.array_equal(target, expected[1])
        kernels.exchange_pieces(*tables)
        assert np.array_equal(source, before[0])
        assert np.array_equal(target, before[1])


def interrupt() -> None:
    """What Ctrl-C does."""
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


def check_interrupts_while_it_is_put_back(root: Path, patch: pytest.MonkeyPatch) -> None:
    made = filled(3)
    reader, pool = reader_into(root, made, 1 << 28)
    reader.verify()
    left = [interrupt]

    def exchange(*tables: np.ndarray) -> None:
        kernels.exchange_pieces(*tables)
        if left:
            left.pop()()  # before it is noted

    with patch.context() as patched:
        patched.setattr(pieces, "exchange_pieces", exchange)
        with pytest.raises(KeyboardInterrupt):
            reader.close()
    assert unchanged(made)
    assert pool.idle


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_it_is_put_back_leaves_everything_as_it_was(root, monkeypatch):
    check_interrupts_while_it_is_put_back(root, monkeypatch)


@pytest.mark.usefixtures("interruptible")
def test_sabotage_what_is_put_back_can_be_interrupted(root, monkeypatch):
    monkeypatch.setattr(reading, "uninterrupted", lambda work, *_: work())
    must_notice(check_interrupts_while_it_is_put_back, root, monkeypatch)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("times", [1, 3])
def test_interrupts_in_the_first_pass_leave_everything_as_it_was(root, monkeypatch, times):
    """Also one more while it waits for the threads: they may be in the midst of an exchange."""
    made = filled(3)
    reader, pool = reader_into(root, made, 1 << 28)
    at_it, left = threading.active_count(), [interrupt] * times

    def exchange(*tables: np.ndarray) -> None:
        while left:
            left.pop()()
            time.sleep(0.1)
        kernels.exchange_pieces(*tables)

    with monkeypatch.context() as patched:
        patched.setattr(pieces, "exchange_pieces", exchange)
        with pytest.raises(KeyboardInterrupt):
            reader.verify()
        assert threading.active_count() <= at_it
    assert unchanged(made)
    assert pool.idle


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_buffers_are_taken_leaves_all_of_them_free(root, monkeypatch):
    made = filled(3)
    reader, pool = reader_into(root, made, 1 << 28)
    take, left = pool.try_acquire, [interrupt]

    def take_and() -> pools.Buffer | None:
        taken = take()
        if left:
            left.pop()()  # before it is noted
        return taken

    monkeypatch.setattr(pool, "try_acquire", take_and)
    with pytest.raises(KeyboardInterrupt):
        reader.verify()
    assert unchanged(made)
    assert pool.idle


def test_no_memory_for_a_buffer_leaves_the_others_free(root, monkeypatch):
    made, given = filled(3), 0

    def memory(nbytes: int) -> torch.Tensor:
        nonlocal given
        given += 1
        if given == 4:
            raise MemoryError
        return aligned_bytes(nbytes)

    reader, _ = reader_into(root, made, 0)
    pool = reader._pool = BufferPool(1 << 28, 1 << 22)
    with monkeypatch.context() as patched:
        patched.setattr(pools, "aligned_bytes", memory)
        with pytest.raises(MemoryError):
            reader.verify()
    assert unchanged(made)
    assert pool.idle
    assert pool.nbytes == 3 << 22
    reader.verify()
    reader.load()
    assert same(made, TENSORS)


def test_what_other_processes_see_does_not_change_before_all_is_well(root):
    made = filled(3)
    for tensor in made.values():
        tensor.share_memory_()
    reader, pool = reader_into(root, made, 1 << 28)
    reader.verify()
    assert unchanged(made)
    reader.load()
    assert same(made, TENSORS)
    assert pool.idle


@pytest.mark.parametrize(("local", "most"), [("here", 3), (None, 1)])
def test_of_a_storage_that_is_elsewhere_less_is_read_in_one_go(root, monkeypatch, local, most):
    """It has that in memory of its own meanwhile, for each of the threads."""
    monkeypatch.setattr(reading, "_THREADS", 1)
    monkeypatch.setattr(reading, "_FAR_NEIGHBOURS", 1)
    made, near, lengths = filled(3), LocalStorage(root), []

    def read_into(path: str, start: int, buffer: memoryview) -> int:
        lengths.append(len(buffer))
        return near.read_into(path, start, buffer)

    reader, _ = reader_into(root, made, 1 << 28)
    reader._storage = cast(Any, SimpleNamespace(url="x", local=local, read_into=read_into))
    reader.verify()
    reader.load()
    assert same(made, TENSORS)
    assert max(lengths) == most * reading.SPAN_NBYTES
