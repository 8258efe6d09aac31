"""Planaria in a loop of your own: a line to make the checkpointer, three to use it.

    python examples/plain_loop.py runs/plain

prints

    from the start
    step  50  loss 21.2967
    step 100  loss 2.9277
    step 150  loss 0.5512
    step 200  loss 0.0606

and the same command again

    from step 200

Press Ctrl-C in between: it saves, ends, and goes on from there the next time.
"""

import sys

import torch
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

from planaria import Checkpointer, GlobalBatch


def main(out: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(1000, 8)
    data = GlobalBatch(TensorDataset(inputs, inputs @ torch.arange(8.0)), batch_size=50,
                       micro_batch_size=50, steps=200)  # fmt: skip
    model = torch.nn.Linear(8, 1)
    optim = torch.optim.SGD(model.parameters(), lr=0.01)
    sched = torch.optim.lr_scheduler.ConstantLR(optim, factor=1.0)

    state = {"model": model, "optim": optim, "sched": sched, "data": data}
    with Checkpointer(out, state, every=50, keep=3) as ckpt:
        report = ckpt.restore()
        print(f"from step {report.step}" if report else "from the start")
        for step, (x, y) in enumerate(data, start=report.step if report else 0):
            optim.zero_grad()
            loss = mse_loss(model(x).squeeze(1), y)
            loss.backward()
            optim.step()  # waits by itself for what is not copied yet
            sched.step()
            ckpt.step(step + 1, {"loss": loss.item()})
            if (step + 1) % 50 == 0:
                print(f"step {step + 1:3}  loss {loss.item():.4f}")
            if ckpt.should_stop:
                break


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/plain")
