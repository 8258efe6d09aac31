"""memory_steps: what a snapshot at every step costs a training, and a restart out of memory.

    python tests/benchmarks/bench_memory_steps.py [--mb 16] [--ranks 4] [--compute 0.25 0.5 1 2]

FSDP2 on several ranks, each a logical node of its own with a snapshot process, parity against one
lost node, over TCP on the loopback interface. A step is real but for its forward and backward, in
whose place the rank sleeps (label: emulated compute; on a machine with fewer cores than ranks a
real one would measure who gets the core). Steps with a snapshot at each and without take turns. The
restart is `restore()` into a model that was overwritten, out of memory and, with the files dropped
from the page cache, from disk; what is restored is compared with what was there.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import limits
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
from memory_jobs import processes, runtime_folder
from ranks import run_ranks
from timing import Goal, Turns, machine, publish_tables, summary
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from planaria.checkpoint import Checkpointer, MemoryTier

WIDTH = 512
LOSSES = 1


def training(nbytes: int) -> tuple[Any, torch.optim.Optimizer]:
    """A model whose parameters and AdamW state take so many bytes over all ranks."""
    torch.manual_seed(0)
    layers = max(1, nbytes // (WIDTH * WIDTH * 4 * 3))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def locals_of(model: nn.Module) -> list[torch.Tensor]:
    return [p.to_local().detach() for p in model.parameters() if isinstance(p, DTensor)]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, compute: float) -> None:
    time.sleep(compute)
    for p in model.parameters():
        if p.grad is None:
            p.grad = torch.ones_like(p)
    optimizer.step()
    dist.barrier()  # as the next forward's first collective


def one_rank(
    rank: int, root: str, mb: int, computes: list[float], steps: int, turns: int
) -> dict[str, Any]:
    """The rates of steps, and the times of both restarts."""
    torch.set_num_threads(1)
    size = dist.get_world_size()
    model, optimizer = training((mb << 20) * size)
    state = {"model": model, "optim": optimizer}
    memory = MemoryTier(budget=(mb << 20) * 8, losses=LOSSES, node=f"n{rank}", idle_s=120)
    found: dict[str, Any] = {"rates": {}}
    number = 0
    step(model, optimizer, 0.0)

    def seconds(compute: float, ckpt: Checkpointer | None) -> float:
        nonlocal number
        dist.barrier()
        started = time.perf_counter()
        for _ in range(steps):
            step(model, optimizer, compute)
            number += 1
            if ckpt is not None:
                ckpt.step(number)
        taken = time.perf_counter() - started
        if ckpt is not None:  # the last one is not part of the next measurement
            assert ckpt.last_snapshot is not None
            ckpt.last_snapshot.wait_in_memory()
        return taken

    with Checkpointer(f"{root}/memory", state, memory=memory) as ckpt:
        seconds(0.1, ckpt)
        for compute in computes:
            rates: dict[str, list[float]] = {"none": [], "snapshots": []}
            for _ in range(turns):
                rates["none"].append(seconds(compute, None))
                rates["snapshots"].append(seconds(compute, ckpt))
            found["rates"][compute] = rates
        kept = [t.clone() for t in locals_of(model)]
        found["held"] = arenas()
        with Checkpointer(f"{root}/disk", state) as durable:
            durable.save(number).wait_committed()
            times: dict[str, list[float]] = {"memory": [], "disk, cold": []}
            for _ in range(turns + 1):
                for name, each in (("memory", ckpt), ("disk, cold", durable)):
                    for t in locals_of(model):
                        t.fill_(7)
                    if each is durable and rank == 0:
                        for path in Path(root, "disk").rglob("*.safetensors"):
                            limits.forget(path)
                    dist.barrier()
                    started = time.perf_counter()
                    report = each.restore()
                    dist.barrier()
                    times[name].append(time.perf_counter() - started)
                    assert report is not None
                    assert report.tier == ("durable" if each is durable else "memory"), report
                    now = locals_of(model)
                    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))
    found["restores"] = {name: values[1:] for name, values in times.items()}
    found["state"] = sum(t.nbytes for t in kept) * 3
    return found


def arenas() -> list[int]:
    """Bytes of memory that each snapshot process's arena takes."""
    found = []
    for info in processes():
        folder = Path(f"/proc/{info.process.pid}/fd")
        for each in folder.iterdir():
            if "memfd:planaria" in os.readlink(each):
                found.append(os.stat(each).st_blocks * 512)
                break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mb", type=int, default=16, help="state of a rank")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--compute", type=float, nargs="*", default=[0.25, 0.5, 1.0, 2.0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    started = machine()
    with (
        tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as root,
        runtime_folder(Path(root, "runtime")),
    ):
        (first, *_) = run_ranks(
            args.ranks, one_rank, root, args.mb, args.compute, args.steps, args.turns, timeout=900
        )
    held = first["held"]
    rows, ratio = [], 0.0
    for compute, rates in first["rates"].items():
        turns = Turns(rates)
        relative = turns.ratio("none", "snapshots")  # of times, so the other way round of rates
        ratio = max(ratio, relative["median"])
        rows.append({
            "emulated compute s": compute,
            "steps/s without": args.steps / turns.median("none"),
            "steps/s with": args.steps / turns.median("snapshots"),
            "with / without": relative["median"], "min": relative["min"], "max": relative["max"],
        })  # fmt: skip
    restores = Turns(first["restores"])
    restart = restores.ratio("disk, cold", "memory")
    image = first["state"]
    k = args.ranks - LOSSES
    kept = [{
        "protection": f"parity, {args.ranks} nodes, {LOSSES} lost",
        "of an image, worked out": 1 + LOSSES / k if k else 1,
        "of an image, measured": summary([h / image / 2 for h in held])["median"] if held else None,
    }, {
        "protection": f"{1 + LOSSES} copies (replication)",
        "of an image, worked out": 1 + LOSSES, "of an image, measured": None,
    }]  # fmt: skip
    publish_tables(
        "memory_steps",
        [
            (f"{args.ranks} ranks, {args.mb} MiB of state each, a snapshot with parity at every "
             "step (emulated compute)", rows),
            ("restore() on all ranks (measured)", [
                {"from": name, "seconds": restores.median(name), "min": min(v), "max": max(v)}
                for name, v in restores.values.items()
            ]),
            ("Memory of a node, each of its two buffers", kept),
        ],
        vars(args),
        goals=[
            Goal("steps/s with snapshots, of those without, at the best step length", ratio, 0.9,
                 0.97),
            Goal("restart from memory, times faster than from disk", restart["median"], 5),
        ],
        started=started,
    )  # fmt: skip


if __name__ == "__main__":
    main()
