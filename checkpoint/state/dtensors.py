"""Which box of a DTensor this rank holds, worked out from its placements alone."""

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from planaria.core.box import Box
from planaria.errors import StateError


def local_box(name: str, tensor: DTensor) -> Box:
    """The box of this rank's local data.

    Raises:
        StateError: A placement holds no plain part of the tensor (partial sums), or the box does
            not fit the local data.
    """
    # Newer releases of torch can cut in another order than that of the mesh.
    order = getattr(tensor._spec, "shard_order", None) or ()
    if any(list(entry.mesh_dims) != sorted(entry.mesh_dims) for entry in order):
        raise StateError(
            f"tensor {name!r} is cut in the order {order}, which cannot be saved; redistribute it "
            "to be cut in the order of its mesh"
        )
    box = placed_box(name, tuple(tensor.shape), tensor.device_mesh, tensor.placements)
    local = tensor._local_tensor
    if tuple(local.shape) != box.extent and (local.numel() or box.volume):
        raise StateError(
            f"tensor {name!r}: this rank holds {tuple(local.shape)}, but its placements "
            f"{tensor.placements} over mesh {tuple(tensor.device_mesh.shape)} say {box.extent}; "
            "this placement is not understood"
        )
    return box


def placed_box(
    name: str, shape: tuple[int, ...], mesh: DeviceMesh, placements: Sequence[Placement]
) -> Box:
    """The box that these placements give to this rank.

    Shards are cut as `torch.chunk` does, mesh dimension by mesh dimension.

    Raises:
        StateError: A placement holds no plain part of the tensor.
    """
    coordinate = mesh.get_coordinate()
    offset, extent = [0] * len(shape), list(shape)
    if coordinate is None:  # this rank is not in the mesh
        return Box(tuple(offset), (0,) * len(shape))
    for mesh_dim, dim in _cuts(name, mesh, placements):
        parts, index = mesh.size(mesh_dim), coordinate[mesh_dim]
        size = -(-extent[dim] // parts)
        start = min(index * size, extent[dim])
        offset[dim] += start
        extent[dim] = min(size, extent[dim] - start)
    return Box(tuple(offset), tuple(extent))


def _cuts(name: str, mesh: DeviceMesh, placements: Sequence[Placement]) -> list[tuple[int, int]]:
    """Which mesh dimension cuts which tensor dimension, in the order of the cuts.

    That is from left to right, but for strided shards: one of these says how many parts there were
    before it cut. So FSDP2 cuts what tensor parallelism, to its right, has left.
    """
    order: dict[int, list[int]] = {}
    for mesh_dim, placement in reversed(list(enumerate(placements))):
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, Shard | _StridedShard):
            raise StateError(
                f"tensor {name!r} is placed as {placement!r}, which holds no part of its values; "
                "redistribute it to Shard or Replicate before saving"
            )
        before = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
        dims = order.setdefault(placement.dim, [])
        parts = list(accumulate((mesh.size(d) for d in dims), mul, initial=1))
        if before not in parts:
            raise StateError(
                f"tensor {name!r} is placed as {tuple(placements)} over mesh {tuple(mesh.shape)}: "
                "a rank holds strips of it, not a block; redistribute it to Shard or Replicate "
                "before saving"
            )
        dims.insert(parts.index(before), mesh_dim)
    return [(mesh_dim, dim) for dim, dims in order.items() for mesh_dim in dims]


def slot_like(shape: tuple[int, ...], dtype: torch.dtype, param: DTensor) -> DTensor:
    """A zeroed DTensor for an optimizer slot, placed as its parameter where the shapes agree.

    A dimension that the slot has with another size (factored statistics) is replicated.
    """
    placements: list[Placement] = []
    for p in param.placements:
        same = (
            isinstance(p, Shard | _StridedShard)
            and p.dim < len(shape)
            and shape[p.dim] == param.shape[p.dim]
        )
        placements.append(p if same else Replicate())
    mesh, device = param.device_mesh, param._local_tensor.device
    box = placed_box("a slot", shape, mesh, placements)
    return DTensor.from_local(
        torch.zeros(box.extent, dtype=dtype, device=device),
        mesh,
        placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    )
