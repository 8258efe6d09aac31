"""An FSDP2 job with snapshots in memory: it dies, is started at another size, and goes on.

Also a script, for torchrun: ``fsdp_job.py ROOT LAST [--die-at STEP] [--storage]``.
"""

import argparse
import os
import signal
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import mse_loss

from planaria.checkpoint import Checkpointer, MemoryTier

#: Samples of a step, on all ranks together: 4, 3 and 2 ranks share them evenly.
BATCH = 12


def train(
    rank: int, root: str, last: int, die_at: int | None = None, storage: bool = False
) -> dict[str, Any]:
    """The body of a rank.

    Args:
        rank: This rank.
        root: The checkpoint root.
        last: Where to stop.
        die_at: After this step all is saved, in memory and in storage, and rank 1 kills itself.
        storage: Whether to go on from storage, without a memory tier.

    Returns:
        Where it went on from ("tier" and "step"), and the "losses" since, to the last bit.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    size = dist.get_world_size()
    torch.manual_seed(rank)  # what is restored must not depend on it
    model = torch.nn.Sequential(torch.nn.Linear(16, 30), torch.nn.Tanh(), torch.nn.Linear(30, 1))
    mesh = init_device_mesh("cpu", (size,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    memory = None if storage else MemoryTier(
        budget=16 << 20, node=f"n{rank % 2}", losses=1, idle_s=600, timeout_s=60
    )  # fmt: skip
    losses: list[str] = []
    with Checkpointer(root, {"model": model, "optim": optim}, memory=memory) as ckpt:
        report = ckpt.restore()
        for step in range(report.step if report else 0, last):
            generator = torch.Generator().manual_seed(step)
            inputs = torch.randn(BATCH, 16, generator=generator)[rank::size]
            optim.zero_grad()
            loss = mse_loss(model(inputs), inputs.sum(1, keepdim=True))
            loss.backward()
            optim.step()
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses.append(float(total).hex())
            ckpt.step(step + 1)
            if step + 1 == die_at:
                handle = ckpt.save(step + 1)
                handle.wait_committed()
                handle.wait_in_memory()
                dist.barrier()
                if rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
        if ckpt.last_snapshot is not None:
            ckpt.last_snapshot.wait_in_memory()
    found = {"tier": None, "step": 0} if report is None else {
        "tier": report.tier, "step": report.step
    }  # fmt: skip
    return {**found, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("last", type=int)
    parser.add_argument("--die-at", type=int)
    parser.add_argument("--storage", action="store_true")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    found = train(dist.get_rank(), args.root, args.last, args.die_at, args.storage)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks: {found}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
