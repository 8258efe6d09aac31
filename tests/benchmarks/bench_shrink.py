"""Throughput of a session after one of 4 ranks was lost, over 3/4 of what it was before.

The same global batch is then shared by 3 ranks: a step takes 4/3 of the time if the micro-batches
divide, and if what is added up between ranks stays hidden. Computing is emulated by a wait in each
micro-batch, added to a real forward and backward pass (*emulated compute*): ranks that share cores
would gain by having fewer of them. The losses are compared with those of one rank, bit for bit.

Run: ``make bench SUITE=shrink``, or
``python tests/benchmarks/bench_shrink.py [--micro-batches 12,24] [--wait 0.1] [--steps 8]``.
"""

import argparse
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from timing import Goal, NotMeasured, machine, publish_tables

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from members import LocalMembers
from ranks import run_ranks, stop_server

from planaria.elastic import GlobalBatch, Session
from planaria.elastic.membership import Alone, connect
from planaria.launch.demo.model import ModelConfig, Transformer

VOCABULARY, LENGTH, WORLD = 256, 32, 4
Steps = list[tuple[int, float, float]]


class Texts:
    """Random tokens."""

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, VOCABULARY, (LENGTH + 1,), generator=generator)


def train(membership: Any, micro_batches: int, wait: float, steps: int, dim: int) -> Steps:
    """Number, seconds and loss of each step; member 3 is lost in the middle."""
    config = ModelConfig(
        vocab_size=VOCABULARY, dim=dim, layers=2, heads=4, ffn_dim=4 * dim,
        max_seq_len=LENGTH, dropout=0.1, tie_embeddings=True, seed=1,
    )  # fmt: skip
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = GlobalBatch(Texts(), micro_batches, 1, seed=1)
    seen: Steps = []
    with Session(model, optimizer, data, steps=steps, clip_grad_norm=1.0,
                 membership=membership) as session:  # fmt: skip
        begun = time.perf_counter()
        for step in session:
            with step:
                for batch in step.micro_batches():
                    if membership.id == WORLD - 1 and step.number == steps // 2:
                        os.kill(os.getpid(), signal.SIGKILL)
                    time.sleep(wait)
                    step.backward(model(batch[:, :-1], batch[:, 1:]).loss)
            if step.committed:
                now = time.perf_counter()
                seen.append((step.number, now - begun, step.metrics["loss"]))
                begun = now
    return seen


def alone(rank: int, *args: Any) -> Steps:
    """The same on one rank, which nothing happens to."""
    return train(Alone(), *args)


def member(me: int, *args: Any) -> Steps:
    """One of several."""
    return train(connect(), *args)


def measure(micro_batches: int, wait: float, steps: int, dim: int) -> dict[str, Any]:
    """One run: seconds of a step before and after the loss, and the pause."""
    (reference,) = run_ranks(1, alone, micro_batches, 0.0, steps, dim, init_group=False)
    with LocalMembers(WORLD, member, micro_batches, wait, steps, dim, timeout=500) as job:
        results = job.wait()
    seen: Steps = results[0].value
    if [(n, loss) for n, _, loss in seen] != [(n, loss) for n, _, loss in reference]:
        raise NotMeasured(f"{micro_batches} micro-batches: losses are not those of one rank")
    at = steps // 2
    # Not the first step of either part: what is made once is made in it.
    before = statistics.median(seconds for n, seconds, _ in seen if 1 <= n < at)
    after = statistics.median(seconds for n, seconds, _ in seen if n > at)
    return {"micro-batches": micro_batches, "step s, 4 ranks": before, "step s, 3 ranks": after,
            "step with the loss s": seen[at][1], "ratio": before / after / 0.75}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--micro-batches", default="12,24")
    parser.add_argument("--wait", type=float, default=0.1, help="seconds in each micro-batch")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dim", type=int, default=128)
    args = parser.parse_args()
    started = machine()
    rows: list[dict[str, Any]] = []
    goals: list[Goal] = []
    for count in map(int, args.micro_batches.split(",")):
        turns = [measure(count, args.wait, args.steps, args.dim) for _ in range(args.turns)]
        rows += turns
        ratio = statistics.median(turn["ratio"] for turn in turns)
        goals.append(
            Goal(f"{count} micro-batches: throughput after / (3/4 of before)", ratio, 0.95, 1.0)
        )
    title = f"A step before and after 1 of {WORLD} ranks is lost (emulated compute)"
    publish_tables("shrink", [(title, rows)], vars(args), goals=goals, started=started)
    stop_server()


if __name__ == "__main__":
    main()
