"""GRPO on CPU, trainer and rollouts apart: 2 rollout processes follow the trainer over 100 Mb/s.

    python examples/rl_grpo_sync.py [--steps 60] [--plot grpo.png]

A small transformer is first trained on sums ("17+25=042") until it answers some of them, then
improved by GRPO (group-relative policy optimization, Shao et al. 2024, arXiv:2402.03300: the
advantage of an answer is its reward against those of its own group) with a reward that is checked:
1 if the sum is right. Each step the rollouts get the trainer's weights in bf16 over TCP, at an
emulated 100 Mb/s, answer the prompts, and stamp their answers with the version.
"""

import argparse
import multiprocessing
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from planaria.core import wire
from planaria.core.deadline import Deadline
from planaria.launch.demo.model import ModelConfig, Transformer
from planaria.rl_sync import Publisher, PublishReport, Subscriber

SYMBOLS = "0123456789+=\n"
PROMPT, ANSWER = 6, 4  # "17+25=" and "042\n": three digits, so that all are of one length
GROUP, PROMPTS, ROLLOUTS = 16, 24, 2
LINK = 12.5e6  # bytes a second: 100 Mb/s
WAIT_S = 300.0


def policy() -> Transformer:
    config = ModelConfig(vocab_size=len(SYMBOLS), dim=128, layers=3, heads=4, ffn_dim=384)
    return Transformer(config)


def sums(count: int, generator: torch.Generator) -> Tensor:
    """Prompts and right answers as tokens, int64 of shape (count, PROMPT + ANSWER)."""
    pairs = torch.randint(0, 100, (count, 2), generator=generator).tolist()
    texts = [f"{a:02d}+{b:02d}={a + b:03d}\n" for a, b in pairs]
    return torch.tensor([[SYMBOLS.index(c) for c in text] for text in texts])


@torch.no_grad()
def answer(model: Transformer, prompts: Tensor, generator: torch.Generator | None) -> Tensor:
    """Completed prompts; sampled, or greedy without a generator."""
    tokens = prompts
    for _ in range(ANSWER):
        logits = model(tokens).logits[:, -1].float()
        if generator is None:
            new = logits.argmax(-1, keepdim=True)
        else:
            new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, new], 1)
    return tokens


def rollout(number: int, url: str, port: int) -> None:
    """A rollout process: brings its weights up to date, answers, says with which version."""
    torch.set_num_threads(1)
    model, generator = policy().to(torch.bfloat16), torch.Generator().manual_seed(100 + number)
    with (
        wire.connect("127.0.0.1", port, deadline=Deadline(WAIT_S)) as trainer,
        Subscriber(model, url, worker=f"rollout-{number}") as subscriber,
    ):
        while True:
            request = trainer.recv(Deadline(WAIT_S)).header
            if "version" not in request:
                return
            report = subscriber.update(at_least=request["version"])
            prompts = torch.tensor(request["prompts"]).repeat_interleave(GROUP, 0)
            with subscriber.serving() as version:
                tokens = answer(model, prompts, generator)
            seconds = 0.0 if report is None else report.seconds
            trainer.send({"tokens": tokens.tolist(), "version": version, "seconds": seconds},
                         deadline=Deadline(WAIT_S))  # fmt: skip


def pretrain(model: Transformer, enough: float) -> float:
    """Trains on sums until a share of them is answered rightly; returns the share."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    right = 0.0
    for step in range(3000):
        tokens = sums(256, generator)
        logits = model(tokens[:, :-1]).logits[:, PROMPT - 1 :]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, PROMPT:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            right = accuracy(model)
            if right >= enough:
                break
    return right


def accuracy(model: Transformer) -> float:
    tokens = sums(500, torch.Generator().manual_seed(999))
    return float((answer(model, tokens[:, :PROMPT], None) == tokens).all(1).float().mean())


def grpo_step(model: Transformer, optimizer: Any, tokens: Tensor, rewards: Tensor) -> None:
    """One update; rewards of shape (prompts, GROUP), tokens of shape (prompts * GROUP, length)."""
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    logits = model(tokens[:, :-1]).logits[:, PROMPT - 1 :].float()
    chosen = logits.log_softmax(-1).gather(-1, tokens[:, PROMPT:, None]).squeeze(-1)
    loss = -(advantages.flatten()[:, None] * chosen).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def train(steps: int) -> list[dict[str, float]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, generator = policy(), torch.Generator().manual_seed(1)
    before = pretrain(model, 0.35)
    print(f"after training on text: {before:.0%} of held-out sums are right")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95))
    processes = multiprocessing.get_context("spawn")
    rows: list[dict[str, float]] = []
    with (
        Publisher(model, "tcp://127.0.0.1:0", dtype=torch.bfloat16, rate=LINK) as publisher,
        wire.listen() as listener,
    ):
        workers = [
            processes.Process(target=rollout, args=(i, publisher.url, listener.address[1]))
            for i in range(ROLLOUTS)
        ]
        for worker in workers:
            worker.start()
        links = [listener.accept(Deadline(WAIT_S)) for _ in workers]
        for step in range(steps):
            report: PublishReport = publisher.publish(step)
            sampled = sums(PROMPTS, generator)
            for link, part in zip(links, sampled.chunk(ROLLOUTS), strict=True):
                request = {"version": step, "prompts": part[:, :PROMPT].tolist()}
                link.send(request, deadline=Deadline(WAIT_S))
            answers = [link.recv(Deadline(WAIT_S)).header for link in links]
            assert all(a["version"] == step for a in answers)
            tokens = torch.cat([torch.tensor(a["tokens"]) for a in answers])
            right = (tokens == sampled.repeat_interleave(GROUP, 0)).all(1).float()
            grpo_step(model, optimizer, tokens, right.view(PROMPTS, GROUP))
            rows.append({
                "step": step, "reward": float(right.mean()), "bytes": report.bytes,
                "dense": report.dense_bytes, "update": max(a["seconds"] for a in answers),
            })  # fmt: skip
            if step % 10 == 0 or step == steps - 1:
                print(f"step {step:3}  reward {rows[-1]['reward']:.2f}  version {step}  "
                      f"{report.bytes / 1e3:7.1f} KB of {report.dense_bytes / 1e3:.0f} KB "
                      f"({report.codec})")  # fmt: skip
        for link, worker in zip(links, workers, strict=True):
            link.send({}, deadline=Deadline(WAIT_S))
            worker.join(WAIT_S)
            link.close()
    sent, dense = (sum(r[k] for r in rows[1:]) for k in ("bytes", "dense"))
    print(f"after GRPO: {accuracy(model):.0%}; {dense / sent:.0f}x fewer bytes than dense, which "
          f"at 100 Mb/s saved {ROLLOUTS * (dense - sent) / LINK:.1f} s for {ROLLOUTS} rollouts "
          f"(emulated link)")  # fmt: skip
    return rows


def plot(rows: list[dict[str, float]], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, sharex=True)
    above.plot([r["step"] for r in rows], [r["reward"] for r in rows])
    above.set_ylabel("reward")
    below.semilogy([r["step"] for r in rows], [r["bytes"] / 1e3 for r in rows], label="sent")
    below.semilogy([r["step"] for r in rows], [r["dense"] / 1e3 for r in rows], label="dense")
    below.set_ylabel("KB a version")
    below.set_xlabel("step")
    below.legend()
    figure.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--plot")
    arguments = parser.parse_args()
    started = time.perf_counter()
    history = train(arguments.steps)
    print(f"{time.perf_counter() - started:.0f} s")
    if arguments.plot:
        plot(history, arguments.plot)
