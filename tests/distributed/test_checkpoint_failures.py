"""Failures on one rank: the others learn of them, and the next save is whole again."""

import errno
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import held, must_notice
from fault_job import lose_patience
from ranks import run_ranks

from planaria.checkpoint import Checkpointer, points
from planaria.checkpoint.agree import Agreement
from planaria.checkpoint.persist import Persister
from planaria.checkpoint.save_job import SaveJob
from planaria.errors import ConfigError, SaveFailedError


def goes_on_after_failures(rank: int, root: str, sabotage: bool = False) -> list[int]:
    """Rank 0's disk fails at step 2, rank 1 hears of it late; both go on. Returns what is there."""
    write = Persister.write

    def fails(self: Persister, step: int, *args: Any) -> Any:
        if step == 2 and rank == 0:
            raise OSError(errno.ENOSPC, "full")
        return write(self, step, *args)

    Persister.write = fails  # pyright: ignore[reportAttributeAccessIssue]
    state = {"x": {"a": torch.ones(4)}}
    with Checkpointer(root, state, on_failure="fatal", every=1, timeout_s=60) as ckpt:
        if sabotage:  # as if a failure were raised before the next save has begun
            ckpt._save = _raise_first(ckpt)
            lose_patience(ckpt, 4)
        if rank == 1:
            on_done = ckpt._job.attached.pipeline._on_done

            def late(job: SaveJob) -> None:
                time.sleep(0.3 * (job.step == 2))
                on_done(job)

            ckpt._job.attached.pipeline._on_done = late
        caught = 0
        for step in range(1, 11):
            try:
                ckpt.step(step)
            except SaveFailedError:
                caught += 1
            time.sleep(0.1)
        for handle in list(ckpt._job.pending):
            handle._done.wait(60)
        steps = ckpt.all_steps()
        try:
            ckpt.close()
        except SaveFailedError:  # of so late a failure that no step could tell
            caught += 1
        assert caught == 1
    Persister.write = write
    return steps


def _raise_first(ckpt: Checkpointer) -> Any:
    save = ckpt._save

    def before(n: int, metrics: Any = None, **sinks: bool) -> Any:
        failures = ckpt._failures.take()
        if failures:
            raise failures[0]
        return save(n, metrics, **sinks)

    return before


def check_goes_on(root: Path, sabotage: bool) -> None:
    found = run_ranks(2, goes_on_after_failures, str(root), sabotage)
    assert found == [[1, *range(3, 11)]] * 2


def test_ranks_that_hear_of_a_failure_at_different_steps_stay_together(tmp_path: Path) -> None:
    check_goes_on(tmp_path, sabotage=False)


def test_sabotage_raising_before_the_save_has_begun(tmp_path: Path) -> None:
    must_notice(check_goes_on, tmp_path, True)


def one_cannot_serialise(rank: int, root: str) -> list[int]:
    """Rank 1's object cannot be stored in step 1."""
    state = {"x": {"n": float(rank)}}
    with Checkpointer(root, state, on_failure="degrade", timeout_s=60) as ckpt:
        report = Agreement._report

        def broken(self: Agreement, job: Any, deadline: Any) -> Any:
            if job.step == 1 and rank == 1:
                job.objects["bad"] = {1, 2}
            return report(self, job, deadline)

        Agreement._report = broken
        with pytest.raises(SaveFailedError, match="'bad' is not JSON"):
            ckpt.save(1).wait_committed()
        Agreement._report = report
        ckpt.save(2).wait_committed()
        return ckpt.all_steps()


@pytest.mark.filterwarnings("ignore:step 1 was not committed")
def test_an_object_of_one_rank_costs_one_save(tmp_path: Path) -> None:
    assert run_ranks(2, one_cannot_serialise, str(tmp_path)) == [[2], [2]]


def one_asks_for_nonsense(rank: int, root: str) -> str:
    """Rank 1 gives a bad argument; rank 0 must hear of it at once."""
    # Who waits for a rank that is gone gets a CollectiveError.
    with pytest.raises(ConfigError) as caught:
        Checkpointer(root, {"x": {"a": 1}}, every=0 if rank else 5, timeout_s=60)
    return str(caught.value)


def test_a_bad_argument_on_one_rank_is_told_to_all(tmp_path: Path) -> None:
    first, second = run_ranks(2, one_asks_for_nonsense, str(tmp_path))
    assert "every=0" in second
    assert first == f"rank 1: {second}"


def frees_what_two_ranks_share(rank: int, root: str) -> str:
    """A replica so large that each rank writes a part of it, freed on one rank after the call."""
    model = torch.nn.Linear(2048, 1024, bias=False)
    torch.nn.init.ones_(model.weight)
    with Checkpointer(root, {"model": model}, on_failure="degrade", timeout_s=60) as ckpt:
        with held(points.PLAN) as hold:
            handle = ckpt.save(1)
            hold.wait_reached()
            if rank == 1:
                model.weight.data.untyped_storage().resize_(0)
        with pytest.raises(SaveFailedError) as caught:
            handle.wait_committed()
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:step 1")
def test_a_part_of_a_tensor_that_is_freed_is_not_read(tmp_path: Path) -> None:
    first, second = run_ranks(2, frees_what_two_ranks_share, str(tmp_path))
    assert "rank 1: the memory of model.weight was freed" in first
    assert "the memory of model.weight was freed" in second
