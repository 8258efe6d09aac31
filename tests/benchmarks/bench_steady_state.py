"""Steps per second of a session in which nothing happens, against plain DDP and AdamW.

The same model, the same micro-batches on the same ranks, in turn in one run: DDP accumulates
locally and all-reduces in its last backward; a session adds up along its tree, votes, updates
blocks on owners and shadows, and spreads them. The session's losses are compared with those of one
rank, bit for bit, and with DDP's, about.

Run: ``make bench SUITE=steady_state``, or
``python tests/benchmarks/bench_steady_state.py [--worlds 2,4] [--turns 7]``.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timing import Goal, NotMeasured, Turns, machine, publish_tables, rows_of
from torch.nn.parallel import DistributedDataParallel

from planaria.elastic import GlobalBatch, Session
from planaria.elastic.membership import Alone, View, connect
from planaria.launch.demo.model import ModelConfig, Transformer

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from ranks import run_ranks

VOCABULARY, MICRO_BATCHES, PER_TURN = 512, 8, 2
DDP, SESSION, BARE = "DDP + AdamW", "planaria", "planaria, redundancy=0"


class Texts:
    """Random tokens."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, VOCABULARY, (self.length + 1,), generator=generator)


class Job:
    """A model, its optimizer and its data."""

    def __init__(self, dim: int, layers: int, length: int) -> None:
        config = ModelConfig(
            vocab_size=VOCABULARY, dim=dim, layers=layers, heads=4, ffn_dim=4 * dim,
            max_seq_len=length, dropout=0.0, tie_embeddings=True, seed=1,
        )  # fmt: skip
        self.model: torch.nn.Module = Transformer(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.data = GlobalBatch(Texts(length), 2 * MICRO_BATCHES, 2, seed=1)


class Plain(Job):
    """What a user of DDP writes."""

    def start(self, rank: int, world: int) -> None:
        self.rank, self.world, self.number = rank, world, 0
        self.wrapped = DistributedDataParallel(self.model)

    def step(self) -> float:
        share = self.data.assign(self.rank, self.world)
        self.optimizer.zero_grad()
        total = 0.0
        for i, batch in self.data.micro_batches(self.number, self.rank, self.world):
            last = i == share[-1]
            with contextlib.nullcontext() if last else self.wrapped.no_sync():
                loss = self.wrapped(batch[:, :-1], batch[:, 1:]).loss
                (loss * (self.world / MICRO_BATCHES)).backward()
            total += loss.item() / MICRO_BATCHES
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.number += 1
        mean = torch.tensor(total)
        dist.all_reduce(mean)
        return mean.item()


class Elastic(Job):
    """What a user of sessions writes."""

    def start(self, membership: Any, **options: Any) -> None:
        self.session = Session(self.model, self.optimizer, self.data, steps=1 << 30,
                               clip_grad_norm=1.0, membership=membership, **options)  # fmt: skip
        self.session.__enter__()
        self.steps = iter(self.session)

    def step(self) -> float:
        step = next(self.steps)
        with step:
            for batch in step.micro_batches():
                step.backward(self.model(batch[:, :-1], batch[:, 1:]).loss)
        return step.metrics["loss"]


def alone(rank: int, count: int, shape: tuple[int, int, int]) -> list[float]:
    """The losses of one rank."""
    job = Elastic(*shape)
    job.start(Alone())
    return [job.step() for _ in range(count)]


def one_rank(
    rank: int, turns: int, shape: tuple[int, int, int]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and losses of each way, in turn; each turn counts until the last rank is done."""
    plain = Plain(*shape)
    plain.start(rank, dist.get_world_size())
    jobs: dict[str, Plain | Elastic] = {DDP: plain}
    for name, redundancy in ((SESSION, 1), (BARE, 0)):
        job = jobs[name] = Elastic(*shape)
        job.start(Prefixed(connect(), name), redundancy=redundancy)
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    losses: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(-1, turns):
        for name, job in jobs.items():
            dist.barrier()
            start = time.perf_counter()
            losses[name] += [job.step() for _ in range(PER_TURN)]
            dist.barrier()
            if turn >= 0:
                seconds[name].append((time.perf_counter() - start) / PER_TURN)
    return seconds, losses


class Prefixed:
    """A membership whose stores are its own: two sessions run side by side here."""

    def __init__(self, membership: Any, name: str) -> None:
        self._membership, self._name = membership, name

    def join(self, facts: Any, deadline: Any) -> View:
        return self._membership.join({}, deadline)  # what differs here is meant to

    def store(self, view: Any, name: str = "") -> Any:
        return self._membership.store(view, f"{self._name}/{name}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._membership, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--worlds", default="2,4")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args()
    started = machine()
    shape = args.dim, args.layers, args.length
    count = PER_TURN * (args.turns + 1)
    (reference,) = run_ranks(1, alone, count, shape, timeout=900, init_group=False)
    tables: list[tuple[str, list[dict[str, Any]]]] = []
    goals: list[Goal] = []
    for world in map(int, args.worlds.split(",")):
        seconds, losses = run_ranks(world, one_rank, args.turns, shape, timeout=900)[0]
        for name in (SESSION, BARE):
            if losses[name] != reference:
                raise NotMeasured(f"{name}, {world} ranks: losses are not those of one rank")
        worst = max(abs(a - b) for a, b in zip(losses[DDP], reference, strict=True))
        if worst > 1e-2:
            raise NotMeasured(f"DDP's losses differ by {worst:g}: it computes something else")
        turns = Turns(seconds)
        tables.append((f"Seconds of a step, {world} ranks (measured)", rows_of(turns, DDP)))
        ratio = turns.ratio(DDP, SESSION)["median"]
        goals.append(Goal(f"{world} ranks: steps/s over DDP's", ratio, 0.85, 0.95))
    publish_tables("steady_state", tables, vars(args), goals=goals, started=started)


if __name__ == "__main__":
    main()
