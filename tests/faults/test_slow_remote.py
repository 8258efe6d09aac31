"""A remote that is merely slow: it fails nothing, and training never waits for more than it must.

Slow is what a test makes of it: an operation stays where it is until the test lets it go on, or
takes seconds of a clock that the test owns. No test looks at the real one.
"""

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from checkpoints import WAIT_S, Hold, in_background, must_notice, wait_from
from fault_job import CHUNK_NBYTES, Job, differences, make_checkpointer, own_random, reference
from flaky_store import going_wrong
from mirrors import check_restores, check_whole, mirror_url, mirrored_job, train

from planaria import telemetry
from planaria.checkpoint import Checkpointer, Mirror, open_checkpoint
from planaria.checkpoint.mirroring import Mirroring
from planaria.checkpoint.storage import remote
from planaria.core.pacing import TokenBucket
from planaria.errors import DeadlineError, SaveFailedError, StorageError
from planaria.launch.copies import copies_of

T = TypeVar("T")


@contextmanager
def slow(operation: str = "block") -> Iterator[Hold]:
    """A store in which one operation does not come to its end; let go at the end of the block."""
    hold = Hold()
    try:
        with going_wrong(before=lambda name, path: name == operation and hold()):
            yield hold
    finally:
        hold.go_on.set()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK_NBYTES", 8192)


def wait_for_removals(ckpt: Checkpointer) -> None:
    """Old steps are removed after the commit of a new one."""
    steps, until = ckpt._job.attached.pipeline.steps, time.monotonic() + WAIT_S
    while not steps.cleared_up:
        assert time.monotonic() < until, "a save did not end"
        time.sleep(0.001)


# A mirror


def check_training_goes_on(folder: Path, within_s: float = WAIT_S) -> None:
    """While nothing gets into the mirror, steps are trained, saved, committed and removed."""
    telemetry.configure(folder / "telemetry", rank=0)
    try:
        with mirrored_job(folder, job := Job(), keep=2) as ckpt, slow() as hold:
            for step in range(1, 6):
                job.advance()  # through the gate
                handle = ckpt.save(step)
                assert handle._done.wait(within_s), "the mirror is waited for"
                if step == 1:
                    hold.wait_reached()
                assert not handle.mirrored
            # The step that is being copied stays, all others go when it is their time.
            wait_for_removals(ckpt)
            assert ckpt.all_steps() == [1, 4, 5]
            told = copies_of(telemetry.read(folder / "telemetry"))
            assert told is not None
            assert (told.committed, told.copied, told.behind, told.failed) == (5, 0, 5, 0)
            assert "step 5, the newest, is not copied yet" in told.line()
            _, closed = in_background(ckpt.close)
            assert not closed.wait(0.05), "close() did not wait for the mirror"
            hold.go_on.set()
            assert closed.wait(WAIT_S)
    finally:
        telemetry.close()
    # Newest first; what newer ones have overtaken is never sent.
    assert check_whole(mirror_url(folder)) == [4, 5]
    told = copies_of(telemetry.read(folder / "telemetry"))
    assert told is not None
    assert (told.copied, told.behind, told.failed) == (3, None, 0)
    assert told.behind_s is not None
    assert told.nbytes == sum(
        open_checkpoint(mirror_url(folder), step).manifest.nbytes for step in (4, 5, 5)
    )
    check_restores(folder, mirror_url(folder), 5)


def test_training_goes_on_while_the_mirror_is_slow(tmp_path: Path) -> None:
    check_training_goes_on(tmp_path)


def test_sabotage_commits_wait_for_the_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Mirroring.committed

    def and_wait(self: Mirroring, handle: Any, attempt: str) -> None:
        told(self, handle, attempt)
        threading.Event().wait(1.0)

    monkeypatch.setattr(Mirroring, "committed", and_wait)
    must_notice(check_training_goes_on, tmp_path, 0.2)


class SlowClock:
    """Seconds of each thread's own, which pass only in the store."""

    def __init__(self) -> None:
        self._of = threading.local()
        self.total = 0.0

    @property
    def now(self) -> float:
        return getattr(self._of, "now", 0.0)

    def pass_by(self, seconds: float) -> None:
        self._of.now = self.now + seconds
        self.total += seconds

    def within(self, seconds: float, what: str, call: Callable[[], T]) -> T:
        """`timed.within` by this clock."""
        began = self.now
        result = call()
        if self.now - began > seconds:
            raise DeadlineError(f"{what}: no answer within {seconds:g} s")
        return result


def check_slow_is_no_failure(folder: Path, seconds: float) -> SlowClock:
    """Each block and look takes so long; everything is in the mirror in the end."""
    clock = SlowClock()

    def before(name: str, path: str) -> None:
        if "step-" in path and name != "finish":  # it sends the last block, too
            clock.pass_by(seconds)

    with pytest.MonkeyPatch.context() as patch, going_wrong(before=before):
        patch.setattr(remote, "within", clock.within)
        with mirrored_job(folder, job := Job(), on_failure="fatal") as ckpt:
            train(ckpt, job, 2)
    assert check_whole(mirror_url(folder)) == [1, 2]
    return clock


@pytest.mark.usefixtures("small_blocks")
def test_deadlines_are_those_of_a_call_not_of_a_copy(tmp_path: Path) -> None:
    """A copy may take hours, as long as each part of it is sent in time."""
    clock = check_slow_is_no_failure(tmp_path, 0.99 * remote.CALL_TIMEOUT_S)
    assert clock.total > 20 * remote.CALL_TIMEOUT_S


@pytest.mark.usefixtures("small_blocks")
def test_a_call_that_is_too_slow_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no answer within 300 s"):
        check_slow_is_no_failure(tmp_path, 1.01 * remote.CALL_TIMEOUT_S)
    # At no cost here.
    assert not open_checkpoint(tmp_path / "root", 1).verify()


@pytest.mark.usefixtures("small_blocks")
def test_sabotage_one_deadline_for_all_of_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = SlowClock.within

    def within_all(self: SlowClock, seconds: float, what: str, call: Callable[[], T]) -> T:
        result = plain(self, float("inf"), what, call)
        if self.now > seconds:
            raise DeadlineError(f"{what}: no answer within {seconds:g} s")
        return result

    monkeypatch.setattr(SlowClock, "within", within_all)
    with pytest.raises(StorageError, match="no answer"):
        check_slow_is_no_failure(tmp_path, 0.99 * remote.CALL_TIMEOUT_S)


def test_a_slow_store_is_paced_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the store has kept a copy waiting: what was not sent is not made up for."""
    seen: list[tuple[float, int]] = []
    clock = [0.0]

    class Bucket(TokenBucket):
        def __init__(self, rate: float, burst: float) -> None:
            def pause(_: threading.Condition, seconds: float) -> None:
                clock[0] += seconds

            super().__init__(rate, CHUNK_NBYTES, clock=lambda: clock[0], pause=pause)

        def take(self, n: int, deadline: Any) -> None:
            super().take(n, deadline)
            seen.append((clock[0], n))

    def before(name: str, path: str) -> None:
        if name == "finish":
            clock[0] += 3600.0

    monkeypatch.setattr("planaria.checkpoint.storage.mirror.TokenBucket", Bucket)
    mirror = Mirror(mirror_url(tmp_path), bytes_per_s=1000.0)
    with going_wrong(before=before), mirrored_job(tmp_path, job := Job(), mirror=mirror) as ckpt:
        train(ckpt, job, 2)
    assert check_whole(mirror_url(tmp_path)) == [1, 2]
    sent = sum(n for _, n in seen)
    assert sent == sum(
        f.nbytes for s in (1, 2) for f in open_checkpoint(mirror.url, s).manifest.files
    )
    for i, (start, _) in enumerate(seen):
        for j in range(i, len(seen)):
            window = sum(n for _, n in seen[i : j + 1])
            assert window <= CHUNK_NBYTES * 2 + 1000.0 * (seen[j][0] - start) + 1


def test_what_is_here_is_restored_though_the_mirror_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mirrored_job(tmp_path, job := Job()) as ckpt:
        train(ckpt, job, 2)
    monkeypatch.setattr(remote, "CALL_TIMEOUT_S", 0.05)
    go_on = threading.Event()
    try:
        with own_random():
            job = Job()
            ckpt = mirrored_job(tmp_path, job, on_failure="degrade")
            root = ckpt._job.options.mirror.root
            assert root is not None
            assert isinstance(root.storage, remote.RemoteStorage)
            root.storage._timeout_s = 0.05
            with going_wrong(before=lambda name, path: go_on.wait(WAIT_S)):
                report = ckpt.restore()
            assert report is not None
            assert (report.step, report.tier) == (2, "durable")
            assert not differences(job.snapshot(), reference(2))
            go_on.set()
            root.storage._timeout_s = WAIT_S
            ckpt.close()
    finally:
        go_on.set()


# A root


def remote_job(folder: Path, job: Job, **options: Any) -> Checkpointer:
    return make_checkpointer(remote.RemoteStorage(f"flaky://{folder}/root"), job, **options)


def check_restored(folder: Path, step: int) -> None:
    with own_random():
        job = Job()
        with remote_job(folder, job) as ckpt:
            report = ckpt.restore(step)
        assert report is not None
        assert not differences(job.snapshot(), reference(step))


@pytest.mark.usefixtures("small_blocks")
def test_a_pool_that_holds_the_state_hides_a_slow_root(tmp_path: Path) -> None:
    """The state may change while all of it is still on its way; two saves are under way at once."""
    with remote_job(tmp_path, job := Job(), pool_bytes=64 << 20) as ckpt, slow() as hold:
        job.advance()
        handles = [ckpt.save(1)]
        hold.wait_reached()
        for step in (2, 3):
            job.advance()
            handles.append(ckpt.save(step))
        handles[-1].wait_captured()
        assert not any(handle._done.is_set() for handle in handles)
        hold.go_on.set()
        for handle in handles:
            handle.wait_committed()
    for step in (1, 2, 3):
        check_restored(tmp_path, step)


def check_a_small_pool_holds_the_gate(folder: Path) -> None:
    """It waits for no more than the buffers, and what is stored is the state at the call."""
    with remote_job(folder, job := Job(), pool_bytes=2 * CHUNK_NBYTES) as ckpt, slow() as hold:
        job.advance()
        handle = ckpt.save(1)
        hold.wait_reached()
        thread, advanced = in_background(job.advance)
        assert not advanced.wait(0.1), "the state was changed before it was captured"
        assert not handle.captured
        hold.go_on.set()
        thread.join(WAIT_S)
        handle.wait_committed()
        ckpt.save(2).wait_committed()
    for step in (1, 2):
        check_restored(folder, step)


@pytest.mark.usefixtures("small_blocks")
def test_a_small_pool_holds_the_gate_while_the_root_is_slow(tmp_path: Path) -> None:
    check_a_small_pool_holds_the_gate(tmp_path)


@pytest.mark.usefixtures("small_blocks")
def test_sabotage_no_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpointer, "before_update", lambda self: None)
    with pytest.raises((AssertionError, SaveFailedError)):
        check_a_small_pool_holds_the_gate(tmp_path)


@pytest.mark.usefixtures("small_blocks")
def test_a_root_slower_than_the_deadline_costs_the_save_and_not_the_run(tmp_path: Path) -> None:
    options = {"pool_bytes": 2 * CHUNK_NBYTES, "on_failure": "degrade"}
    with warnings.catch_warnings(), remote_job(tmp_path, job := Job(), **options) as ckpt:
        warnings.simplefilter("ignore")
        with slow() as hold:
            wait_from(ckpt._job.attached.pool, 2, hold)
            ckpt._job.attached.pipeline._timeout_s = 0.2
            job.advance()
            handle = ckpt.save(1)
            hold.wait_reached()
            job.advance()  # the gate opens: what is not captured by now never will be
        with pytest.raises(SaveFailedError, match=r"no capture buffer became free within 0\.2"):
            handle.wait_committed()
        ckpt._job.attached.pipeline._timeout_s = WAIT_S
        ckpt.save(2).wait_committed()
    assert check_whole(f"flaky://{tmp_path}/root") == [2]
    check_restored(tmp_path, 2)
