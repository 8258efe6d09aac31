"""Time that training is blocked by a checkpoint: planaria against torch's dcp.async_save.

Two gloo ranks train a small MLP with AdamW, under DDP and under FSDP2. In turn, each variant saves
once between two optimizer steps while forward and backward run, and the time in which the training
thread stands still is added up: the call itself plus whatever the next optimizer step waits for.
Before a variant's next turn its last save is durable, so they do not disturb each other. At the end
each variant's last checkpoint is read back and compared bit for bit with the state it was taken of.

Run: ``make bench``, or ``python tests/benchmarks/bench_stall.py [--mb 256] [--turns 7]``.
"""

import argparse
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
from ranks import run_ranks
from timing import in_turn, publish, summary
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from planaria.checkpoint import Checkpointer, open_checkpoint

WIDTH = 1024


def build(kind: str, nbytes: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """An MLP whose parameters and AdamW state are about `nbytes` in all."""
    torch.manual_seed(0)
    layers = max(1, nbytes // (WIDTH * WIDTH * 4 * 3))
    model: nn.Module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    if kind == "fsdp2":
        for layer in model.children():
            fully_shard(layer)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def one_rank(
    rank: int, kind: str, nbytes: int, turns: int, batch: int, root: str
) -> dict[str, Any]:
    """Measures all variants on this rank."""
    warnings.filterwarnings("ignore")
    model, optim = build(kind, nbytes)
    x = torch.randn(batch, WIDTH)
    computing: list[float] = []

    def forward_backward() -> None:
        start = time.perf_counter()
        optim.zero_grad()
        model(x).square().mean().backward()
        computing.append(time.perf_counter() - start)

    forward_backward()
    optim.step()
    forward_backward()
    optim.step()
    computing.clear()
    step = 0

    def timed(call: Callable[[], Any]) -> tuple[float, Any]:
        start = time.perf_counter()
        result = call()
        return time.perf_counter() - start, result

    # A pool that holds the state, as the peer's staging buffers do.
    ckpt = Checkpointer(f"{root}/planaria", {"model": model, "optim": optim}, keep=1,
                        pool_bytes=nbytes + (64 << 20))  # fmt: skip

    def planaria() -> float:
        nonlocal step
        step += 1
        dist.barrier()
        blocked, handle = timed(lambda: ckpt.save(step))
        forward_backward()
        gate, _ = timed(ckpt.before_update)
        optim.step()
        handle.wait_committed()
        return blocked + gate

    # In a group of its own: its background collectives must not meet those of training.
    group: Any = dist.new_group(backend="gloo")

    def dcp_default() -> float:
        return dcp_turn(
            "dcp",
            lambda state, path: (
                None,
                dcp.async_save(state, checkpoint_id=path, process_group=group),
            ),
        )

    stager = DefaultStager(StagingOptions(use_pinned_memory=False, use_shared_memory=False,
                                          use_async_staging=True,
                                          use_non_blocking_copy=False))  # fmt: skip

    def dcp_async_staging() -> float:
        def save(state: Any, path: str) -> Any:
            response: Any = dcp.async_save(
                state, checkpoint_id=path, async_stager=stager, process_group=group
            )
            return response.staging_completion, response.upload_completion

        return dcp_turn("dcp-async-staging", save)

    def dcp_turn(name: str, save: Callable[[Any, str], Any]) -> float:
        model_state, optim_state = get_state_dict(model, optim)
        path = f"{root}/{name}"
        if rank == 0:
            shutil.rmtree(path, ignore_errors=True)
        dist.barrier()
        blocked, (staged, durable) = timed(
            lambda: save({"model": model_state, "optim": optim_state}, path)
        )
        forward_backward()
        gate, _ = timed(lambda: staged.result() if staged is not None else None)
        optim.step()
        durable.result()
        return blocked + gate

    values = in_turn(
        {
            "planaria": planaria,
            "dcp.async_save": dcp_default,
            "dcp.async_save, async staging": dcp_async_staging,
        },
        turns + 1,
    )
    equal = check(ckpt, model, optim, f"{root}/planaria", root, rank)
    ckpt.close()
    stager.close()
    return {
        "blocked": {name: v[1:] for name, v in values.items()},  # the first turn warms up
        "computing": computing,
        "equal": equal,
    }


def check(
    ckpt: Checkpointer, model: nn.Module, optim: Any, path: str, root: str, rank: int
) -> bool:
    """Both libraries give back the very state that is saved now."""
    ckpt.save(10_000).wait_committed()
    model_state: dict[str, Any]
    optim_state: dict[str, Any]
    model_state, optim_state = get_state_dict(model, optim)
    if rank == 0:
        shutil.rmtree(f"{root}/dcp", ignore_errors=True)
    dist.barrier()
    dcp.save({"model": model_state, "optim": optim_state}, checkpoint_id=f"{root}/dcp")
    target = {"model": {name: _empty(v) for name, v in model_state.items()}}
    dcp.load(target, checkpoint_id=f"{root}/dcp")
    stored = open_checkpoint(path)
    good = True
    for name, value in model_state.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        peer = target["model"][name]
        peer = peer.full_tensor() if isinstance(peer, DTensor) else peer
        good &= torch.equal(stored.read(f"model.{name}"), whole) and torch.equal(peer, whole)
        slot = optim_state["state"][name]["exp_avg_sq"]
        whole = slot.full_tensor() if isinstance(slot, DTensor) else slot
        good &= torch.equal(stored.read(f"optim.{name}.exp_avg_sq"), whole)
    return good and not stored.verify()


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time that training is blocked by a checkpoint")
    parser.add_argument("--mb", type=int, default=256, help="state, parameters and AdamW, in MB")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--batch", type=int, default=256, help="sets how long a step computes")
    args = parser.parse_args()
    rows = []
    for kind in ("ddp", "fsdp2"):
        with tempfile.TemporaryDirectory() as root:
            results = run_ranks(2, one_rank, kind, args.mb << 20, args.turns, args.batch, root,
                                timeout=1200)  # fmt: skip
        assert all(r["equal"] for r in results), "a checkpoint differs from the state"
        computing = summary([c for r in results for c in r["computing"]])["median"]
        # A step is as slow as its slowest rank.
        blocked = {
            name: [max(turn) for turn in zip(*(r["blocked"][name] for r in results), strict=True)]
            for name in results[0]["blocked"]
        }
        ours = summary(blocked["planaria"])["median"]
        for name, values in blocked.items():
            s = summary(values)
            rows.append({
                "training": kind,
                "variant": name,
                "blocked ms": s["median"] * 1e3,
                "min ms": s["min"] * 1e3,
                "max ms": s["max"] * 1e3,
                "ratio to planaria": s["median"] / ours,
                "fwd+bwd ms": computing * 1e3,
                "equal": True,
            })  # fmt: skip
    publish(
        "stall",
        f"Time blocked per checkpoint, 2 ranks, {args.mb} MB of state (measured)",
        rows,
        {"state_mb": args.mb, "turns": args.turns, "batch": args.batch, "ranks": 2, "threads": 1,
         "dcp": "async_save defaults (thread); and DefaultStager with asynchronous staging"},
    )  # fmt: skip


if __name__ == "__main__":
    main()
