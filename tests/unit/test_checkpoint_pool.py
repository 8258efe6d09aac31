"""The pool of buffers: bounded, waited for, given back, never reused too early."""

import ctypes
import itertools
import mmap
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from checkpoints import (
    held,
    in_background,
    must_notice,
    wait_from,
)
from save_cases import start, train_step
from torch import nn

from planaria.checkpoint import Checkpointer, open_checkpoint
from planaria.checkpoint.capture import aligned
from planaria.checkpoint.capture.aligned import HUGE_PAGE
from planaria.checkpoint.capture.pool import BufferPool
from planaria.checkpoint.opening import CHUNK_NBYTES
from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.errors import (
    ConfigError,
    DeadlineError,
    SaveFailedError,
    StateError,
)


def test_a_small_pool_makes_the_capture_wait_for_the_writing(tmp_path):
    state = {"model": nn.Linear(1100, 4000, bias=False)}  # 17 MB, five chunks
    with Checkpointer(tmp_path, state, pool_bytes=2 * CHUNK_NBYTES, audit=True) as ckpt:
        chunks = []
        with (
            held("checkpoint.write.chunk") as hold,
            points.armed(callbacks={"checkpoint.capture.chunk": lambda *_: chunks.append(1)}),
        ):
            handle = ckpt.save(1)
            hold.wait_reached()
            with pytest.raises(DeadlineError):
                handle.wait_captured(timeout_s=0.2)
            assert len(chunks) <= 3, "there is no room for more"
            hold.go_on.set()
            handle.wait_committed()
        assert len(chunks) == 5
        assert ckpt._job.attached.pool.nbytes <= 2 * CHUNK_NBYTES
    assert open_checkpoint(tmp_path).verify() == []


def test_a_pool_that_never_becomes_free_is_told(tmp_path):
    state = {"model": nn.Linear(1100, 4000, bias=False)}
    with (
        held("checkpoint.write.chunk") as hold,
        Checkpointer(
            tmp_path, state, pool_bytes=CHUNK_NBYTES, timeout_s=0.3, on_failure="fatal"
        ) as ckpt,
    ):
        wait_from(ckpt._job.attached.pool, 1, hold)
        handle = ckpt.save(1)
        hold.wait_reached()
        assert handle._captured.wait(60)
        hold.go_on.set()
        with pytest.raises(SaveFailedError, match=r"no capture buffer became free within 0\.3 s"):
            handle.wait_committed(60)
        ckpt._timeout_s = ckpt._job.attached.pipeline._timeout_s = 60.0
        with pytest.raises(SaveFailedError):
            ckpt.save(2)
        ckpt.before_update()


def test_a_pool_that_is_too_small_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=f"at least {CHUNK_NBYTES}"):
        Checkpointer(tmp_path, start(), pool_bytes=CHUNK_NBYTES - 1)


def check_use_after_release_is_refused() -> None:
    pool = BufferPool(1 << 16, 1 << 16)
    buffer = pool.acquire(Deadline(60))
    generation = buffer.generation
    pool.check(buffer, generation)
    pool.release(buffer, generation)
    for use in (pool.check, pool.release):
        with pytest.raises(StateError, match="reused before it was written"):
            use(buffer, generation)
    again = pool.acquire(Deadline(60))
    assert again is buffer
    with pytest.raises(StateError, match="reused before it was written"):
        pool.check(buffer, generation)
    pool.release(again, again.generation)


def test_use_after_release_is_refused():
    check_use_after_release_is_refused()


def check_a_buffer_that_is_reused_too_early_spoils_no_checkpoint(path: Path) -> None:
    """A bug that hands a buffer on while it is written must end in a failed save."""
    state = start()
    train_step(state)
    with Checkpointer(path, state, audit=True, on_failure="fatal") as ckpt:
        pool = ckpt._job.attached.pool
        seen = []
        whole = pool.acquire

        def acquire(deadline: Deadline) -> Any:
            seen.append(whole(deadline))
            return seen[-1]

        def hand_on(*_: object) -> None:
            pool.release(seen[0], seen[0].generation)
            pool.acquire(Deadline(60)).tensor.fill_(7)

        pool.acquire = acquire  # type: ignore[method-assign]
        with points.armed(callbacks={"checkpoint.write.chunk": hand_on}):
            handle = ckpt.save(1)
            with pytest.raises(SaveFailedError, match="reused before it was written"):
                handle.wait_committed()
        with pytest.raises(SaveFailedError):
            ckpt.step(2)
    assert ckpt.all_steps() == []


def test_a_buffer_that_is_reused_too_early_spoils_no_checkpoint(tmp_path):
    check_a_buffer_that_is_reused_too_early_spoils_no_checkpoint(tmp_path)


def test_the_pool_is_bounded_reused_and_waits():
    pool = BufferPool(3 << 12, 1 << 12)
    pool.reserve(2 << 12)
    assert pool.nbytes == 2 << 12
    taken = [pool.acquire(Deadline(60)) for _ in range(3)]
    assert len({b.tensor.data_ptr() for b in taken}) == 3
    assert all(b.tensor.data_ptr() % 4096 == 0 for b in taken)
    with pytest.raises(DeadlineError, match="raise pool_bytes"):
        pool.acquire(Deadline(0.01))
    got: list[Any] = []
    thread, done = in_background(lambda: got.append(pool.acquire(Deadline(60))))
    assert not done.wait(0.05)
    pool.release(taken[1], taken[1].generation)
    thread.join()
    assert got == [taken[1]]
    assert pool.nbytes == 3 << 12


def test_buffers_come_back_after_every_kind_of_failure(tmp_path):
    state = {"model": nn.Linear(1100, 2000, bias=False)}  # three chunks
    names = ["capture.begin", "capture.chunk", "capture.audit", "capture.end", "write.header",
             "write.chunk", "write.end", "fsync.end", "record", "manifest.begin"]  # fmt: skip
    limit = 4 * CHUNK_NBYTES
    with (
        warnings.catch_warnings(),
        Checkpointer(tmp_path, state, pool_bytes=limit, on_failure="degrade") as ckpt,
    ):
        warnings.simplefilter("ignore")
        for step, (name, hit) in enumerate(itertools.product(names, (1, 2))):
            with points.armed(f"raise=on purpose@checkpoint.{name}:hit={hit}"):
                handle = ckpt.save(step)
                handle._done.wait(60)
            assert len(ckpt._job.attached.pool._free) == ckpt._job.attached.pool._made, (name, hit)
        ckpt.save(100).wait_committed()
    assert open_checkpoint(tmp_path, 100).verify() == []


@pytest.mark.parametrize("nbytes", [0, 1, 4096, HUGE_PAGE - 1, HUGE_PAGE, 2 * HUGE_PAGE + 5])
def test_aligned_memory(nbytes):
    memory = aligned.aligned_bytes(nbytes)
    assert memory.numel() == nbytes == aligned.aligned_memory(nbytes).nbytes
    assert not memory.any()
    memory.fill_(7)
    assert memory.data_ptr() % (HUGE_PAGE if nbytes >= HUGE_PAGE else 4096) == 0 or not nbytes


def flags_of(address: int) -> set[str]:
    """How the kernel treats the memory at an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            first, end = (int(part, 16) for part in name.split("-"))
            inside = first <= address < end
        elif inside and name == "VmFlags:":
            return set(rest)
    raise AssertionError("it is not mapped")


def check_a_fork_has_none_of_it() -> None:
    """A child that had the same pages would make each write of the parent copy one."""
    memory = aligned.aligned_bytes(HUGE_PAGE)
    memory.fill_(7)
    child = os.fork()
    if child == 0:
        seen = ctypes.string_at(memory.data_ptr(), 64)
        os._exit(0 if seen == bytes(64) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bool((memory == 7).all())


def test_large_memory_is_in_huge_pages_and_not_shared_with_forks():
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert "hg" in flags_of(aligned.aligned_bytes(HUGE_PAGE).data_ptr())
    check_a_fork_has_none_of_it()


def test_sabotage_forks_share_the_memory(monkeypatch):
    monkeypatch.setattr(aligned, "_WIPE_ON_FORK", mmap.MADV_NORMAL)
    must_notice(check_a_fork_has_none_of_it)


def test_sabotage_no_generation_check(tmp_path, monkeypatch):
    monkeypatch.setattr(BufferPool, "check", lambda *_: None)
    must_notice(check_use_after_release_is_refused)
    must_notice(check_a_buffer_that_is_reused_too_early_spoils_no_checkpoint, tmp_path)
    assert open_checkpoint(tmp_path).verify() != [], "the second line of defence"
