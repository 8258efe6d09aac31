"""One training job four ways, for the benchmark of recoveries; each rank records its steps.

    recovery_jobs.py torchft WORLD STEPS HEARTBEAT_MS [PG_TIMEOUT_S]   starts a lighthouse and ranks
    recovery_jobs.py torchft-rank STEPS PG_TIMEOUT_S                    one of these ranks
    recovery_jobs.py dcp STEPS SAVE_AT                                  a rank of torchrun
    recovery_jobs.py agent WORLD STEPS                                  starts ranks of a session
    recovery_jobs.py session STEPS                                      one of these ranks

Model, data and optimizer are the same in all.
"""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from planaria.core.deadline import Deadline
from planaria.elastic.faults import record

WIDTH, LAYERS, BATCH, MICRO = 512, 8, 48, 12
_START_S = 120.0


class Samples(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Pairs that depend on their index alone."""

    def __len__(self) -> int:
        return 1 << 16

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = torch.Generator().manual_seed(index)
        x = torch.randn(WIDTH, generator=drawn)
        return x, x.flip(0)


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer: about 8 MB of parameters."""
    torch.manual_seed(0)
    layers = [part for _ in range(LAYERS) for part in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
    model = nn.Sequential(*layers)
    return model, torch.optim.AdamW(model.parameters(), 1e-3)


def batch(step: int, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's share of a step's batch."""
    mine = range(step * BATCH + rank, (step + 1) * BATCH, world)
    pairs = [Samples()[i] for i in mine]
    return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])


def torchft(world: int, steps: int, heartbeat_ms: int, timeout_s: float) -> int:
    """Starts torchft's lighthouse here and one process a replica group; waits for their end."""
    from torchft.coordination import LighthouseServer  # pyright: ignore[reportMissingImports]

    lighthouse = LighthouseServer(
        bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=10_000, quorum_tick_ms=20,
        heartbeat_timeout_ms=heartbeat_ms,
    )  # fmt: skip
    port = lighthouse.address().rpartition(":")[2]
    command = [sys.executable, __file__, "torchft-rank", str(steps), str(timeout_s)]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world),
                 "TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{port}"},
        )
        for rank in range(world)
    ]  # fmt: skip
    codes = [rank.wait() for rank in ranks]
    lighthouse.shutdown()
    # One of them is killed on purpose.
    return 0 if sum(code == 0 for code in codes) >= world - 1 else 1


def torchft_rank(steps: int, timeout_s: float) -> None:
    """A replica group of one rank, written as in torchft's own examples."""
    from torchft import (  # pyright: ignore[reportMissingImports]
        DistributedDataParallel,
        Manager,
        Optimizer,
        ProcessGroupGloo,
    )

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    model, inner = build()

    def load(state: Mapping[str, Any]) -> None:
        model.load_state_dict(state["model"])
        inner.load_state_dict(state["optim"])

    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=timeout_s)),
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optim": inner.state_dict()},
        min_replica_size=1,
        replica_id=f"replica_{rank}",
        hostname="127.0.0.1",
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
    )
    wrapped, optim = DistributedDataParallel(manager, model), Optimizer(manager, inner)
    _together(rank, world)
    while manager.current_step() < steps:
        before = manager.current_step()
        x, y = batch(before, rank, world)
        optim.zero_grad()
        loss = nn.functional.mse_loss(wrapped(x), y)
        loss.backward()
        optim.step()
        if manager.current_step() > before:
            record(before + 1)
    sys.stdout.flush()
    os._exit(0)  # the others may still be at their last step


def _together(rank: int, world: int) -> None:
    """Waits for all ranks: one that joins late would be past the step at which it is killed."""
    Path(f"ready-{rank}").touch()
    until = Deadline(_START_S)
    while not all(Path(f"ready-{other}").exists() for other in range(world)):
        until.check("all ranks of torchft")
        time.sleep(0.01)


def dcp(steps: int, save_at: int) -> None:
    """DDP under torchrun, which starts all ranks again; they load what DCP saved."""
    import torch.distributed.checkpoint as dcp_lib
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    model, optim = build()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    folder, first = Path("checkpoint").absolute(), 0

    def state() -> dict[str, Any]:
        parts = get_state_dict(model, optim)
        return {"model": parts[0], "optim": parts[1], "step": torch.tensor(0)}

    if (folder / ".metadata").exists():
        loaded = state()
        dcp_lib.load(loaded, checkpoint_id=folder)
        set_state_dict(
            model, optim, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"]
        )
        first = int(loaded["step"])
    for step in range(first, steps):
        x, y = batch(step, rank, world)
        optim.zero_grad()
        loss = nn.functional.mse_loss(wrapped(x), y)
        loss.backward()
        optim.step()
        total = loss.detach().double() / world
        dist.all_reduce(total)
        if step + 1 == save_at:
            now = state()
            now["step"] = torch.tensor(step + 1)
            dcp_lib.save(now, checkpoint_id=folder)
            dist.barrier()
        record(step + 1, total)
    dist.barrier()
    dist.destroy_process_group()


def agent(world: int, steps: int) -> int:
    """Planaria's agent with its coordinator here, one process a rank; waits for their end."""
    from planaria.elastic.agent import (  # pyright: ignore[reportMissingImports]
        ElasticAgent,
        RankLogs,
        StopRequest,
    )
    from planaria.elastic.membership.rules import (  # pyright: ignore[reportMissingImports]
        Rules,
    )

    end = ElasticAgent(
        command=[__file__, "session", str(steps)],
        nproc=world,
        rules=Rules(world=world, policy="shrink"),
        logs=RankLogs(lambda attempt: Path("logs").absolute(), {}, lambda: 0),
        stop=StopRequest(),
    ).run_job()
    for log in sorted(Path("logs").glob("rank-*.log")):
        print(f"{log.name}: {log.read_text(errors='replace')[-500:]}")
    print(end.state, end.reason)
    return 0 if end.state == "done" else 1


def session(steps: int) -> None:
    """Planaria's session: ranks go on without the lost one."""
    from planaria.data import GlobalBatch
    from planaria.elastic import Session

    model, optim = build()
    data = GlobalBatch(Samples(), BATCH, BATCH // MICRO, seed=0)
    with Session(model, optim, data, steps=steps) as run:
        for step in run:
            with step:
                for x, y in step.micro_batches():
                    loss = nn.functional.mse_loss(model(x), y)
                    step.backward(loss)
                    step.log(loss=loss.detach())
            if step.committed:
                record(step.number + 1, step.metrics["loss"])


def main(argv: list[str]) -> int:
    """Runs one of the jobs."""
    torch.set_num_threads(1)
    mode, args = argv[0], argv[1:]
    if mode == "torchft":
        return torchft(int(args[0]), int(args[1]), int(args[2]), float((args[3:] or ["5"])[0]))
    if mode == "torchft-rank":
        torchft_rank(int(args[0]), float(args[1]))
    elif mode == "dcp":
        dcp(int(args[0]), int(args[1]))
    elif mode == "agent":
        return agent(int(args[0]), int(args[1]))
    elif mode == "session":
        session(int(args[0]))
    else:
        raise SystemExit(f"there is no job {mode}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
