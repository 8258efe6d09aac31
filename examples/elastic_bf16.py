r"""A bfloat16 transformer with a sharded optimizer (ZeRO-2, float32 masters) as a session.

    planaria run -n 4 elastic=session --run runs/bf16 -- examples/elastic_bf16.py

prints

    step  10  loss 9.7314  held out 7.9512  on 4 ranks
    ...
    step  60  loss 2.1308  held out 1.6825  on 4 ranks
    step  60, parameters d6905b963c24cc40

and the same numbers on any number of ranks: each keeps about a quarter of the state of the
optimizer, and a second copy of as much of another one. Micro-batches have unequal numbers of
tokens: each one counts by its tokens (`weight=`). Evaluation is inside the loop, and draws no
random numbers from training.
"""

import argparse
import hashlib

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import TensorDataset

from planaria.elastic import GlobalBatch, Session

LENGTH, VOCABULARY, PAD = 32, 40, 0


class Model(nn.Module):
    """A small transformer with tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(
            tokens.shape[1], dtype=self.embed.weight.dtype
        )
        return self.head(self.body(self.embed(tokens), mask=mask, is_causal=True))


def sequences(count: int) -> torch.Tensor:
    """Counting in steps of one to three, padded to one length."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.full((count, LENGTH), PAD)
    for row in rows:
        start, by, length = (
            int(torch.randint(low, high, (), generator=generator))
            for low, high in ((1, VOCABULARY), (1, 4), (8, LENGTH + 1))
        )
        row[:length] = 1 + (start + by * torch.arange(length)) % (VOCABULARY - 1)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = sequences(1056)
    held_out = rows[-32:]
    data = GlobalBatch(TensorDataset(rows[:-32]), batch_size=64, micro_batch_size=8)
    model = Model().to(torch.bfloat16)
    optim = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sched = CosineAnnealingLR(optim, args.steps)

    def loss_of(batch: torch.Tensor) -> tuple[torch.Tensor, int]:
        logits, targets = model(batch[:, :-1]), batch[:, 1:]
        tokens = int((targets != PAD).sum())
        loss = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=PAD)
        return loss, tokens

    with Session(
        model, optim, data, steps=args.steps, scheduler=sched, clip_grad_norm=1.0, zero_stage=2
    ) as session:
        for step in session:
            with step:
                for (batch,) in step.micro_batches():
                    loss, tokens = loss_of(batch)
                    step.backward(loss, weight=tokens)
            if step.committed and (step.number + 1) % 10 == 0 and session.view.rank == 0:
                model.eval()
                with torch.no_grad():
                    evaluated = loss_of(held_out)[0].item()
                model.train()
                print(
                    f"step {step.number + 1:3}  loss {step.metrics['loss']:.4f}  "
                    f"held out {evaluated:.4f}  on {session.view.world_size} ranks",
                    flush=True,
                )
        rank = session.view.rank
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().view(torch.int16).numpy().tobytes())
    if rank == 0:
        print(f"step {args.steps:3}, parameters {digest.hexdigest()[:16]}")


if __name__ == "__main__":
    main()
