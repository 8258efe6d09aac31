"""rl_end_to_end: from publish() to the last new bit written, over an emulated link.

    python tests/benchmarks/bench_rl_end_to_end.py [--parameters 5e8] [--dense 1e8] [--turns 3]

One publisher and one subscriber of one process over TCP on the loopback interface; the subscriber
waits for the version when `publish` begins. The link is a token bucket at the publisher (label:
emulated link; everything else is measured). The trainer holds bf16 weights N(0, 0.02) of which a
share changes by an ULP each step, more of the small ones than of the large ones, as after the
burn-in of `bench_rl_codecs`. Dense is the same library with its codec fixed to `dense`; where it is
run with fewer parameters its time is scaled by the bytes, and that is said.

All codecs send steps of the same weights over the same link in turn (A B C D A B C D ...); what is
shown are medians, and ratios within a turn with their spread: other work on the machine, which
comes and goes, hits all of them. "Worked out" is what the same update would take with nothing else
on the machine: the longer of the link and of the CPU time of both sides on two cores. After each
update the weights of both sides are compared bit for bit.
"""

import argparse
import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import numba
import numpy as np
import torch
from timing import Turns, publish, summary
from torch import nn

from planaria.rl_sync import Publisher, Subscriber
from planaria.rl_sync.transports.tcp import link_bucket

LINKS = {"100 Mb/s": 12.5e6, "1 Gb/s": 125e6, "loopback": None}
LOOPBACK = 1e9
WARM_UP = 1
CORES = 2


@numba.njit(nogil=True)
def moved(bits: np.ndarray, seed: int, per_ulp: np.ndarray, normal: np.ndarray) -> None:
    """What a normal step on an fp32 master does to bf16 bits.

    Where in its rounding interval the master of an element lies is chance (the lower half of a
    SplitMix64 number), and so is the step (the upper bits, by quantile); ``per_ulp`` is the size of
    a step in ULPs by exponent.
    """
    mask = np.uint64(normal.size - 1)
    for i in range(bits.size):
        x = np.uint64(seed) + np.uint64(i) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
        place = (x & np.uint64(0xFFFFFFFF)) * 2.0**-32 - 0.5
        step = normal[(x >> np.uint64(32)) & mask] * per_ulp[(bits[i] >> 7) & 0xFF]
        bits[i] += np.int16(np.floor(place + step + 0.5))


class Weights(nn.Module):
    """Matrices of 16 M elements."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        rows, tile = max(parameters >> 24, 1), min(parameters, 1 << 24)
        self.w = nn.ParameterList(
            nn.Parameter((torch.randn(4096, tile // 4096) * 0.02).bfloat16(), requires_grad=False)
            for _ in range(rows)
        )
        quantiles = (torch.arange(4096) + 0.5) / 4096
        self.normal = (torch.special.ndtri(quantiles) * 0.25).numpy()

    def step(self, seed: int, size: float = 1e-6) -> None:
        """What a step of this size on an fp32 master does to the bf16 weights, by chance."""
        per_ulp = size * np.exp2(-(np.maximum(np.arange(256), 1) - 127.0 - 7.0))
        for i, p in enumerate(self.w):
            flat = p.view(torch.int16).numpy().reshape(-1)
            moved(flat, (seed * 1000 + i) << 32, np.minimum(per_ulp, 100.0), self.normal)


class Pair:
    """A publisher and a subscriber that waits for it."""

    def __init__(self, parameters: int, rate: float | None, stack: ExitStack) -> None:
        self._model, self._there = Weights(parameters), Weights(parameters)
        self._publisher = stack.enter_context(Publisher(self._model, "tcp://127.0.0.1:0"))
        self._subscriber = stack.enter_context(Subscriber(self._there, self._publisher.url))
        self._pool = stack.enter_context(ThreadPoolExecutor(1))
        self._rate, self._turn = rate, 0
        self._publisher.publish(0)
        self._subscriber.update()
        if rate:
            self._publisher._outlets[0]._bucket = link_bucket(rate)  # type: ignore[attr-defined]

    def update(self, codec: str) -> dict[str, Any]:
        """One update, from `publish` to applied."""
        self._turn += 1
        choice = self._publisher._owner.encoder.choice
        choice._fixed = None if codec == "auto" else codec
        # What receivers measure is noisy on a busy machine.
        choice.link = self._rate or LOOPBACK
        self._model.step(self._turn)
        waiting = self._pool.submit(self._subscriber.update, self._turn)
        time.sleep(0.1)
        gc.collect()
        started, used = time.perf_counter(), time.process_time()
        report = self._publisher.publish(self._turn)
        got = waiting.result()
        seconds, cpu = time.perf_counter() - started, time.process_time() - used
        for a, b in zip(self._model.w, self._there.w, strict=True):
            assert torch.equal(a.view(torch.int16), b.view(torch.int16))
        assert got is not None
        link = report.bytes / self._rate if self._rate else 0.0
        return {
            "seconds": seconds, "cpu": cpu, "worked": max(link, cpu / CORES),
            "publish": report.seconds, "early": got.ahead_bytes / max(got.bytes, 1),
            "codecs": report.codecs, "bytes": report.bytes, "dense_bytes": report.dense_bytes,
            "density": report.changed / sum(p.numel() for p in self._model.w),
        }  # fmt: skip


@contextmanager
def pair(parameters: int, rate: float | None) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(parameters, rate, stack)
    gc.collect()


def measured(
    parameters: int, codecs: list[str], rate: float | None, turns: int
) -> dict[str, list[dict[str, Any]]]:
    """By codec: what each turn's update took."""
    found: dict[str, list[dict[str, Any]]] = {codec: [] for codec in codecs}
    with pair(parameters, rate) as both:
        for turn in range(-WARM_UP, turns):
            for codec in codecs:
                row = both.update(codec)
                if turn >= 0:
                    found[codec].append(row)
    return found


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
        more = runs[args.codecs[0]][0]["dense_bytes"] / dense[0]["dense_bytes"]
        plain = {key: middle(dense, key) * more for key in ("seconds", "worked")}
        clock, worked = (
            Turns({codec: [r[key] for r in run] for codec, run in runs.items()})
            for key in ("seconds", "worked")
        )
        fixed = [codec for codec in args.codecs if codec != "auto"] or args.codecs
        by_clock, by_work = str(clock.fastest(fixed)), str(worked.fastest(fixed))
        for codec, run in runs.items():
            mix = run[-1]["codecs"]
            seconds, ratio = summary(clock.values[codec]), clock.ratio(codec, by_clock)
            rows.append({
                "link": label, "codec": codec,
                "of bytes": {c: round(n / sum(mix.values()), 2) for c, n in mix.items()},
                "density %": 100 * middle(run, "density"), "MB": middle(run, "bytes") / 1e6,
                "publish s": middle(run, "publish"), "seconds": seconds["median"],
                "min": seconds["min"], "max": seconds["max"], "CPU s": middle(run, "cpu"),
                "dense s (scaled)": plain["seconds"],
                "x dense": plain["seconds"] / seconds["median"],
                "of the best fixed": ratio["median"],
                "of it, min": ratio["min"], "of it, max": ratio["max"],
                "worked out s": worked.median(codec),
                "x dense (worked out)": plain["worked"] / worked.median(codec),
                "of the best fixed (worked out)": worked.ratio(codec, by_work)["median"],
                "came early": middle(run, "early"), "equal": True,
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


def middle(rows: list[dict[str, Any]], key: str) -> float:
    return summary([row[key] for row in rows])["median"]


if __name__ == "__main__":
    main()
