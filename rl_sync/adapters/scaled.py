"""Rollouts in fp8 with scales: what the trainer quantises, they get bit for bit.

A `ScaledCopy` of the trainer's module holds fp8 weights and their scales as ordinary tensors, under
the names that inference engines read (`weight`, and `weight_scale_inv` by block or `weight_scale`
by tensor; in both cases a weight is its fp8 number times its scale). A publisher of the copy sends
what changed of both, and the two are always of one version.

Scales are powers of two by default, as in the microscaling formats (OCP MX 1.0): dividing by them
is exact, so rounding to fp8 is the only rounding, and a scale moves only when its largest weight
passes a power of two. With free scales nearly every step moves nearly every scale, and with it
many of the fp8 numbers, for no more than a bit of precision.

Of a sharded module (FSDP2, with tensor parallelism or not) each rank quantises its own part; ranks
agree on the largest weight of each block, as a block may lie on several, and all hold all scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from planaria.checkpoint.state.entries import locate
from planaria.checkpoint.state.modules import ModuleProvider, named_parameters
from planaria.core.box import Box
from planaria.errors import CollectiveError, ConfigError, NotSupportedError, StateError
from planaria.rl_sync.layout.target import tensors_of

_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


class ScaledCopy(nn.Module):
    """Weights of a module in fp8 with scales, and its other tensors in one dtype.

    It has no forward; it is what a `Publisher` publishes. Call `refresh` before each `publish`; of
    a sharded module on all ranks, for it is a collective there, as making the copy is.
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
            model: The trainer's module: plain, compiled, DDP, FSDP2, FSDP2 with tensor parallelism.
            dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
            block: Rows and columns that share a scale; None for one scale a tensor.
            scaled: Which parameters are quantised, by name and value; by default the matrices of
                `nn.Linear` that no other module shares.
            rest: Dtype of the floating-point tensors that are not.
            powers_of_two: Whether scales are powers of two.

        Raises:
            ConfigError: The dtype is no fp8, or a block is empty.
            NotSupportedError: A parameter to be quantised is no matrix.
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
        """Takes the module's weights as they are now; between two optimizer steps.

        Raises:
            StateError: A parameter is not sharded as it was when the copy was made.
            CollectiveError: Another rank is gone.
        """
        (source,) = self._source
        ModuleProvider("", source).reshard()
        scaled: list[_Scaled] = []
        for name, tensor in tensors_of(source).items():
            numbers, scales = self._pairs[name]
            (box, local), (there, target) = locate(name, tensor), locate(name, numbers)
            if there != box:
                raise StateError(f"{name} was sharded otherwise when it was copied; copy it anew")
            if scales is None:
                target.copy_(local)
            else:
                block = self._block or tuple(tensor.shape)
                grid = scales.view(_grid(tensor.shape, block))
                mesh = numbers.device_mesh if isinstance(numbers, DTensor) else None
                scaled.append(_Scaled(box, local, target, grid, block, mesh))
        largest = [part.largest() for part in scaled]
        self._agree([(part.mesh, most) for part, most in zip(scaled, largest, strict=True)])
        for part, most in zip(scaled, largest, strict=True):
            part.scales.copy_(scales_for(most, part.numbers.dtype, powers_of_two=self._powers))
            part.quantise()

    def _agree(self, largest: Sequence[tuple[DeviceMesh | None, torch.Tensor]]) -> None:
        """Makes the largest weights of blocks those of all ranks that a matrix is sharded over."""
        meshes = {mesh: None for mesh, _ in largest if mesh is not None}
        for mesh in meshes:
            mine = [most for of, most in largest if of == mesh]
            flat = torch.cat([most.reshape(-1) for most in mine])
            for group in mesh.get_all_groups():
                try:
                    dist.all_reduce(flat, dist.ReduceOp.MAX, group=group)
                except RuntimeError as error:
                    raise CollectiveError(
                        f"ranks could not agree on scales ({str(error).splitlines()[0]}); another "
                        "rank has probably died: see its log"
                    ) from error
            for most, found in zip(mine, flat.split([m.numel() for m in mine]), strict=True):
                most.copy_(found.view(most.shape))

    def _new(
        self,
        name: str,
        tensor: torch.Tensor,
        dtype: torch.dtype,
        rest: torch.dtype,
        chosen: Callable[[str, torch.Tensor], bool],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not (tensor.is_floating_point() and chosen(name, tensor)):
            return _empty_like(tensor, rest if tensor.is_floating_point() else tensor.dtype), None
        if tensor.ndim != 2:
            raise NotSupportedError(
                f"{name} has {tensor.ndim} dimensions; only matrices are quantised: leave it out "
                "with scaled="
            )
        shape = () if self._block is None else _grid(tensor.shape, self._block)
        numbers = _empty_like(tensor, dtype)
        return numbers, torch.empty(shape, dtype=torch.float32, device=tensor.device)


@dataclass
class _Scaled:
    """What this rank holds of a matrix, and the scales of all of it.

    Attributes:
        box: Where in the matrix it is.
        source: The weights there.
        numbers: Their fp8 numbers.
        scales: Of each block of the whole matrix, of shape (rows of blocks, columns of blocks).
        block: Rows and columns of a block.
        mesh: What the matrix is sharded over, if it is.
    """

    box: Box
    source: torch.Tensor
    numbers: torch.Tensor
    scales: torch.Tensor
    block: tuple[int, ...]
    mesh: DeviceMesh | None

    def largest(self) -> torch.Tensor:
        """The largest magnitude in each block, as far as it lies here; of the scales' shape."""
        found = torch.zeros_like(self.scales)
        left, columns = self.box.offset[1], self.block[1]
        for row, part in self._rows(self.source):
            before = left % columns
            padded = pad(part.abs(), (before, -(before + part.shape[1]) % columns))
            most = padded.view(len(part), -1, columns).amax(dim=(0, 2))
            # Ranks take the largest of theirs; a NaN has no place in that order.
            most = torch.where(most.isfinite(), most, torch.inf)
            first = left // columns
            found[row, first : first + len(most)] = most
        return found

    def quantise(self) -> None:
        """Rounds the weights to fp8 by the scales."""
        left, columns = self.box.offset[1], self.block[1]
        spread = self.scales.repeat_interleave(columns, 1)[:, left : left + self.box.extent[1]]
        targets = self._rows(self.numbers, as_floats=False)
        for (row, part), (_, target) in zip(self._rows(self.source), targets, strict=True):
            target.copy_((part / spread[row]).to(target.dtype))

    def _rows(
        self, tensor: torch.Tensor, as_floats: bool = True
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """A row of blocks at a time: its number and what is here of it; none where that is none."""
        if not self.box.volume:
            return
        top, rows = self.box.offset[0], self.block[0]
        start = 0
        while start < len(tensor):
            row = (top + start) // rows
            stop = min((row + 1) * rows - top, len(tensor))
            yield row, tensor[start:stop].float() if as_floats else tensor[start:stop]
            start = stop


def _grid(shape: Sequence[int], block: Sequence[int]) -> tuple[int, int]:
    """How many rows and columns of blocks there are."""
    return -(-shape[0] // max(block[0], 1)), -(-shape[1] // max(block[1], 1))


def _empty_like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of another dtype, sharded as the first."""
    if not isinstance(tensor, DTensor):
        return torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    local = torch.empty_like(tensor._local_tensor, dtype=dtype, requires_grad=False)
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False,
        shape=tensor.shape, stride=tensor.stride(),
    )  # fmt: skip


def scales_for(
    largest: torch.Tensor, dtype: torch.dtype, *, powers_of_two: bool = True
) -> torch.Tensor:
    """The scales of blocks.

    Args:
        largest: The largest magnitude of each block, float32.
        dtype: The fp8 format.
        powers_of_two: Whether to round up to powers of two.

    Returns:
        float32, of the same shape; 1 for a block of zeros, or one with infinities or NaNs.
    """
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
