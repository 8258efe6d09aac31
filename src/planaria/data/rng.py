"""The random numbers of a micro-batch: the same in any process, and apart from the trainer's."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def micro_batch_seed(seed: int, step: int, micro_batch: int) -> int:
    """Returns the seed of everything random in a micro-batch.

    Args:
        seed: Seed of the run, any integer.
        step: Number of the step, from 0.
        micro_batch: Index of the micro-batch in its step, from 0.

    Returns:
        64 bits, unsigned: a BLAKE2b hash of the three, so that neighbours have nothing in common.
    """
    text = f"micro-batch/1 {seed} {step} {micro_batch}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def seed_rng(seed: int) -> None:
    """Seeds the global generators of python, numpy and torch (CPU) with 64 bits."""
    import torch

    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    # torch.manual_seed would also seed the accelerators, whose streams are the trainer's.
    torch.default_generator.manual_seed(seed)


@contextmanager
def kept_rng() -> Iterator[None]:
    """Gives the global generators of python, numpy and torch (CPU) back as they were."""
    import torch

    saved = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])
        torch.set_rng_state(saved[2])
