"""Random numbers of a micro-batch: a function of (seed, step, micro-batch), never of the rank.

Dropout and whatever else draws from the global generators of torch, numpy or python while a
micro-batch is computed sees the same numbers wherever that happens. They have nothing in common
with those that its data was read with (`planaria.data`).
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from planaria.data.rng import kept_rng, seed_rng

if TYPE_CHECKING:
    import torch


def compute_seed(seed: int, step: int, micro_batch: int) -> int:
    """Returns the seed of what is random in computing a micro-batch.

    Args:
        seed: Seed of the run, any integer.
        step: Number of the step, from 0.
        micro_batch: Index of the micro-batch in its step, from 0.

    Returns:
        64 bits, unsigned: a BLAKE2b hash of the three.
    """
    text = f"compute/1 {seed} {step} {micro_batch}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@contextmanager
def micro_batch_rng(seed: int, step: int, micro_batch: int) -> Iterator[None]:
    """A block that computes one micro-batch, forward and backward.

    Sets the global generators of python, numpy and torch, on the CPU and on every CUDA device that
    is in use, and gives them back as they were when the block ends, however it ends. Generators
    that the model made for itself are its own affair. Other threads share the global generators.

    Args:
        seed: Seed of the run, any integer.
        step: Number of the step, from 0.
        micro_batch: Index of the micro-batch in its step, from 0.
    """
    number = compute_seed(seed, step, micro_batch)
    generators = _cuda_generators()
    states = [generator.get_state() for generator in generators]
    with kept_rng():
        seed_rng(number)
        for generator in generators:
            generator.manual_seed(number & (1 << 63) - 1)
        try:
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def _cuda_generators() -> "list[torch.Generator]":
    import torch

    # Before the first use of CUDA there is nothing to keep, and asking would start it.
    return list(torch.cuda.default_generators) if torch.cuda.is_initialized() else []
