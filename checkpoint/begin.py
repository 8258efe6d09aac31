"""The part of a save that is done at the call: what the training thread waits for."""

import random
from collections.abc import Mapping
from typing import Any

import torch

from planaria.checkpoint import points
from planaria.checkpoint.capture.audit import Audit
from planaria.checkpoint.capture.eager import copy_eager
from planaria.checkpoint.run_info import encode_metrics
from planaria.checkpoint.save_job import SaveJob
from planaria.checkpoint.state.recall import Recalled
from planaria.checkpoint.state.stateset import Collected, StateSet
from planaria.core.garbage import no_collection
from planaria.core.points import point

#: Chooses what of the state is looked at twice. It has no state that a fork would copy.
_RANDOM = random.SystemRandom()


def look_at(
    job: SaveJob, state: StateSet, metrics: Mapping[str, Any] | None, *, audit: bool
) -> None:
    """Copies what may change at any time, and remembers where the rest is; failures are noted.

    Args:
        job: The save.
        state: What is saved.
        metrics: The caller's metrics.
        audit: Whether every captured byte is to be checked.
    """
    try:
        point(points.CALL, step=job.step)
        job.metrics = encode_metrics(metrics)
        with no_collection():
            _fill(job, state.collect(), audit=audit)
    except Exception as error:
        job.error, job.entries = error, {}


def _fill(job: SaveJob, collected: Collected, *, audit: bool) -> None:
    job.entries, job.objects = collected.tensors, collected.objects
    if isinstance(collected.tensors, Recalled):
        collected.tensors.copy_eager()
        devices, watched = collected.tensors.layout.devices, collected.tensors
    else:
        devices, watched = copy_eager(collected.tensors)
    for device in devices:
        job.ready[device] = torch.cuda.current_stream(device).record_event()
    job.audit = Audit(watched, everything=audit, rng=_RANDOM)
