"""A dataset in a module that a spawned worker can import: pytest's own test modules can't be."""

import random

import numpy as np
import torch


class Numbers:
    """Map-style; draws from all three generators."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, i: int) -> tuple[int, float, float, float]:
        return i, random.random(), float(np.random.random()), float(torch.rand(()))
