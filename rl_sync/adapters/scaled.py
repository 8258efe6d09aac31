"""Rollouts in fp8 with scales: what the trainer quantises, they get bit for bit.

A `ScaledCopy` of the trainer's module holds fp8 weights and their scales as ordinary tensors, under
the names that inference engines read (`weight`, and `weight_scale_inv` by block or `weight_scale`
by tensor; in both cases a weight is its fp8 number times its scale). A publisher of the copy sends
what changed of both, and the two are always of one version.

Scales are powers of two by default, as in the microscaling formats (OCP MX 1.0): dividing by them
is exact, so rounding to fp8 is the only rounding, and a scale moves only when its largest weight
passes a power of two. With free scales nearly every step moves nearly every scale, and with it
many of the fp8 numbers, for no more than a bit of precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from planaria.checkpoint.state.modules import named_parameters
from planaria.errors import ConfigError, NotSupportedError
from planaria.rl_sync.layout.target import tensors_of

_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


class ScaledCopy(nn.Module):
    """Weights of a module in fp8 with scales, and its other tensors in one dtype.

    It has no forward; it is what a `Publisher` publishes. Call `refresh` before each `publish`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype = torch.float8_e4m3fn,
        block: tuple[int, int] | None = (128, 128),
        scaled: Callable[[str, torch.Tensor], bool] | None = None,
        rest: torch.dtype = torch.bfloat16,
        powers_of_two: bool = True,
    ) -> None:
        """Makes the copy, as the module is now.

        Args:
            model: The trainer's module: plain, compiled or DDP.
            dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
            block: Rows and columns that share a scale; None for one scale a tensor.
            scaled: Which parameters are quantised, by name and value; by default the matrices of
                `nn.Linear` that no other module shares.
            rest: Dtype of the floating-point tensors that are not.
            powers_of_two: Whether scales are powers of two.

        Raises:
            ConfigError: The dtype is no fp8, or a block is empty.
            NotSupportedError: A parameter is sharded, or one to be quantised is no matrix.
        """
        super().__init__()
        if dtype not in _DTYPES:
            raise ConfigError(
                f"{dtype} is no fp8 format; give one of {', '.join(map(str, _DTYPES))}"
            )
        if block is not None and min(block) < 1:
            raise ConfigError(f"a block of {block[0]} x {block[1]} weights has none")
        self._source = (model,)  # in a tuple: its parameters are not this module's
        self._block, self._powers = block, powers_of_two
        suffix = "_scale" if block is None else "_scale_inv"
        chosen = scaled or _linear_only(model)
        parameters = dict(named_parameters(model))
        self._pairs: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
        made: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        for name, tensor in tensors_of(model).items():
            if isinstance(tensor, DTensor):
                raise NotSupportedError(
                    f"{name} is sharded, and blocks of scales may cross its shards: publish the "
                    "module itself, and quantise where the rollout loads it"
                )
            pair = made.get(id(parameters.get(name, tensor)))
            if pair is None:
                pair = self._new(name, tensor, dtype, rest, chosen)
                made[id(parameters.get(name, tensor))] = pair
            self._pairs[name] = pair
            _register(self, name, pair[0])
            if pair[1] is not None:
                _register(self, name + suffix, pair[1])
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes the module's weights as they are now; between two optimizer steps."""
        for name, tensor in tensors_of(self._source[0]).items():
            numbers, scales = self._pairs[name]
            if scales is None:
                numbers.copy_(tensor)
                continue
            rows = len(tensor) if self._block is None else self._block[0]
            for i in range(0, len(tensor), rows):  # as much as a row of blocks in fp32 at once
                part = tensor[i : i + rows].detach().float()
                columns = part.shape[1] if self._block is None else self._block[1]
                found = scales_of(part, columns, numbers.dtype, powers_of_two=self._powers)
                spread = found.repeat_interleave(columns)[: part.shape[1]]
                numbers[i : i + rows].copy_((part / spread).to(numbers.dtype))
                scales.view(-1, len(found))[i // rows].copy_(found)

    def _new(
        self,
        name: str,
        tensor: torch.Tensor,
        dtype: torch.dtype,
        rest: torch.dtype,
        chosen: Callable[[str, torch.Tensor], bool],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not (tensor.is_floating_point() and chosen(name, tensor)):
            kept = rest if tensor.is_floating_point() else tensor.dtype
            return torch.empty(tensor.shape, dtype=kept, device=tensor.device), None
        if tensor.ndim != 2:
            raise NotSupportedError(
                f"{name} has {tensor.ndim} dimensions; only matrices are quantised: leave it out "
                "with scaled="
            )
        shape = () if self._block is None else tuple(
            -(-n // b) for n, b in zip(tensor.shape, self._block, strict=True)
        )  # fmt: skip
        numbers = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
        return numbers, torch.empty(shape, dtype=torch.float32, device=tensor.device)


def scales_of(
    rows: torch.Tensor, columns: int, dtype: torch.dtype, *, powers_of_two: bool = True
) -> torch.Tensor:
    """The scales of one row of blocks.

    Args:
        rows: The rows of the blocks, float32.
        columns: Columns of a block; the last block may have fewer.
        dtype: The fp8 format.
        powers_of_two: Whether to round up to powers of two.

    Returns:
        float32, of shape (blocks,); 1 for a block of zeros, or one with infinities or NaNs.
    """
    padded = pad(rows.abs(), (0, -rows.shape[1] % columns))
    largest = padded.view(len(rows), -1, columns).amax(dim=(0, 2))
    scales = largest / torch.finfo(dtype).max
    if powers_of_two:
        mantissa, exponent = torch.frexp(scales)
        exponent -= (mantissa == 0.5).to(exponent.dtype)
        scales = torch.ldexp(torch.ones_like(scales), exponent.clamp(min=-126))
    usable = (largest > 0) & largest.isfinite() & (scales > 0)
    return torch.where(usable, scales, torch.ones_like(scales))


def unscaled(
    numbers: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None = (128, 128)
) -> torch.Tensor:
    """The weights that fp8 numbers and their scales stand for, float32."""
    if block is None:
        return numbers.float() * scales
    spread = scales.repeat_interleave(block[0], 0)[: len(numbers)]
    return numbers.float() * spread.repeat_interleave(block[1], 1)[:, : numbers.shape[1]]


def _linear_only(model: nn.Module) -> Callable[[str, torch.Tensor], bool]:
    def holders() -> Iterator[tuple[int, bool]]:
        for part in model.modules():
            for parameter in part._parameters.values():
                if parameter is not None:
                    yield id(parameter), isinstance(part, nn.Linear) and parameter.ndim == 2

    found: dict[int, bool] = {}
    for key, linear in holders():
        found[key] = found.get(key, True) and linear
    names = {name for name, p in named_parameters(model) if found[id(p)]}
    return lambda name, tensor: name in names


def _register(root: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Puts a tensor where a module of the source's structure would have it."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        inner = root._modules[part]
        assert inner is not None
        root = inner
    root.register_buffer(last, tensor)
