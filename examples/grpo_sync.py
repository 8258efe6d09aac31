"""GRPO with a verifiable reward: a trainer, two rollouts apart, weights over a link of 100 Mb/s.

    python examples/grpo_sync.py [--out runs/grpo]

prints something like this; it needs three minutes of CPU time (here on a machine with much other
work, which the seconds show)

    after 96 s of text: 0.325 of the answers to unseen questions are right, greedily 0.563
    version   20  reward 0.369 (of version 19)  213 KB of 1283 KB (gap_ulp)  0.308 s
    version   40  reward 0.427 (of version 39)  202 KB of 1283 KB (gap_ulp)  0.098 s
    ...
    version  380  reward 0.745 (of version 379)  63 KB of 1283 KB (exponent)  0.458 s
    version  400  reward 0.758 (of version 399)  63 KB of 1283 KB (exponent)  0.447 s
    after 400 updates in 1020 s: 0.722, greedily 0.899
    an update: 127 KB of 1283 KB, 10.1x fewer (18.0% of the weights changed)
    link: 8.1 s instead of 82.1 s dense, 74.0 s saved (bytes / rate; emulated link)
    publish to swapped: 0.270 s (measured, the mean); dense 0.205 s of link alone
    every version was served bit for bit by all rollouts: True
    plot: runs/grpo/grpo_sync.png

A small transformer learns to add two numbers of two digits from text, until it answers some. From
there on it is told only whether an answer was right: GRPO (Z. Shao et al., arXiv:2402.03300) with
groups of 16 answers a question, their rewards normalised within the group, groups without variance
dropped, one step on each batch. The rollouts serve bf16 weights (and compute with them in fp32,
which CPUs do faster), the trainer keeps fp32 masters; each answer is stamped with its version.
Rewards are of questions asked in training, the last lines of a tenth of all that never are.

The link is emulated: the publisher sends through a token bucket of that rate, shared by both
rollouts. "Dense" is the time its bytes would need on that link alone, worked out; what is compared
with it is measured, with all there is to an update. At a rate of learning this high one weight in
six changes in a step; RL of large models changes one in a hundred, and gains more.

`--staleness 0`, the default, gives the same rewards each time on the same machine and versions;
with `--staleness 1` the next batch is generated while the trainer computes.
"""

import argparse
import copy
import hashlib
import multiprocessing
import os
import secrets
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from arithmetic import (
    ANSWER,
    PROMPT,
    answer,
    answers_of,
    grpo_loss,
    learn_from_text,
    new_model,
    prompts_of,
    share_right,
)
from torch import Tensor

from planaria.core import wire
from planaria.core.deadline import Deadline
from planaria.errors import PeerClosedError
from planaria.rl_sync import Publisher, Subscriber
from planaria.rl_sync.reports import PublishReport

WORKERS = 2


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of all weights in bf16."""
    data = [p.detach().to(torch.bfloat16).view(torch.uint8).numpy() for p in model.parameters()]
    return hashlib.sha256(b"".join(map(bytes, data))).hexdigest()


def end_with_parent() -> None:
    """Ends this process when the trainer is gone, whatever it waits for."""
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    trainer.join()
    os._exit(1)


def rollout(
    name: str, url: str, trainer: tuple[str, int], token: bytes, args: argparse.Namespace
) -> None:
    """A process of its own: answers questions with the weights of one version at a time."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    served, computing = new_model(args.dim).bfloat16(), new_model(args.dim)
    with (
        Subscriber(
            served, url, token, worker=name, max_staleness=args.staleness, timeout=args.timeout
        ) as subscriber,
        wire.connect(*trainer, token=token, deadline=Deadline(args.timeout)) as connection,
    ):
        bits, seconds = "", 0.0
        while True:
            try:
                request = connection.recv(Deadline(args.timeout))
            except PeerClosedError:
                return
            # A request is over and the next has not begun: here the weights may be swapped.
            report = subscriber.update(at_least=request.header["at_least"])
            with subscriber.serving() as version:
                if report is not None:
                    computing.load_state_dict(served.state_dict())
                    bits, seconds = fingerprint(served), report.seconds
                prompts = torch.from_numpy(np.frombuffer(request.payloads[0], np.uint8).copy())
                prompts = prompts.view(-1, PROMPT).long()
                generator = torch.Generator().manual_seed(request.header["seed"])
                given, logp = answer(computing, prompts, generator)
            connection.send(
                {"version": version, "bits": bits, "seconds": seconds},
                [given.to(torch.uint8).numpy().data, logp.numpy().data],
                deadline=Deadline(args.timeout),
            )


class Batch(NamedTuple):
    """What the rollouts made of one batch of questions."""

    text: Tensor
    old: Tensor
    rewards: Tensor
    versions: list[int]
    bits: list[str]
    seconds: float


class Rollouts:
    """The trainer's side of the rollout processes: asks each for its part of a batch."""

    def __init__(
        self, listener: wire.Listener, url: str, token: bytes, args: argparse.Namespace
    ) -> None:
        self._args = args
        context = multiprocessing.get_context("spawn")
        self._processes = [
            context.Process(
                target=rollout,
                args=(f"rollout-{i}", url, listener.address, token, args),
                daemon=True,
            )
            for i in range(WORKERS)
        ]
        for process in self._processes:
            process.start()
        self._connections = [listener.accept(Deadline(args.timeout)) for _ in self._processes]
        self._asked: list[Tensor] = []

    def ask(self, questions: Tensor, at_least: int, seed: int) -> None:
        """Asks for a group of answers to each question, by weights of this version or a newer."""
        repeated = questions.repeat_interleave(self._args.group)
        self._asked.append(repeated)
        for i, part in enumerate(repeated.chunk(WORKERS)):
            header = {"at_least": at_least, "seed": WORKERS * seed + i}
            tokens = prompts_of(part).to(torch.uint8).numpy().data
            self._connections[i].send(header, [tokens], deadline=Deadline(self._args.timeout))

    def take(self) -> Batch:
        """Waits for the answers to what was asked first."""
        questions = self._asked.pop(0)
        got = [c.recv(Deadline(self._args.timeout)) for c in self._connections]
        given, old = (
            torch.cat([torch.from_numpy(np.frombuffer(m.payloads[k], t).copy()) for m in got])
            for k, t in enumerate((np.uint8, np.float32))
        )
        given, old = given.view(-1, ANSWER).long(), old.view(-1, ANSWER)
        right = (given == answers_of(questions)).all(1).float()
        headers = [m.header for m in got]
        return Batch(
            torch.cat([prompts_of(questions), given], 1), old, right,
            [h["version"] for h in headers], [h["bits"] for h in headers],
            max(h["seconds"] for h in headers),
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections:
            connection.close()  # that is how a rollout hears that it is over
        for process in self._processes:
            process.join(30)
            if process.is_alive():
                process.kill()


class Figures:
    """What came of each update, and what is made of that in the end."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self.rewards: list[float] = []
        self.published: list[PublishReport] = []
        self.seconds: list[float] = []  # publishing, and the slower rollout's update
        self.unequal: list[int] = []  # versions that a rollout served with other bits

    def line(self, versions: list[int]) -> str:
        """The last 20 updates."""
        last = self.published[-1]
        size = np.mean([p.bytes for p in self.published[-20:]])
        served = "-".join(str(v) for v in sorted(set(versions)))
        return (
            f"version {last.version:4}  reward {np.mean(self.rewards[-20:]):.3f} (of version "
            f"{served})  {size / 1e3:.0f} KB of {last.dense_bytes / 1e3:.0f} KB ({last.codec})  "
            f"{np.mean(self.seconds[-20:]):.3f} s"
        )

    def dense_seconds(self) -> float:
        """What the link alone needs for the weights of all rollouts."""
        return WORKERS * self.published[0].dense_bytes / self._rate

    def summary(self) -> str:
        deltas = [p for p in self.published if p.base_version is not None]
        size, dense = np.mean([p.bytes for p in deltas]), deltas[0].dense_bytes
        changed = np.mean([2 * p.changed / p.dense_bytes for p in deltas])
        link = len(deltas) * self.dense_seconds()
        return (
            f"an update: {size / 1e3:.0f} KB of {dense / 1e3:.0f} KB, {dense / size:.1f}x fewer "
            f"({changed:.1%} of the weights changed)\n"
            f"link: {link * size / dense:.1f} s instead of {link:.1f} s dense, "
            f"{link * (1 - size / dense):.1f} s saved (bytes / rate; emulated link)\n"
            f"publish to swapped: {np.mean(self.seconds):.3f} s (measured, the mean); dense "
            f"{self.dense_seconds():.3f} s of link alone\n"
            f"every version was served bit for bit by all rollouts: {not self.unequal}"
        )

    def draw(self, path: Path) -> str:
        """Rewards and bytes over the versions; says where the picture is."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return "no plot: it needs matplotlib (pip install 'planaria[bench]')"
        figure = Figure(figsize=(8, 5), layout="tight")
        above, below = figure.subplots(2, sharex=True)
        smooth = np.convolve(self.rewards, np.ones(20) / 20, "valid")
        above.plot(self.rewards, color="lightgrey", label="a batch")
        above.plot(np.arange(len(smooth)) + 19, smooth, label="mean of 20")
        above.set_ylabel("share of right answers")
        above.legend(frameon=False)
        sizes = [p.bytes / 1e3 for p in self.published[1:]]
        below.semilogy(range(1, len(sizes) + 1), sizes, label="sent")
        below.axhline(self.published[0].dense_bytes / 1e3, color="black", ls=":", label="dense")
        below.set_ylabel("KB an update and rollout")
        below.set_xlabel("version")
        below.legend(frameon=False)
        figure.savefig(path, dpi=110)
        return f"plot: {path}"


def improve(
    model: Any, asked: Tensor, rollouts: Rollouts, publisher: Publisher,
    args: argparse.Namespace, figures: Figures,
) -> None:  # fmt: skip
    """The loop: publish, ask, take, learn."""
    reference = copy.deepcopy(model) if args.kl else None
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    generator = torch.Generator().manual_seed(args.seed + 1)
    prints: dict[int, str] = {}

    def publish(version: int) -> None:
        figures.published.append(publisher.publish(version))
        prints[version] = fingerprint(model)

    def ask(batch: int) -> None:
        drawn = asked[torch.randint(len(asked), (args.questions,), generator=generator)]
        rollouts.ask(drawn, max(batch - args.staleness, 0), args.seed + batch)

    publish(0)
    for batch in range(args.staleness):
        ask(batch)
    for version in range(args.steps):
        ask(version + args.staleness)
        batch = rollouts.take()
        if min(batch.versions) < version - args.staleness:
            raise SystemExit(f"batch {version} is of versions {batch.versions}: too old")
        served = zip(batch.versions, batch.bits, strict=True)
        figures.unequal += [v for v, bits in served if prints[v] != bits]
        figures.rewards.append(float(batch.rewards.mean()))
        if version:
            figures.seconds.append(figures.published[-1].seconds + batch.seconds)
        loss = grpo_loss(
            model, batch.text, batch.old, batch.rewards, args.group, reference, args.kl
        )
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (version + 1) / 5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        publish(version + 1)
        if version % 20 == 19:
            print(figures.line(batch.versions), flush=True)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All of it; returns what was reached."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    questions = torch.randperm(10_000)
    asked, held_out = questions[:9000], questions[9000:]
    model = new_model(args.dim)
    started = time.perf_counter()
    learn_from_text(model, asked, args.text_until, args.text_steps, args.seed)
    before = share_right(model, held_out), share_right(model, held_out, greedy=True)
    print(f"after {time.perf_counter() - started:.0f} s of text: {before[0]:.3f} of the answers to "
          f"unseen questions are right, greedily {before[1]:.3f}", flush=True)  # fmt: skip
    figures, token = Figures(args.rate), secrets.token_bytes(16)
    with (
        Publisher(model, "tcp://127.0.0.1:0", token, dtype=torch.bfloat16, rate=args.rate,
                  codec=args.codec, timeout=args.timeout) as publisher,
        wire.listen(token=token) as listener,
        Rollouts(listener, publisher.url, token, args) as rollouts,
    ):  # fmt: skip
        started = time.perf_counter()
        improve(model, asked, rollouts, publisher, args, figures)
    after = share_right(model, held_out), share_right(model, held_out, greedy=True)
    print(f"after {args.steps} updates in {time.perf_counter() - started:.0f} s: {after[0]:.3f}, "
          f"greedily {after[1]:.3f}")  # fmt: skip
    print(figures.summary())
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    print(figures.draw(out / "grpo_sync.png"))
    return {
        "before": before[0], "after": after[0], "first": float(np.mean(figures.rewards[:20])),
        "last": float(np.mean(figures.rewards[-20:])), "unequal": figures.unequal,
        "bytes": float(np.mean([p.bytes for p in figures.published[1:]])),
        "dense": float(figures.published[0].dense_bytes),
    }  # fmt: skip


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", default="runs/grpo", help="folder of the plot")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--questions", type=int, default=64, help="questions of a batch")
    parser.add_argument("--group", type=int, default=16, help="answers to a question")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--kl", type=float, default=0.0, help="pull towards the start")
    parser.add_argument("--staleness", type=int, default=0, help="versions behind, at most")
    parser.add_argument("--rate", type=float, default=12.5e6, help="bytes a second of the link")
    parser.add_argument("--codec", default="auto")
    parser.add_argument("--dim", type=int, default=128, help="width of the model")
    parser.add_argument("--text-until", type=float, default=0.3, help="right answers, of text")
    parser.add_argument("--text-steps", type=int, default=600, help="steps on text, at most")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds, of any wait")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    run(options().parse_args())
