"""What the default job is made of, for its loops: model, optimizer, schedule, data, records."""

import math
import os
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from planaria.checkpoint import Mirror
from planaria.core.points import declare
from planaria.data import GlobalBatch
from planaria.elastic.agent.environment import ATTEMPT
from planaria.errors import ConfigError
from planaria.launch.config import OptimConf, RunConf
from planaria.launch.demo.model import ModelConfig, Transformer
from planaria.launch.demo.text import VOCAB_SIZE, TextWindows, read_text
from planaria.launch.metrics import StepRecord

STEP = declare("demo.step", "the default job is about to take a step; steps count from 1")


@dataclass(frozen=True)
class Place:
    """Where this rank runs."""

    rank: int
    world_size: int
    device: torch.device


def build(
    conf: RunConf, place: Place
) -> tuple[nn.Module, torch.optim.Optimizer, LambdaLR, GlobalBatch]:
    """Model, optimizer, schedule and data, all at step 0 and the same on every rank."""
    shape = ModelConfig(
        vocab_size=VOCAB_SIZE,
        dim=conf.model.dim,
        layers=conf.model.layers,
        heads=conf.model.heads,
        ffn_dim=conf.model.ffn_dim,
        max_seq_len=conf.data.seq_len,
        dropout=conf.model.dropout,
        tie_embeddings=conf.model.tie_embeddings,
        seed=conf.seed,
    )
    model: nn.Module = Transformer(shape).to(place.device)
    if place.world_size > 1:
        # DDP lays its buckets out anew after the first step, except with this; and a ring sums
        # what stands elsewhere in a bucket in another order, so a resumed run would differ.
        model = DistributedDataParallel(model, find_unused_parameters=True)
    o = conf.optim
    optim = torch.optim.AdamW(model.parameters(), o.lr, (o.beta1, o.beta2), o.eps, o.weight_decay)
    total = o.decay_steps or conf.steps
    sched = LambdaLR(optim, lambda step: lr_factor(o, step, total))
    dataset = TextWindows(read_text(conf.data.paths, conf.data.max_bytes), conf.data.seq_len)
    data = GlobalBatch(dataset, conf.data.batch_size, conf.data.micro_batch_size, conf.seed)
    return model, optim, sched, data


def lr_factor(optim: OptimConf, step: int, total: int) -> float:
    """The learning rate at a step as a share of `optim.lr`: linear rise, cosine, floor."""
    if step < optim.warmup_steps:
        return (step + 1) / (optim.warmup_steps + 1)
    if step >= total:
        return optim.min_lr_ratio
    progress = (step - optim.warmup_steps) / max(total - optim.warmup_steps, 1)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * cosine


def mirror_of(conf: RunConf) -> Mirror | None:
    """The second copy that a configuration asks for."""
    url, bytes_per_s = conf.checkpoint.mirror, conf.checkpoint.mirror_bytes_per_s
    return None if url is None else Mirror(url, bytes_per_s=bytes_per_s)


def device_of(wanted: str, local_rank: int) -> torch.device:
    """The device of a rank.

    Args:
        wanted: auto, cpu or cuda.
        local_rank: Its number on this machine.

    Raises:
        ConfigError: There is no such device here, or none for this rank.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and not count:
        raise ConfigError("device=cuda: this machine has no CUDA device; give device=cpu")
    if wanted == "cpu" or not count:
        return torch.device("cpu")
    if local_rank >= count:
        raise ConfigError(
            f"rank {local_rank} of this node has no GPU of its own, there are {count}: "
            f"give launcher.nproc={count}, or device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def record_of(conf: RunConf, step: int, loss: float, lr: float, seconds: float) -> StepRecord:
    """The line of a step in `metrics.jsonl`; steps count from 1."""
    return StepRecord(
        step=step,
        loss=loss,
        loss_hex=loss.hex(),
        tokens=conf.data.batch_size * conf.data.seq_len,
        seconds=seconds,
        lr=lr,
        attempt=int(os.environ.get(ATTEMPT, "0")),
        time=time.time(),
    )
