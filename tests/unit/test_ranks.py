"""The harness of the distributed tests: it must notice every way in which a rank can go wrong."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import RankDied, RankError, RankHung, RankResult, run_ranks, try_ranks

from planaria.core.deadline import Deadline


@dataclass
class Pair:
    left: int
    right: int


class AwkwardError(Exception):
    """Cannot be unpickled: its constructor takes no message."""

    def __init__(self) -> None:
        super().__init__("awkward")


def total(rank: int, scale: int) -> int:
    import torch
    import torch.distributed as dist

    value = torch.tensor([rank * scale])
    dist.all_reduce(value)
    assert torch.get_num_threads() == 1
    return int(value.item())


def environment(rank: int, *names: str) -> list[str | None]:
    import torch.distributed as dist

    assert not dist.is_initialized()
    return [os.environ.get(name) for name in names]


def joins_by_itself(rank: int) -> int:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()
    return dist.get_world_size()


def swap(rank: int, pair: Pair) -> Pair:
    return Pair(pair.right, pair.left)


def tensor(rank: int) -> object:
    import torch

    return torch.full((3,), float(rank))


def fails(rank: int, culprit: int) -> None:
    import torch.distributed as dist

    if rank == culprit:
        raise KeyError("the cause")
    dist.barrier()


def fails_awkwardly(rank: int) -> None:
    raise AwkwardError


def kills_itself(rank: int, victim: int, number: int = signal.SIGKILL) -> int:
    if dist.is_initialized():
        dist.barrier()  # all are connected: a death while they connect is another matter
    if rank == victim:
        print("last words", flush=True)
        os.kill(os.getpid(), number)
        time.sleep(60)
    return rank


def hangs(rank: int) -> None:
    if rank == 1:
        stuck_here()


def stuck_here() -> None:
    time.sleep(600)


def stops_itself(rank: int) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def waits_for_rank_0(rank: int) -> None:
    if rank == 0:
        raise ValueError("the cause")
    stuck_here()


def leaves_thread(rank: int) -> int:
    threading.Thread(target=stuck_here).start()
    return rank


def leaves_process(rank: int, file: str) -> None:
    child = subprocess.Popen(["sleep", "600"])
    Path(file).write_text(str(child.pid))


def test_results_come_in_rank_order() -> None:
    assert run_ranks(3, total, 10) == [30, 30, 30]


def test_module_and_function_by_name() -> None:
    assert run_ranks(2, "operator:add", 10, init_group=False) == [10, 11]
    with pytest.raises(ValueError, match="module:function"):
        run_ranks(1, "operator")


def test_objects_of_the_test_file_travel_both_ways() -> None:
    assert run_ranks(1, swap, Pair(1, 2), init_group=False) == [Pair(2, 1)]


def test_tensors_outlive_their_rank() -> None:
    values = run_ranks(2, tensor, init_group=False)
    assert [value.tolist() for value in values] == [[0.0] * 3, [1.0] * 3]


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_CALLER", "yes")
    monkeypatch.setenv("REMOVED", "no")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "FROM_CALLER", "REMOVED", "EXTRA")
    values = run_ranks(
        2, environment, *names, init_group=False, env={"EXTRA": "1", "REMOVED": None}
    )
    assert values == [
        [str(rank), str(rank), "2", "127.0.0.1", "yes", None, "1"] for rank in range(2)
    ]


def test_rank_can_join_through_the_environment() -> None:
    assert run_ranks(2, joins_by_itself, init_group=False) == [2, 2]


@pytest.mark.parametrize("culprit", [0, 1])
def test_error_of_a_rank_is_raised_here(culprit: int) -> None:
    with pytest.raises(KeyError, match="the cause") as info:
        run_ranks(2, fails, culprit)
    assert f"[rank {culprit}] raised this" in info.value.__notes__
    assert 'raise KeyError("the cause")' in str(info.value.__cause__)


def test_error_that_does_not_travel() -> None:
    with pytest.raises(RankError, match="raise AwkwardError"):
        run_ranks(1, fails_awkwardly, init_group=False)


def test_unexpected_death() -> None:
    with pytest.raises(RankDied, match=r"rank 1 died by SIGKILL(?s:.*)last words"):
        run_ranks(2, kills_itself, 1)


def test_expected_death() -> None:
    assert run_ranks(3, kills_itself, 0, expect_dead=[0]) == [None, 1, 2]


def test_only_sigkill_is_expected() -> None:
    with pytest.raises(RankDied, match=r"rank 0 died by SIGSEGV(?s:.*)kills_itself"):
        run_ranks(1, kills_itself, 0, signal.SIGSEGV, expect_dead=[0], init_group=False)


def until_stuck(world: int, target: Callable[..., object]) -> list[RankResult]:
    """How ranks ended, of which the last gets stuck; a slow machine gets more time for that."""
    results: list[RankResult] = []
    for timeout in (2, 10, 50):
        results = try_ranks(world, target, init_group=world > 1, timeout=timeout)
        stuck = "stuck_here" in str(results[-1].error)
        if stuck and all(result.error is None for result in results[:-1]):
            break
    return results


def test_hung_rank_is_ended_with_its_stacks() -> None:
    first, second = until_stuck(2, hangs)
    assert first.error is None
    assert isinstance(second.error, RankHung)
    assert "stuck_here" in str(second.error)


def test_stopped_rank_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ranks.GRACE_AFTER_DEADLINE_S", 0.1)
    with pytest.raises(RankHung, match="rank 0"):
        run_ranks(1, stops_itself, init_group=False, timeout=1)


def test_failure_does_not_wait_for_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ranks.GRACE_AFTER_FAILURE_S", 0.2)
    with pytest.raises(ValueError, match="the cause") as info:
        run_ranks(2, waits_for_rank_0, init_group=False, timeout=200)
    assert any("rank 1 did not end" in note for note in info.value.__notes__)


def test_thread_that_keeps_a_rank_alive_is_shown() -> None:
    (only,) = until_stuck(1, leaves_thread)
    assert isinstance(only.error, RankHung)
    assert "stuck_here" in str(only.error)


def test_process_that_outlives_its_rank_is_killed_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ranks.GRACE_FOR_ORPHANS_S", 0.2)
    file = tmp_path / "pid"
    with pytest.raises(RankError, match=r"left processes running.*sleep 600"):
        run_ranks(1, leaves_process, str(file), init_group=False)
    status = Path(f"/proc/{file.read_text()}/stat")
    deadline = Deadline(30)
    # A killed process takes a moment to go.
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        deadline.check("the process to go")
        time.sleep(0.01)


def test_function_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="module-level"):
        run_ranks(1, lambda rank: rank)
