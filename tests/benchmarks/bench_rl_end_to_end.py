"""rl_end_to_end: from publish() to the last new bit written, over an emulated link.

    python tests/benchmarks/bench_rl_end_to_end.py [--parameters 5e8] [--dense 1e8]

One publisher and one subscriber of one process over TCP on the loopback interface; the link is a
token bucket at the publisher (label: emulated link; everything else is measured). The trainer holds
bf16 weights N(0, 0.02) of which a share changes by an ULP each step, more of the small ones than of
the large ones, as after the burn-in of `bench_rl_codecs`. Dense is the same library with its codec
fixed to `dense`; where it is run with fewer parameters its time is scaled by the bytes, and that is
said. "CPU + link" adds the CPU time of both sides to bytes / rate, for machines on which other work
runs; it is worked out, not measured. After each update the weights of both sides are compared bit
for bit.
"""

import argparse
import threading
import time
from contextlib import ExitStack
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


def one(parameters: int, codec: str, rate: float | None, turns: int) -> dict[str, Any]:
    """Seconds, bytes and density of one update."""
    model = Weights(parameters)
    there = Weights(parameters)
    with (
        Publisher(model, "tcp://127.0.0.1:0", codec=codec, rate=None) as publisher,
        Subscriber(there, publisher.url) as subscriber,
    ):
        publisher.publish(0)
        subscriber.update()
        times, cpu, report, got = [], [], None, None
        for turn in range(WARM_UP + turns):
            if turn == WARM_UP and rate is not None:
                limit(publisher, rate)
            model.step(turn + 1)
            started, used = time.perf_counter(), time.process_time()
            report = publisher.publish(turn + 1)
            got = subscriber.update(at_least=turn + 1)
            if turn >= WARM_UP:
                times.append(time.perf_counter() - started)
                cpu.append(time.process_time() - used)
            for a, b in zip(model.w, there.w, strict=True):
                assert torch.equal(a.view(torch.int16), b.view(torch.int16))
        assert report is not None
        assert got is not None
        return {
            "seconds": min(times), "cpu": min(cpu), "codec": report.codec, "bytes": report.bytes,
            "density": report.changed / sum(p.numel() for p in model.w),
            "publish": report.seconds, "update": got.seconds, "dense_bytes": report.dense_bytes,
        }  # fmt: skip


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
        dense = one(int(args.dense), "dense", rate, 1 if rate else args.turns)
        for codec in args.codecs:
            run = one(int(args.parameters), codec, rate, args.turns)
            more = run["dense_bytes"] / dense["dense_bytes"]
            scaled = dense["seconds"] * more
            link = (1 / rate) if rate else 0.0
            quiet = run["cpu"] + run["bytes"] * link
            quiet_dense = (dense["cpu"] + dense["bytes"] * link) * more
            rows.append({
                "link": label, "codec": codec, "used": run["codec"],
                "density %": 100 * run["density"],
                "MB": run["bytes"] / 1e6, "publish s": run["publish"], "update s": run["update"],
                "total s": run["seconds"], "dense s (scaled)": scaled,
                "x dense": scaled / run["seconds"],
                "CPU + link s": quiet, "x dense (CPU + link)": quiet_dense / quiet, "equal": True,
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
