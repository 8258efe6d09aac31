"""Shards that hold nothing: FSDP2 makes them of tensors with fewer rows than there are ranks."""

from pathlib import Path

import torch

from planaria.checkpoint import Checkpointer, open_checkpoint


def test_an_empty_view_of_memory_that_is_not_is_saved(tmp_path: Path) -> None:
    """It has no address to tell its place in that memory by."""
    model = torch.nn.Linear(4, 4)
    model.register_parameter("empty", torch.nn.Parameter(torch.ones(4)[4:]))
    with Checkpointer(tmp_path, {"model": model}) as ckpt:
        for step in (1, 2):
            ckpt.save(step).wait_committed()
    assert open_checkpoint(tmp_path).read("model.empty").shape == (0,)
