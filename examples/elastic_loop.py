r"""A loop of your own that loses a rank and goes on, bit for bit.

    planaria run -n 4 elastic=session --run runs/elastic -- examples/elastic_loop.py --kill 1

prints

    step  20  loss 3.2617  on 4 ranks
    step  40  loss 0.8948  on 3 ranks
    step  60  loss 1.4242  on 3 ranks
    step  60, parameters 1c4088cf1781b242

and the same losses and digest without `--kill`, with any `-n` from 1 to 12, and without
`planaria run`. Rank 1 is killed (SIGKILL) at step 30. The others go on from the same step without
it; another rank takes its place when it is ready, if the run lasts until then. (Digests are of one
kind of processor and one version of torch.)
"""

import argparse
import hashlib
import os
import signal

import torch
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

from planaria.elastic import GlobalBatch, Session


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kill", type=int, default=None, help="a rank, at step 30")
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

    with Session(model, optim, data, steps=args.steps, clip_grad_norm=1.0) as session:
        for step in session:
            if step.number == 30 and session.view.me == args.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            with step:
                for x, y in step.micro_batches():
                    step.backward(mse_loss(model(x), y))
            if step.committed and session.view.rank == 0 and (step.number + 1) % 20 == 0:
                print(
                    f"step {step.number + 1:3}  loss {step.metrics['loss']:.4f}  "
                    f"on {session.view.world_size} ranks",
                    flush=True,
                )
        rank = session.view.rank
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    if rank == 0:
        print(f"step {args.steps:3}, parameters {digest.hexdigest()[:16]}")


if __name__ == "__main__":
    main()
