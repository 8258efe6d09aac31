"""Pre-training with DDP under stock torchrun, with checkpoints that load on any number of ranks.

    torchrun --nproc-per-node 2 examples/pretrain.py --out runs/pretrain

prints something like this (losses depend on the sources of your Python, which are the text)

    2 ranks, from the start
    step  10/60  loss 4.0244
    step  20/60  loss 3.3973
    ...
    step  60/60  loss 2.7791

End it with Ctrl-C, kill -9 a rank, or raise --steps: the same command goes on from the newest
checkpoint. So does another --nproc-per-node: the batches and the state stay the same.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from planaria import Checkpointer, GlobalBatch
from planaria.launch.demo.model import ModelConfig, Transformer
from planaria.launch.demo.text import TextWindows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", default="runs/pretrain", help="folder of the checkpoints")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    args = parser.parse_args()

    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    first = dist.get_rank() == 0

    data = GlobalBatch(TextWindows(), batch_size=16, micro_batch_size=4, steps=args.steps)
    model = DistributedDataParallel(Transformer(ModelConfig()).to(device))
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)

    state = {"model": model, "optim": optim, "data": data}
    with Checkpointer(args.out, state, every=args.every, keep=3) as ckpt:
        report = ckpt.restore()
        if first:
            start = f"from step {report.step}" if report else "from the start"
            print(f"{dist.get_world_size()} ranks, {start}", flush=True)
        for step, batch in enumerate(data, start=report.step if report else 0):
            tokens, targets = (part.to(device) for part in batch)
            optim.zero_grad()
            loss = model(tokens, targets).loss
            loss.backward()
            optim.step()
            ckpt.step(step + 1)
            if (step + 1) % 10 == 0:
                dist.all_reduce(mean := loss.detach() / dist.get_world_size())
                if first:
                    print(f"step {step + 1:3}/{args.steps}  loss {mean.item():.4f}", flush=True)
            if ckpt.should_stop:
                break
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
