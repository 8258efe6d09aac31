"""rl_end_to_end: from publish() to the last new bit written, over an emulated link.

    python tests/benchmarks/bench_rl_end_to_end.py [--parameters 5e8] [--dense 1e8]

One publisher and one subscriber of one process over TCP on the loopback interface; the link is a
token bucket at the publisher (label: emulated link; everything else is measured). The trainer holds
bf16 weights N(0, 0.02) of which a share changes by an ULP each step, more of the small ones than of
the large ones, as after the burn-in of `bench_rl_codecs`. Dense is the same library with its codec
fixed to `dense`; where it is run with fewer parameters its time is scaled by the bytes, and that is
said. The codecs take turns, and the best of each is taken: other work on the machine, which comes
and goes, hits all of them. "CPU + link" adds the CPU time of both sides to bytes / rate, for
machines on which other work runs; it is worked out, not measured. After each update the weights of
both sides are compared bit for bit.
"""

import argparse
import threading
import time
from contextlib import ExitStack
from math import inf
from typing import Any

import torch
from timing import publish
from torch import nn

from planaria.rl_sync import Publisher, Subscriber
from planaria.rl_sync.transports.tcp import link_bucket

LINKS = {"100 Mb/s": 12.5e6, "1 Gb/s": 125e6, "loopback": None}
WARM_UP = 2


class Weights(nn.Module):
    """Matrices of 16 M elements."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        rows, tile = max(parameters >> 24, 1), min(parameters, 1 << 24)
        self.w = nn.ParameterList(
            nn.Parameter((torch.randn(4096, tile // 4096) * 0.02).bfloat16()) for _ in range(rows)
        )

    def step(self, seed: int, size: float = 1e-6) -> None:
        """What a step of this size on an fp32 master does to the bf16 weights, by chance."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.w[0].shape, generator=generator) * (0.25 * size)
        # Where in its rounding interval the master is.
        place = torch.rand(self.w[0].shape, generator=generator) - 0.5
        with torch.no_grad():
            for i, p in enumerate(self.w):
                bits = p.view(torch.int16)
                ulp = torch.exp2((torch.frexp(p.float())[1] - 8).float())
                move = torch.round(place.roll(i, 0) + noise.roll(7 * i, 1) / ulp).to(torch.int16)
                bits += move


class Pair:
    """A publisher and a subscriber with one codec, and the best of what they measured."""

    def __init__(self, parameters: int, codec: str, rate: float | None, stack: ExitStack) -> None:
        self._model, self._there = Weights(parameters), Weights(parameters)
        self._publisher = stack.enter_context(
            Publisher(self._model, "tcp://127.0.0.1:0", codec=codec)
        )
        self._subscriber = stack.enter_context(Subscriber(self._there, self._publisher.url))
        self._rate, self._turn = rate, 0
        self._publisher.publish(0)
        self._subscriber.update()
        self.best: dict[str, Any] = {"seconds": inf, "cpu": inf, "publish": inf, "update": inf}

    def turn(self) -> None:
        """One update; the first ones warm up, and are not counted."""
        if self._turn == WARM_UP and self._rate is not None:
            limit(self._publisher, self._rate)
        self._turn += 1
        self._model.step(self._turn)
        started, used = time.perf_counter(), time.process_time()
        report = self._publisher.publish(self._turn)
        got = self._subscriber.update(at_least=self._turn)
        seconds, cpu = time.perf_counter() - started, time.process_time() - used
        for a, b in zip(self._model.w, self._there.w, strict=True):
            assert torch.equal(a.view(torch.int16), b.view(torch.int16))
        assert got is not None
        if self._turn > WARM_UP:
            measured = {
                "seconds": seconds, "cpu": cpu, "publish": report.seconds, "update": got.seconds
            }  # fmt: skip
            for key, value in measured.items():
                self.best[key] = min(self.best[key], value)
            self.best |= {
                "codec": report.codec, "bytes": report.bytes, "dense_bytes": report.dense_bytes,
                "density": report.changed / sum(p.numel() for p in self._model.w),
            }  # fmt: skip


def measured(
    parameters: int, codecs: list[str], rate: float | None, turns: int
) -> dict[str, dict[str, Any]]:
    """By codec: seconds, bytes and density of an update. The codecs take turns."""
    with ExitStack() as stack:
        pairs = {codec: Pair(parameters, codec, rate, stack) for codec in codecs}
        for _ in range(WARM_UP + turns):
            for pair in pairs.values():
                pair.turn()
        return {codec: pair.best for codec, pair in pairs.items()}


def limit(publisher: Publisher, rate: float) -> None:
    """Slows the publisher's link down, and lets it know as its receivers would."""
    publisher._outlets[0]._bucket = link_bucket(rate)  # type: ignore[attr-defined]
    publisher._owner.encoder.choice.link = rate


def fan_out(workers: int) -> dict[str, Any]:
    """Bytes that the trainer sends when receivers relay for each other."""
    model = Weights(1 << 22)
    with ExitStack() as stack:
        publisher = stack.enter_context(Publisher(model, "tcp://127.0.0.1:0", fan_out=2))
        models = [Weights(1 << 22) for _ in range(workers)]
        subscribers = [
            stack.enter_context(
                Subscriber(m, publisher.url, worker=f"w{i}", relay="tcp://127.0.0.1:0")
            )
            for i, m in enumerate(models)
        ]

        def follow(version: int) -> None:
            threads = [threading.Thread(target=s.update, args=(version,)) for s in subscribers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        publisher.publish(0)
        follow(0)
        before = publisher.sent_bytes
        model.step(1)
        report = publisher.publish(1)
        follow(1)
        for m in models:
            for a, b in zip(model.w, m.w, strict=True):
                assert torch.equal(a.view(torch.int16), b.view(torch.int16))
        return {"payloads": (publisher.sent_bytes - before) / report.bytes, "bytes": report.bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parameters", type=float, default=5e8)
    parser.add_argument("--dense", type=float, default=1e8, help="parameters of the dense runs")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--codecs", nargs="*", default=["gap_raw", "gap_ulp", "exponent", "auto"])
    parser.add_argument("--links", nargs="*", default=list(LINKS), choices=list(LINKS))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for label in args.links:
        rate = LINKS[label]
        dense = measured(int(args.dense), ["dense"], rate, 1 if rate else args.turns)["dense"]
        runs = measured(int(args.parameters), args.codecs, rate, args.turns)
        link = (1 / rate) if rate else 0.0
        fixed = [run for codec, run in runs.items() if codec != "auto"] or list(runs.values())
        for codec, run in runs.items():
            more = run["dense_bytes"] / dense["dense_bytes"]
            scaled = dense["seconds"] * more
            quiet = run["cpu"] + run["bytes"] * link
            quiet_dense = (dense["cpu"] + dense["bytes"] * link) * more
            quiet_best = min(f["cpu"] + f["bytes"] * link for f in fixed)
            rows.append({
                "link": label, "codec": codec, "used": run["codec"],
                "density %": 100 * run["density"],
                "MB": run["bytes"] / 1e6, "publish s": run["publish"], "update s": run["update"],
                "total s": run["seconds"], "dense s (scaled)": scaled,
                "x dense": scaled / run["seconds"],
                "of the best fixed": run["seconds"] / min(f["seconds"] for f in fixed),
                "CPU + link s": quiet, "x dense (CPU + link)": quiet_dense / quiet,
                "of the best fixed (CPU + link)": quiet / quiet_best, "equal": True,
            })  # fmt: skip
            print(rows[-1], flush=True)
    tree = fan_out(16)
    publish(
        "rl_end_to_end",
        f"One update of {args.parameters:g} bf16 parameters, publish() to applied (emulated link)",
        rows,
        {"parameters": args.parameters, "dense_parameters": args.dense, "turns": args.turns,
         "fan_out_16_workers_payloads_sent_by_the_trainer": tree["payloads"]},
    )  # fmt: skip
    print(f"16 workers in a tree: the trainer sends {tree['payloads']:.3f} payloads (measured)")


if __name__ == "__main__":
    main()
