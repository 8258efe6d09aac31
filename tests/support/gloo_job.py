"""A job for drills whose ranks wait for each other in each step, under torchrun."""

import time
from datetime import timedelta

import torch
import torch.distributed as dist

from planaria.elastic.faults import record

if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=250))
    for step in range(1, 61):
        x = torch.full((1000,), float(step + dist.get_rank()))
        dist.all_reduce(x)
        time.sleep(0.03)
        record(step, x.sum())
