"""What a manifest says beside the state: the caller's metrics, and what wrote it."""

import contextlib
import os
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from planaria import __version__
from planaria.checkpoint.state import tree
from planaria.errors import ConfigError


def encode_metrics(metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """Metrics as JSON data; numbers of numpy and torch become plain ones."""
    if not isinstance(metrics, Mapping | None):
        raise ConfigError(f"metrics must be a dict such as {{'loss': 0.5}}, not {metrics!r}")
    if not metrics:
        return {}
    plain = {k: v.item() if _is_number(v) else v for k, v in (metrics or {}).items()}
    return tree.encode(plain, "metrics")


def _is_number(value: Any) -> bool:
    one = isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_meta
    return one or isinstance(value, np.generic)


def run_info(threads: int) -> dict[str, Any]:
    """What wrote a checkpoint: versions, machine, and the run's configuration if it has one.

    Args:
        threads: How many threads the training thread computes with.
    """
    info: dict[str, Any] = {
        "planaria": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": threads,
        "host": platform.node(),
    }
    folder = os.environ.get("PLANARIA_RUN_DIR")
    if folder is not None:
        with contextlib.suppress(OSError), open(os.path.join(folder, "config.yaml")) as file:
            info["config"] = file.read()
    return info
