"""Buckets: flat pieces of about 25 MB that the gradients are added up in.

A bucket is made of segments, runs of elements of one parameter. Buckets follow the parameters from
the last to the first, about the order in which a backward pass finishes them, so that the first
bucket can be sent while the pass goes on. Where a segment has an owner (ZeRO), the segments of one
rank lie together in each bucket.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from planaria.errors import ConfigError, NotSupportedError

if TYPE_CHECKING:
    import torch

BUCKET_BYTES = 25 << 20


@dataclass(frozen=True)
class Segment:
    """A run of a parameter's elements.

    Attributes:
        name: The parameter's name.
        start: First element, row-major.
        stop: One past the last one.
        owner: The rank that keeps the sum of it; None where all do.
        shadows: The ranks that get it from the owner, too.
    """

    name: str
    start: int
    stop: int
    owner: int | None = None
    shadows: tuple[int, ...] = ()


@dataclass
class Bucket:
    """Segments that are added up together.

    Attributes:
        number: Its place in the order in which buckets are sent.
        dtype: What it is added up in.
        segments: What it is made of, with each one's first element in the bucket.
        bounds: Where each rank's part begins, and at last its end, in elements.
        names: The parameters that are in it, wholly or partly.
    """

    number: int
    dtype: "torch.dtype"
    segments: list[tuple[Segment, int]]
    bounds: list[int]
    names: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.names = {segment.name for segment, _ in self.segments}

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.bounds[-1]


def accumulation_dtype(dtype: "torch.dtype") -> "torch.dtype":
    """Returns what gradients of a dtype are added up and sent in.

    float32 for float32, bfloat16 and float16, float64 for float64.

    Raises:
        NotSupportedError: There is no rule for it.
    """
    import torch

    kinds = {
        torch.float32: torch.float32,
        torch.bfloat16: torch.float32,
        torch.float16: torch.float32,
        torch.float64: torch.float64,
    }
    if dtype not in kinds:
        raise NotSupportedError(f"gradients of {dtype} cannot be added up: use a real float dtype")
    return kinds[dtype]


def whole_segments(parameters: "Mapping[str, torch.Tensor]") -> list[Segment]:
    """One segment for each parameter, owned by all."""
    return [Segment(name, 0, p.numel()) for name, p in parameters.items()]


def make_buckets(
    parameters: "Mapping[str, torch.Tensor]",
    segments: Sequence[Segment],
    world_size: int,
    *,
    bucket_bytes: int = BUCKET_BYTES,
) -> list[Bucket]:
    """Puts segments into buckets: a function of its arguments, the same on all ranks.

    Args:
        parameters: Name -> parameter, in the order in which the forward pass uses them.
        segments: They cover every parameter once. Either all have owners or none has.
        world_size: Number of ranks.
        bucket_bytes: Size of a bucket, about: a segment is not cut, unless it has no owner.

    Raises:
        ConfigError: The segments do not cover the parameters, or an owner is no rank.
    """
    _check(parameters, segments, world_size)
    place = {name: i for i, name in enumerate(parameters)}
    groups: dict[Any, list[list[Segment]]] = {}
    room: dict[Any, int] = {}
    for segment in sorted(segments, key=lambda s: (-place[s.name], s.start)):
        dtype = accumulation_dtype(parameters[segment.name].dtype)
        for piece in _pieces(segment, max(1, bucket_bytes // dtype.itemsize)):
            nbytes = (piece.stop - piece.start) * dtype.itemsize
            if dtype not in groups or room[dtype] < nbytes:
                groups.setdefault(dtype, []).append([])
                room[dtype] = bucket_bytes
            groups[dtype][-1].append(piece)
            room[dtype] -= nbytes
    found = [(dtype, pieces) for dtype, lists in groups.items() for pieces in lists]
    # In the order of their last-finished parameter.
    found.sort(key=lambda item: -min(place[s.name] for s in item[1]))
    return [_lay_out(i, d, pieces, world_size) for i, (d, pieces) in enumerate(found)]


def _pieces(segment: Segment, most: int) -> list[Segment]:
    if segment.owner is not None:
        return [segment]
    count = max(1, -(-(segment.stop - segment.start) // most))
    size = -(-(segment.stop - segment.start) // count)
    return [
        Segment(segment.name, a, min(a + size, segment.stop))
        for a in range(segment.start, segment.stop, max(1, size))
    ]


def _lay_out(number: int, dtype: Any, pieces: list[Segment], world_size: int) -> Bucket:
    owned = pieces[0].owner is not None
    if owned:
        # Stable. Those with the same shadows lie together: one message then has all of them.
        pieces = sorted(pieces, key=lambda s: (s.owner or 0, s.shadows))
    at, placed, parts = 0, [], [0] * world_size
    for piece in pieces:
        placed.append((piece, at))
        at += piece.stop - piece.start
        parts[piece.owner or 0] += piece.stop - piece.start
    if owned:
        bounds = [sum(parts[:r]) for r in range(world_size + 1)]
    else:
        bounds = [at * r // world_size for r in range(world_size + 1)]
    return Bucket(number, dtype, placed, bounds)


def _check(
    parameters: "Mapping[str, torch.Tensor]", segments: Sequence[Segment], world_size: int
) -> None:
    ends = dict.fromkeys(parameters, 0)
    for segment in sorted(segments, key=lambda s: (s.name, s.start)):
        if segment.name not in ends:
            raise ConfigError(f"a segment of {segment.name!r}, which is no parameter")
        if segment.start != ends[segment.name] or segment.stop < segment.start:
            raise ConfigError(
                f"elements {ends[segment.name]} to {segment.start} of {segment.name!r} are in no "
                "segment, or in two"
            )
        ends[segment.name] = segment.stop
        if segment.owner is not None and not 0 <= segment.owner < world_size:
            raise ConfigError(f"{segment.name!r}: owner {segment.owner} of {world_size} ranks")
        if not set(range(world_size)) - {segment.owner} >= set(segment.shadows):
            raise ConfigError(
                f"{segment.name!r}: shadows {segment.shadows} of owner {segment.owner} are not "
                f"other ranks of {world_size}"
            )
    for name, end in ends.items():
        if end != parameters[name].numel():
            raise ConfigError(f"elements from {end} on of {name!r} are in no segment")
    if len({segment.owner is None for segment in segments}) > 1:
        raise ConfigError("some segments have an owner and some do not: give all or none")
