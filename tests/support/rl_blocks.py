"""Blocks of weights for the tests of weight sync, with every kind of bit pattern in them."""

import numpy as np

from planaria.rl_sync.bits import FORMATS, BitFormat
from planaria.rl_sync.codecs.base import Job
from planaria.rl_sync.diff.scan import Changes, Scanner

FLOATS = [fmt for fmt in FORMATS.values() if fmt.exponent_bits]


def specials(fmt: BitFormat) -> np.ndarray:
    """+0, -0, infinities or the largest numbers, NaNs with payloads, subnormals, one."""
    bits = 8 * fmt.width
    sign, exponent = 1 << (bits - 1), ((1 << fmt.exponent_bits) - 1) << fmt.mantissa_bits
    mantissa = (1 << fmt.mantissa_bits) - 1
    found = [0, sign, exponent, sign | exponent, exponent | 1, exponent | mantissa,
             sign | exponent | mantissa, 1, mantissa, sign | 1, exponent >> 1,
             (1 << bits) - 1]  # fmt: skip
    return np.array(found, dtype=fmt.unsigned)


def weights(fmt: BitFormat, n: int, seed: int = 0, scale: float = 0.02) -> np.ndarray:
    """Bits of n normally distributed numbers, with specials strewn in."""
    import torch

    from planaria.rl_sync.bits import bits_of

    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.normal(0, scale, n).astype(np.float32))
    if fmt.exponent_bits:
        bits = bits_of(values.to(fmt.dtype)).copy()
    else:
        bits = rng.integers(0, 1 << 8 * fmt.width, n, dtype=np.uint64).astype(fmt.unsigned)
        return bits & 1 if fmt.name == "bool" else bits
    at = rng.choice(n, min(n, 24), replace=False)
    bits[at] = np.resize(specials(fmt), at.size)
    return bits


def stepped(fmt: BitFormat, base: np.ndarray, density: float, seed: int = 1) -> np.ndarray:
    """The bits after a step that moves some elements by a few ULP, and a few anywhere."""
    rng = np.random.default_rng(seed)
    live = base.copy()
    hit = np.flatnonzero(rng.random(base.size) < density)
    move = rng.choice([1, -1, 1, -1, 1, -1, 2, 5, 300], hit.size)
    live[hit] = (live[hit].astype(np.int64) + move).astype(fmt.unsigned)
    wild = rng.choice(base.size, min(base.size, 12), replace=False)
    live[wild] = np.resize(specials(fmt), wild.size)
    return live


def job(fmt: BitFormat, base: np.ndarray, live: np.ndarray) -> Job:
    return Job(fmt, base, Scanner().scan([live], base))


def equal(a: Changes, b: Changes) -> bool:
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def drifted(n: int) -> tuple[np.ndarray, np.ndarray]:
    """bf16 weights before and after a step of 1e-6 on their fp32 masters, chance and all."""
    import torch

    from planaria.rl_sync.bits import bits_of

    generator = torch.Generator().manual_seed(0)
    master = torch.randn(n, generator=generator) * 0.02
    after = master + 1e-6 * torch.randn(n, generator=generator)
    return bits_of(master.bfloat16()).copy(), bits_of(after.bfloat16()).copy()
