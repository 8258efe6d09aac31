r"""A worker is killed; torchrun starts the group again; it goes on from memory, bit for bit.

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 \
    torchrun --standalone --nproc-per-node 4 --max-restarts 1 examples/warm_restart.py runs/warm \
        --nodes 4 --losses 2 --kill 1 2

prints

    4 ranks, from the start
    rank 1 and its node are killed
    rank 2 and its node are killed
    4 ranks, from step 30, out of memory
    step 60, parameters <their digest>

and the same digest without `--kill`. Each step leaves a snapshot in the memory of the nodes, with
parity; nothing is written to storage. Here four nodes are played by four processes of one machine:
with `--kill` a rank takes the snapshot process of its node along. torch 2.13 shares its store
between the lives of a group unless it is told not to, as above: then torch's own process group may
find the addresses of ranks that are gone, and fail.
"""

import argparse
import hashlib
import os
import signal

import torch
import torch.distributed as dist
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from planaria.checkpoint import Checkpointer, MemoryTier, mark_communication
from planaria.checkpoint.memory.runtime import places


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--losses", type=int, default=0)
    parser.add_argument("--kill", type=int, nargs="*", default=[], help="ranks, in mid-run")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    node = f"node{rank * args.nodes // size}"

    torch.manual_seed(0)
    layers = [torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)]
    model = DistributedDataParallel(torch.nn.Sequential(*layers), find_unused_parameters=True)
    mark_communication(model)  # what nodes send each other waits for the gradients
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    memory = MemoryTier(budget=64 << 20, losses=args.losses, node=node)

    with Checkpointer(args.out, {"model": model, "optim": optim}, memory=memory) as ckpt:
        report = ckpt.restore()
        first = report.step if report else 0
        if rank == 0:
            source = f"step {first}, out of {report.tier}" if report else "the start"
            print(f"{size} ranks, from {source}", flush=True)
        for step in range(first, args.steps):
            inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(step * size + rank))
            optim.zero_grad()
            mse_loss(model(inputs), inputs.sum(1, keepdim=True)).backward()
            optim.step()
            ckpt.step(step + 1)
            if step + 1 == args.steps // 2 and report is None and args.kill:
                assert ckpt.last_snapshot is not None
                ckpt.last_snapshot.wait_in_memory()
                dist.barrier()
                if rank in args.kill:
                    lose(rank, node if args.nodes > 1 else None)
    if rank == 0:
        data = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
        print(f"step {args.steps}, parameters {hashlib.sha256(data).hexdigest()[:8]}")
    dist.destroy_process_group()


def lose(rank: int, node: str | None) -> None:
    """Kills this rank, and the snapshot process of its node."""
    print(f"rank {rank} {'and its node are' if node else 'is'} killed", flush=True)
    for info in filter(None, (place.info() for place in places())):
        if info.node == node and info.alive:
            os.kill(info.process.pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
