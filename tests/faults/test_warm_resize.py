"""FSDP2 under a launcher that starts all ranks again: at another size, out of the nodes' memory."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsdp_job import train
from launches import run
from memory_jobs import runtime_folder
from ranks import run_ranks, try_ranks
from source_tree import ROOT

DIES_AT, LAST = 3, 6


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path) -> Iterator[Path]:
    with runtime_folder(tmp_path / "runtime") as folder:
        yield folder


@pytest.mark.soak
def test_fsdp2_goes_on_from_memory_with_fewer_ranks(tmp_path: Path) -> None:
    """The losses are those of a run of that size that was restored from storage."""
    root = str(tmp_path / "ckpt")
    assert try_ranks(4, train, root, LAST, DIES_AT)[1].exitcode == -9
    (warm, *_) = run_ranks(3, train, root, LAST)
    (cold, *_) = run_ranks(3, train, root, LAST, None, True)
    assert (warm["tier"], warm["step"]) == ("memory", DIES_AT)
    assert (cold["tier"], cold["step"]) == ("durable", DIES_AT)
    assert len(warm["losses"]) == LAST - DIES_AT
    assert warm["losses"] == cold["losses"]


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [3, 2])
def test_fsdp2_under_torchrun_goes_on_from_memory_with_fewer_ranks(
    tmp_path: Path, ranks: int
) -> None:
    def torchrun(size: int, *args: str) -> str:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(size), str(ROOT / "tests/support/fsdp_job.py"), str(tmp_path / "ckpt"), str(LAST),
            *args,
        ]  # fmt: skip
        ended = run(command, tmp_path, OMP_NUM_THREADS="1")
        assert bool(ended.code) is ("--die-at" in args), ended.err + ended.out
        return ended.out

    torchrun(4, "--die-at", str(DIES_AT))
    warm, cold = torchrun(ranks), torchrun(ranks, "--storage")
    assert f"'tier': 'memory', 'step': {DIES_AT}" in warm
    assert warm.replace("'memory'", "'durable'") == cold
