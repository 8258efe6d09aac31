"""What ranks owe each other when one fails, and names that must not depend on the moment."""

import contextlib
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from planaria.checkpoint import Checkpointer
from planaria.checkpoint.state.stateset import StateSet
from planaria.core import points
from planaria.errors import RootError, SaveFailedError


def save_wide(rank: int, root: Path) -> None:
    """Saves a tensor of few long rows, which replicas cut along its columns."""
    torch.manual_seed(0)
    with Checkpointer(root, {"model": nn.Linear(400_000, 3, bias=False)}, audit=True) as ckpt:
        ckpt.save(1).wait_committed()


def test_columns_of_a_replica_are_not_taken_for_torn(tmp_path: Path) -> None:
    run_ranks(2, save_wide, tmp_path)
    assert len(list(tmp_path.glob("step-00000001/*.safetensors"))) == 2


def restore_unlisted(rank: int, root: Path) -> str:
    """Rank 0 cannot list the folder; returns what this rank is told."""
    with Checkpointer(root, {"model": nn.Linear(2, 2)}) as ckpt:
        if rank == 0:

            def unreadable(path: str = "") -> list[str]:
                raise OSError(5, "unreadable")

            ckpt._job.options.root.storage.list = unreadable  # type: ignore[method-assign]
        said = ""
        try:
            ckpt.restore()
        except RootError as error:
            said = str(error)
        dist.barrier()
        return said


def test_all_ranks_learn_that_rank_0_cannot_list_the_steps(tmp_path: Path) -> None:
    assert all("unreadable" in said for said in run_ranks(2, restore_unlisted, tmp_path))


def save_on_full_disk(rank: int, root: Path) -> list[str]:
    """Only rank 0's disk is full; returns the data files that are left."""
    torch.manual_seed(0)
    with Checkpointer(root, {"model": nn.Linear(1024, 1024)}, on_failure="fatal") as ckpt:
        if rank == 0:
            points.arm("enospc@checkpoint.write.chunk")
        with contextlib.suppress(SaveFailedError):
            ckpt.save(1).wait_committed()
        points.disarm()
        ckpt._failures.take()
        dist.barrier()
        return [str(path) for path in root.glob("step-*/*")]


def test_a_failed_save_leaves_no_data_on_a_full_disk(tmp_path: Path) -> None:
    assert run_ranks(2, save_on_full_disk, tmp_path) == [[], []]


def names_after_evaluation(rank: int) -> list[list[str]]:
    """Names of the state before and after a forward without a backward, optimizer first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optim = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optim.step()
    state = StateSet({"optim": optim, "model": model})
    before = sorted(state.collect().tensors)
    with torch.no_grad():
        model(torch.ones(1, 4))
    return [before, sorted(state.collect().tensors)]


def test_optimizer_names_do_not_depend_on_what_fsdp_left_unsharded() -> None:
    for before, after in run_ranks(2, names_after_evaluation):
        assert after == before
        assert "optim.0.weight.exp_avg" in after
