"""The default job's training loop; every rank runs it.

Read it as an example: plain PyTorch with DDP, and the few lines that `Checkpointer` and
`GlobalBatch` need.
"""

import contextlib
import os
import random
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from planaria import telemetry
from planaria.checkpoint import Checkpointer, communicating, mark_communication
from planaria.core.points import point
from planaria.data import GlobalBatch, micro_batch_seed
from planaria.errors import MismatchError
from planaria.launch import config, policies
from planaria.launch.config import RunConf
from planaria.launch.demo.build import STEP, Place, build, device_of, mirror_of, record_of
from planaria.launch.exit_codes import DONE, PREEMPTED
from planaria.launch.metrics import MetricsWriter
from planaria.launch.run_folder import RunFolder
from planaria.launch.warm import memory_tier


def main(run_dir: str | os.PathLike[str]) -> int:
    """Trains the run in a folder from where it stands, on this rank.

    Returns:
        Exit code of the rank: done, or preempted when it was asked to stop before the end.

    Raises:
        ConfigError: The frozen configuration cannot be carried out here.
    """
    folder = RunFolder(run_dir)
    conf = config.load(folder.config)
    torch.set_num_threads(conf.threads)
    # Nothing here draws from these two; they are saved, and a run that resumed is to equal another.
    random.seed(conf.seed)
    np.random.seed(conf.seed)
    if conf.elastic.mode == "session":
        from planaria.launch.demo import session

        return session.train(conf, folder)
    with _joined(conf) as place:
        return train(conf, folder, place)


def train(conf: RunConf, folder: RunFolder, place: Place) -> int:
    """The loop."""
    model, optim, sched, data = build(conf, place)
    memory = memory_tier(
        conf,
        int(os.environ.get("LOCAL_RANK", "0")),
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )
    if memory is not None and isinstance(model, DistributedDataParallel):
        mark_communication(model)  # what nodes send for parity waits for the gradients
    checkpointer = Checkpointer(
        folder.ckpt,
        {"model": model, "optim": optim, "sched": sched, "data": data},
        every=policies.save_policy(conf.checkpoint),
        keep=policies.keep_policy(conf.checkpoint),
        on_failure=conf.checkpoint.on_failure,  # pyright: ignore[reportArgumentType]
        mirror=mirror_of(conf),
        memory=memory,
        writer=conf.checkpoint.writer,  # pyright: ignore[reportArgumentType]
        dedup=conf.checkpoint.dedup,
        audit=conf.checkpoint.audit,
        timeout_s=conf.launcher.collective_timeout_s,
    )
    with checkpointer as ckpt, _metrics(folder.metrics, place) as log:
        report = ckpt.restore()
        first = report.step if report is not None else 0
        if data.step != first:
            raise MismatchError(f"the data stands at step {data.step}, the checkpoint at {first}")
        for step in range(first, conf.steps):
            point(STEP, step=step + 1)
            began = time.perf_counter()
            lr = float(sched.get_last_lr()[0])
            optim.zero_grad()
            with telemetry.span("train.forward_backward", step=step):
                loss = accumulate(model, data, step, conf, place)
            with telemetry.span("train.update", step=step):
                if conf.optim.clip_grad_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), conf.optim.clip_grad_norm)
                optim.step()
                sched.step()
            data.step = step + 1
            saving = ckpt.step(step + 1, {"loss": loss})
            if step + 1 == conf.steps and saving is None:
                ckpt.save(step + 1, {"loss": loss})
            if log is not None:
                seconds = time.perf_counter() - began
                log.write(record_of(conf, step + 1, loss, lr, seconds))
            if ckpt.should_stop and step + 1 < conf.steps:
                return PREEMPTED
    return DONE


def accumulate(
    model: nn.Module, data: GlobalBatch, step: int, conf: RunConf, place: Place
) -> float:
    """Leaves the gradient of the global batch's mean loss in the parameters.

    Every micro-batch counts the same and has random numbers of its own, whichever rank takes it;
    ranks need not have equally many.

    Returns:
        The mean loss of the global batch, the same on every rank.
    """
    total = torch.zeros((), dtype=torch.float64, device=place.device)
    share = data.assign(place.rank, place.world_size)
    for i, batch in data.micro_batches(step, place.rank, place.world_size):
        tokens, targets = (part.to(place.device) for part in batch)
        torch.manual_seed(micro_batch_seed(conf.seed, step, i))
        with _sync_if(model, i == share[-1]):
            loss = model(tokens, targets).loss
            # DDP averages over ranks; what is wanted is the mean over micro-batches.
            (loss * (place.world_size / data.n_micro_batches)).backward()
        total += loss.detach() / data.n_micro_batches
    if place.world_size > 1:
        with communicating():
            dist.all_reduce(total)
    return total.item()


def _sync_if(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Ranks exchange gradients once a step, in the backward of their last micro-batch."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


@contextlib.contextmanager
def _joined(conf: RunConf) -> Iterator[Place]:
    """Joins the job's process group, on the device that the configuration asks for."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = device_of(conf.device, int(os.environ.get("LOCAL_RANK", "0")))
    if size > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=conf.launcher.collective_timeout_s),
        )
    yield Place(rank, size, device)
    # Not after an error: a rank that is gone cannot take part in the parting.
    if size > 1:
        dist.destroy_process_group()


@contextlib.contextmanager
def _metrics(path: Path, place: Place) -> Iterator[MetricsWriter | None]:
    if place.rank != 0:
        yield None
        return
    with MetricsWriter(path) as writer:
        yield writer
