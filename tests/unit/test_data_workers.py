"""GlobalBatch with worker processes: the same batches, and nothing left behind."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from data_numbers import Numbers

from planaria.data import GlobalBatch
from planaria.data.worker import enter_worker
from planaria.errors import DeadlineError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


class Words(torch.utils.data.IterableDataset):
    """Iterable; would shard itself over torch's workers, and draws random numbers."""

    def __iter__(self) -> Iterator[tuple[int, float]]:
        info = torch.utils.data.get_worker_info()
        start, step = (info.id, info.num_workers) if info else (0, 1)
        for i in range(start, 40, step):
            yield i, random.random()


def pids(_samples: list[Any]) -> int:
    return os.getpid()


def make(dataset: Any, workers: int, **options: Any) -> GlobalBatch:
    return GlobalBatch(
        dataset, 12, 2, seed=7, num_workers=workers, **{"collate_fn": list, **options}
    )


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    assert wait_for(lambda: not multiprocessing.active_children())


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("dataset", [Numbers(), Words()])
@pytest.mark.parametrize("workers", [1, 3])
def test_prefetching_changes_nothing(dataset: Any, workers: int) -> None:
    plain, ahead = (make(dataset, n, rank=1, world_size=2, steps=9) for n in (0, workers))
    for data in (plain, ahead):
        data.step = 2
    positions = []
    for one, other in zip(plain, ahead, strict=True):
        assert one == other
        positions.append((plain.state_dict(), ahead.state_dict()))
    assert all(one == other for one, other in positions)
    assert [one["step"] for one, _ in positions] == list(range(3, 10))


@pytest.mark.parametrize("dataset", [Numbers(), Words()])
def test_micro_batches_are_read_ahead_over_steps(dataset: Any) -> None:
    plain, ahead = make(dataset, 0), make(dataset, 2)
    # In order, again, back, and with other shares: as a job does that loses ranks.
    for step, rank, world_size in [
        (0, 0, 2),
        (1, 0, 2),
        (1, 0, 2),
        (2, 1, 3),
        (0, 1, 3),
        (1, 1, 3),
    ]:
        arguments = step, rank, world_size
        assert list(ahead.micro_batches(*arguments)) == list(plain.micro_batches(*arguments))
    assert multiprocessing.active_children()
    ahead.close()
    assert not multiprocessing.active_children()
    ahead.close()


def test_short_and_empty_micro_batches() -> None:
    plain, ahead = (make(range(27), n, drop_last=False) for n in (0, 2))
    for step in range(7):
        assert list(ahead.micro_batches(step)) == list(plain.micro_batches(step))
    assert [next(iter(ahead)) for _ in range(4)] == [next(iter(plain)) for _ in range(4)]
    ahead.close()


def test_workers_are_kept_while_steps_follow_each_other() -> None:
    data = make(Numbers(), 2, collate_fn=pids)
    used = {pid for step in range(5) for _, pid in data.micro_batches(step)}
    assert len(used) == 2
    assert os.getpid() not in used
    data.close()


def test_a_stream_stays_with_one_worker() -> None:
    data = make(Words(), 4, collate_fn=pids)
    used: dict[int, set[int]] = {}
    for step in range(4):
        for i, pid in data.micro_batches(step, 0, 1):
            used.setdefault(i, set()).add(pid)
    assert all(len(of_stream) == 1 for of_stream in used.values())
    assert len(set.union(*used.values())) == 3  # 6 streams; 4 workers do not divide them
    data.close()


def test_another_start_method() -> None:
    data = make(Numbers(), 1, multiprocessing_context="spawn")
    loop = iter(data)
    assert next(loop) == next(iter(make(Numbers(), 0)))
    loop.close()


def test_closing_or_leaving_the_loop_ends_the_workers() -> None:
    data = make(Numbers(), 2)
    loop = iter(data)
    next(loop)
    assert len(multiprocessing.active_children()) == 2
    loop.close()
    assert not multiprocessing.active_children()
    for _ in data:
        break
    assert not multiprocessing.active_children()
    assert data.step == 2


def test_the_trainers_random_streams_are_untouched() -> None:
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    list(islice(make(Numbers(), 2), 3))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


class Fails(Numbers):
    def __getitem__(self, i: int) -> Any:
        raise OSError(f"cannot read sample {i}")


class Hangs(Numbers):
    def __getitem__(self, i: int) -> Any:
        time.sleep(600)


def test_an_error_in_a_worker_surfaces() -> None:
    data = make(Fails(), 1)
    with pytest.raises(OSError, match="cannot read sample"):
        next(iter(data))
    assert data.step == 0
    assert not multiprocessing.active_children()


def test_a_worker_that_hangs_is_a_deadline_and_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    # How long torch waits for a worker to end by itself.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    data = make(Hangs(), 1, timeout=1)
    with pytest.raises(DeadlineError, match="no batch for step 0 within 1 s"):
        next(iter(data))
    assert not multiprocessing.active_children()


def test_signals_to_the_process_group_do_not_end_the_workers() -> None:
    data = make(Numbers(), 1, steps=30)
    found = []
    for batch in data:
        found.append(batch)
        (worker,) = multiprocessing.active_children()
        # From another process: what the trainer itself sends does end them.
        subprocess.run(["kill", "-INT", str(worker.pid)], check=True)
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
        if data.step == 12:
            break
    assert found == list(islice(make(Numbers(), 0), 12))


def test_a_killed_worker_surfaces() -> None:
    data = make(Numbers(), 1, steps=1000)
    loop = iter(data)
    next(loop)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(loop)
    loop.close()


def test_workers_end_with_a_trainer_that_is_killed() -> None:
    code = """
        import multiprocessing, sys, time
        from planaria.data import GlobalBatch

        class Slow:
            def __len__(self): return 100
            def __getitem__(self, i):
                if i > 50: time.sleep(600)
                return i

        data = GlobalBatch(Slow(), 4, 2, shuffle=False, num_workers=2)
        next(iter(data.micro_batches(0)))
        print(*[p.pid for p in multiprocessing.active_children()], flush=True)
        time.sleep(600)
    """
    trainer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert trainer.stdout is not None
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
    finally:
        trainer.kill()
        trainer.communicate()
    assert len(workers) == 2
    assert wait_for(lambda: not any(alive(pid) for pid in workers))


def begins_late(trainer: int) -> None:
    enter_worker(trainer, 0)
    time.sleep(600)


@pytest.mark.parametrize("reaped", [True, False])
def test_a_worker_that_begins_when_its_trainer_is_gone_ends(reaped: bool) -> None:
    trainer = subprocess.Popen(["true"])
    os.waitid(os.P_PID, trainer.pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
    worker = multiprocessing.get_context("fork").Process(target=begins_late, args=(trainer.pid,))
    worker.start()
    try:
        worker.join(60)
        assert worker.exitcode == 0
    finally:
        worker.kill()
        worker.join()
        trainer.poll()


def serves(trainer: int, begun: Connection) -> None:
    """A server of processes: the worker is its child, not the trainer's."""
    if (worker := os.fork()) == 0:
        enter_worker(trainer, 0)
        begun.send(os.getpid())
        time.sleep(600)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))


def test_a_worker_of_a_server_listens_to_its_trainer() -> None:
    begun, there = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("fork").Process(target=serves, args=(os.getpid(), there))
    server.start()
    try:
        assert begun.poll(60)
        os.kill(begun.recv(), signal.SIGTERM)
        server.join(60)
        assert server.exitcode == 0
    finally:
        server.kill()
        server.join()


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
