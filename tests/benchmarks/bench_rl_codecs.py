"""rl_codecs: bytes and speed of every codec, and of the peers' formats, on the same changes.

    python tests/benchmarks/bench_rl_codecs.py [--train 120] [--elements 8388608] [--turns 5]

Data: a transformer trained on Python's standard library, then updated by AdamW (0.9, 0.95) with
fp32 masters at lr 1e-6 and 3e-6, changes of the last of 40 steps; and synthetic weights N(0, 0.02)
under the same optimizer with normally distributed gradients. Every format is decoded again and the
result compared bit for bit. Speeds are of one thread in its own
CPU time, the best of the turns; the decode includes
writing the new bits. Needs `zstandard` for the peers' formats; without it they are left out.
"""

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from timing import publish

from planaria.launch.demo.model import ModelConfig, Transformer
from planaria.launch.demo.text import TextWindows, read_text
from planaria.rl_sync.bits import FORMATS, bits_of
from planaria.rl_sync.codecs.base import Job
from planaria.rl_sync.codecs.bound import entropy_bound_bits
from planaria.rl_sync.codecs.registry import all_codecs
from planaria.rl_sync.diff.scan import Scanner, scatter

BF16 = FORMATS["bfloat16"]
BLOCK = 1 << 20
BURN_IN = 40


def trained(steps: int) -> Transformer:
    """A transformer of 3.4 M parameters after some steps at lr 1e-3."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(dim=256, layers=4, heads=4, ffn_dim=704))
    data = TextWindows(read_text(limit=4 << 20), 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        run_step(model, optimizer, data, step)
    return model


def run_step(model: Transformer, optimizer: Any, data: TextWindows, step: int) -> None:
    generator = np.random.default_rng(step)
    rows = [data[int(i)] for i in generator.integers(0, len(data), 8)]
    x, y = (torch.stack(each) for each in zip(*rows, strict=True))
    optimizer.zero_grad()
    loss = model(x, y).loss
    assert loss is not None
    loss.backward()
    optimizer.step()


def tuned(model: Transformer, lr: float) -> tuple[np.ndarray, np.ndarray]:
    """bf16 bits before and after the last of some steps at a low rate, masters in fp32."""
    with torch.no_grad():
        for p in model.parameters():  # a run starts from a bf16 checkpoint
            p.copy_(p.bfloat16())
    data = TextWindows(read_text(limit=4 << 20), 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    before = np.empty(0, np.uint16)
    for step in range(BURN_IN):
        before = flat(model)
        run_step(model, optimizer, data, 10_000 + step)
    return before, flat(model)


def flat(model: torch.nn.Module) -> np.ndarray:
    return np.concatenate([bits_of(p.bfloat16().contiguous()) for p in model.parameters()])


def synthetic(elements: int, lr: float) -> tuple[np.ndarray, np.ndarray]:
    """The set of weights of the anchors page: N(0, 0.02), Adam on normal gradients."""
    torch.manual_seed(0)
    w = (torch.randn(elements) * 0.02).bfloat16().float()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    before = w
    for t in range(1, BURN_IN + 1):
        g = torch.randn_like(w)
        m.mul_(0.9).add_(g, alpha=0.1)
        v.mul_(0.95).addcmul_(g, g, value=0.05)
        before = w.clone()
        w -= lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
    return bits_of(before.bfloat16()).copy(), bits_of(w.bfloat16()).copy()


def peers(jobs: list[Job], lives: list[np.ndarray]) -> dict[str, int]:
    """Bytes of the peers' formats, each decoded and compared."""
    found = {"int32 + raw (SparseRL-Sync, verl, vLLM)": sum(6 * j.changes.size for j in jobs)}
    for job in jobs:
        check(job, job.changes.pos.astype(np.int32).view(np.uint32), job.changes.new)
    try:
        import zstandard
    except ImportError:
        print("zstandard is not installed: the peers' compressed formats are left out")
        return found
    pack, unpack = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    totals = dict.fromkeys(
        ("gap16 + XOR + zstd-1 (NeMo's default)", "gap16 + raw + zstd-1 (PULSE)",
         "XOR of all + zstd-1 (slime, SkyRL)"), 0)  # fmt: skip
    for job, live in zip(jobs, lives, strict=True):
        pos, old, new = job.changes
        gaps = np.diff(pos.astype(np.int64), prepend=-1) - 1
        assert gaps.size == 0 or gaps.max() < 1 << 16
        gap16 = gaps.astype(np.uint16)
        coded = [pack.compress(gap16.tobytes()), pack.compress((old ^ new).tobytes()),
                 pack.compress(new.tobytes()),
                 pack.compress((job.base ^ live).tobytes())]  # fmt: skip
        for name, parts in zip(totals, ([0, 1], [0, 2], [3]), strict=True):
            totals[name] += sum(len(coded[i]) for i in parts)
        back = [np.frombuffer(unpack.decompress(c), np.uint16) for c in coded]
        at = (np.cumsum(back[0].astype(np.int64) + 1) - 1).astype(np.uint32)
        check(job, at, old ^ back[1])
        check(job, at, back[2])
        assert np.array_equal(job.base ^ back[3], live)
    return found | totals


def check(job: Job, pos: np.ndarray, new: np.ndarray) -> None:
    assert np.array_equal(pos, job.changes.pos)
    assert np.array_equal(new, job.changes.new)


def best(run: Callable[[], Any], turns: int) -> float:
    times = []
    for _ in range(turns):
        started = time.thread_time()
        run()
        times.append(time.thread_time() - started)
    return min(times)


def measure(name: str, before: np.ndarray, after: np.ndarray, turns: int) -> list[dict[str, Any]]:
    cuts = [slice(i, i + BLOCK) for i in range(0, before.size, BLOCK)]
    bases, lives = [before[c].copy() for c in cuts], [after[c].copy() for c in cuts]
    scanner = Scanner()

    def scan() -> list[Job]:
        return [Job(BF16, b, scanner.scan([live], b)) for b, live in zip(bases, lives, strict=True)]

    jobs = scan()
    changed = sum(j.changes.size for j in jobs)
    nbytes = before.nbytes
    bound = entropy_bound_bits(jobs)
    target = np.empty_like(before)
    copying = best(lambda: (np.copyto(target, before), np.copyto(target, after)), turns)
    memcpy = 2 * nbytes / copying
    scanning = best(scan, turns)
    rows: list[dict[str, Any]] = []

    def row(form: str, size: int, **more: Any) -> None:
        rows.append({
            "weights": name, "density %": 100 * changed / before.size, "format": form,
            "bits/change": 8 * size / changed, "x dense": nbytes / size,
            "of the bound": 8 * size / bound,
            "scan+encode GB/s": more.get("encode"), "of memcpy": more.get("memcpy"),
            "decode+apply GB/s": more.get("decode"), "M changes/s": more.get("changes"),
            "equal": True,
        })  # fmt: skip

    for form, size in peers(jobs, lives).items():
        row(form, size)
    row("i.i.d. entropy bound", round(entropy_bound_bits(jobs, conditional=False) / 8))
    row("exponent-conditioned entropy bound", round(bound / 8))
    for form, codec in all_codecs().items():
        model, coded = codec.encode(jobs)
        encoding = best(lambda codec=codec: codec.encode(jobs), turns)
        targets = [b.copy() for b in bases]

        def decode(codec: Any = codec, coded: Any = coded, model: Any = model,
                   targets: Any = targets) -> None:  # fmt: skip
            for job, data, there in zip(jobs, coded, targets, strict=True):
                found = codec.decode(data, BF16, job.base, job.changes.size, model)
                scatter(there, found.pos, found.new)

        decoding = best(decode, turns)
        assert all(np.array_equal(t, live) for t, live in zip(targets, lives, strict=True))
        row(
            f"planaria {form}", len(model) + sum(map(len, coded)),
            encode=nbytes / (scanning + encoding) / 1e9,
            memcpy=2 * nbytes / (scanning + encoding) / memcpy,
            decode=nbytes / decoding / 1e9, changes=changed / decoding / 1e6,
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--train", type=int, default=120, help="steps at lr 1e-3")
    parser.add_argument("--elements", type=int, default=8 << 20, help="of the synthetic set")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = trained(args.train)
    rows: list[dict[str, Any]] = []
    for lr in (1e-6, 3e-6):
        before, after = tuned(copy.deepcopy(model), lr)
        rows += measure(f"trained, lr {lr:g}", before, after, args.turns)
    rows += measure("N(0, 0.02), lr 1e-06", *synthetic(args.elements, 1e-6), args.turns)
    publish(
        "rl_codecs",
        "Bytes of one update in bf16, one thread (measured)",
        rows,
        {"train_steps": args.train, "burn_in": BURN_IN, "elements": args.elements,
         "block": BLOCK, "turns": args.turns, "threads": 1},
    )  # fmt: skip


if __name__ == "__main__":
    main()
