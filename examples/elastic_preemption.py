r"""A rank whose machine will be taken away hands over and goes; the others go on, bit for bit.

    planaria run -n 3 elastic=session elastic.policy=shrink --run runs/preempted \
        -- examples/elastic_preemption.py runs/preempted --notice 1

prints

    step  20  loss 3.2617  on 3 ranks
    going on from step 31 on 2 ranks, without 1
    step  40  loss 0.8948  on 2 ranks
    step  60  loss 1.4242  on 2 ranks
    step  60, parameters 1c4088cf1781b242

and the same losses and digest without `--notice`. Here a file is the notice, which the first rank
writes at step 30; SIGTERM to a rank, SLURM's signal and a cloud's address are others, see
`planaria.elastic.preemption`. Nothing is lost, so nothing is repeated: what rank 1 had of the
optimizer's state goes to the others at the boundary of the step; its log says that it has gone.
"""

import argparse
import hashlib
import os
from pathlib import Path

import torch
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

from planaria.elastic import GlobalBatch, Session
from planaria.elastic.preemption import Notices, OnFile


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--notice", type=int, default=None, help="a rank, at step 30")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs = torch.randn(1200, 16)
    dataset = TensorDataset(inputs, inputs.sin().sum(1, keepdim=True))
    data = GlobalBatch(dataset, batch_size=96, micro_batch_size=8)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(64, 1)
    )
    optim = torch.optim.AdamW(model.parameters(), lr=3e-3)

    args.out.mkdir(parents=True, exist_ok=True)
    mine = args.out / f"notice-{os.environ.get('RANK', '0')}"
    with (
        Notices(OnFile(mine, grace_s=30)) as notices,
        Session(
            model, optim, data, steps=args.steps, clip_grad_norm=1.0, notices=notices
        ) as session,
    ):
        for step in session:
            first = session.view.rank == 0
            if first and step.number == 30 and args.notice is not None:
                (args.out / f"notice-{args.notice}").touch()
            with step:
                for x, y in step.micro_batches():
                    step.backward(mse_loss(model(x), y))
            if step.committed and first and (step.number + 1) % 20 == 0:
                print(
                    f"step {step.number + 1:3}  loss {step.metrics['loss']:.4f}  "
                    f"on {session.view.world_size} ranks",
                    flush=True,
                )
    if session.left:
        print(f"rank {session.view.me} has handed over and goes", flush=True)
    elif session.view.rank == 0:
        digest = hashlib.sha256()
        for parameter in model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        print(f"step {args.steps:3}, parameters {digest.hexdigest()[:16]}")


if __name__ == "__main__":
    main()
