"""What differs between two steps, of one run or of two, however their ranks had laid them out.

Both are read side by side in boxes of a few MB, verified as ever, so that two steps that are larger
than memory can be compared.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from planaria.checkpoint.format.manifest import Manifest, TensorInfo
from planaria.checkpoint.reader import Checkpoint
from planaria.checkpoint.state import tree
from planaria.checkpoint.ulp import Distance, distance
from planaria.core.box import Box

#: Bytes of one side that are compared in one go.
BATCH_NBYTES = 32 << 20


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that is not the same on both sides.

    Attributes:
        name: Its name.
        what: ``"values"``, ``"shape"``, ``"dtype"``, ``"only in A"`` or ``"only in B"``.
        dtypes: Its dtype on both sides, None where it is missing.
        shapes: Its shape on both sides, None where it is missing.
        elements: Number of elements (of A, where the shapes differ).
        differing: How many differ; None where values were not compared.
        nan: How many of these are a NaN on one side at least.
        max_abs: Largest absolute difference, NaNs left out.
        max_rel: Largest difference over the larger of both magnitudes.
        max_ulp: Largest distance in units in the last place of its dtype; None for whole numbers.
        worst: Index of the element that differs most.
    """

    name: str
    what: str
    dtypes: tuple[str | None, str | None]
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    elements: int
    differing: int | None = None
    nan: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    max_ulp: int | None = None
    worst: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ObjectDifference:
    """A value in a small object that is not the same on both sides.

    Attributes:
        path: The object's name and the way to the value, such as ``optim.param_groups.0.lr``.
        a: The value in A as JSON data; None where there is none.
        b: The value in B.
        what: ``"values"``, ``"only in A"`` or ``"only in B"``.
    """

    path: str
    a: Any
    b: Any
    what: str = "values"


@dataclass
class Comparison:
    """What differs between two steps.

    Attributes:
        compared: Tensors that are on both sides.
        nbytes: Bytes of tensors that were compared.
        tensors: The tensors that differ.
        objects: The values in small objects that differ.
    """

    compared: int = 0
    nbytes: int = 0
    tensors: list[TensorDifference] = field(default_factory=list)
    objects: list[ObjectDifference] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.tensors and not self.objects

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {"equal": self.equal, **asdict(self)}


def compare(
    a: Checkpoint, b: Checkpoint, wanted: Callable[[str], bool] = lambda _: True
) -> Comparison:
    """Compares two steps bit by bit.

    Args:
        a: One step.
        b: The other.
        wanted: Which tensors and objects to look at, by name.

    Raises:
        CorruptError: What is stored cannot be read.
    """
    found = Comparison()
    same: dict[str, TensorInfo] = {}
    for name in sorted({*a.manifest.names(), *b.manifest.names()}):
        if not wanted(name):
            continue
        here, there = a.manifest.resolve(name), b.manifest.resolve(name)
        if here is not None and there is not None:
            found.compared += 1
            if a.manifest.aliases.get(name) == b.manifest.aliases.get(name) is not None:
                continue  # tied on both sides, and compared under the other name
            if (here.dtype, here.shape) == (there.dtype, there.shape):
                same[name] = here
                continue
        found.tensors.append(_unlike(name, here, there))
    found.nbytes = sum(info.nbytes for info in same.values())
    for name, total in _distances(a, b, same).items():
        if total.differing:
            found.tensors.append(_differing(name, same[name], total))
    found.tensors.sort(key=lambda t: t.name)
    found.objects = list(_objects(a.manifest, b.manifest, wanted))
    return found


def _unlike(name: str, here: TensorInfo | None, there: TensorInfo | None) -> TensorDifference:
    if here is None or there is None:
        what = "only in B" if here is None else "only in A"
    else:
        what = "shape" if here.shape != there.shape else "dtype"
    either = here or there
    assert either is not None
    return TensorDifference(
        name,
        what,
        (here.dtype.name if here else None, there.dtype.name if there else None),
        (here.shape if here else None, there.shape if there else None),
        prod(either.shape),
    )


def _differing(name: str, info: TensorInfo, total: Distance) -> TensorDifference:
    return TensorDifference(
        name,
        "values",
        (info.dtype.name, info.dtype.name),
        (info.shape, info.shape),
        total.elements,
        total.differing,
        total.nan,
        total.max_abs,
        total.max_rel,
        total.max_ulp,
        None if total.worst is None else _unflatten(total.worst, info.shape),
    )


def _distances(a: Checkpoint, b: Checkpoint, same: Mapping[str, TensorInfo]) -> dict[str, Distance]:
    totals: dict[str, Distance] = {}
    for batch in _batches(same):
        pairs = zip(batch, a.read_many(batch), b.read_many(batch), strict=True)
        for (name, box), x, y in pairs:
            part = distance(x, y, same[name].dtype)
            if part.worst is not None:
                inside = _unflatten(part.worst, box.extent)
                index = tuple(o + i for o, i in zip(box.offset, inside, strict=True))
                part.worst = _flatten(index, same[name].shape)
            totals[name] = _sum(totals[name], part) if name in totals else part
    return totals


def _sum(one: Distance, other: Distance) -> Distance:
    ulps = [d.max_ulp for d in (one, other) if d.max_ulp is not None]
    further = other if one.worst is None or other.max_abs > one.max_abs else one
    return Distance(
        one.elements + other.elements,
        one.differing + other.differing,
        one.nan + other.nan,
        max(one.max_abs, other.max_abs),
        max(one.max_rel, other.max_rel),
        max(ulps) if ulps else None,
        further.worst,
    )


def _batches(same: Mapping[str, TensorInfo]) -> Iterator[list[tuple[str, Box]]]:
    """Boxes of all tensors, as many at once as may be in memory, in the order of A's files."""
    batch: list[tuple[str, Box]] = []
    nbytes = 0
    in_order = sorted(same, key=lambda n: min(((b.file, b.start) for b in same[n].boxes),
                                              default=(0, 0)))  # fmt: skip
    for name in in_order:
        itemsize = same[name].dtype.itemsize
        for box in pieces(Box.full(same[name].shape), max(1, BATCH_NBYTES // itemsize)):
            size = box.volume * itemsize
            if batch and nbytes + size > BATCH_NBYTES:
                yield batch
                batch, nbytes = [], 0
            batch.append((name, box))
            nbytes += size
    if batch:
        yield batch


def pieces(box: Box, most: int) -> Iterator[Box]:
    """Cuts a box into slabs of at most `most` elements."""
    if box.volume <= most:
        yield box
        return
    dim = next(d for d, size in enumerate(box.extent) if size > 1)
    row = box.volume // box.extent[dim]
    rows = max(1, most // row)
    for start in range(0, box.extent[dim], rows):
        offset, extent = list(box.offset), list(box.extent)
        offset[dim] += start
        extent[dim] = min(rows, box.extent[dim] - start)
        yield from pieces(Box(tuple(offset), tuple(extent)), most)


def _objects(a: Manifest, b: Manifest, wanted: Callable[[str], bool]) -> Iterator[ObjectDifference]:
    for name in sorted({*a.objects, *b.objects}):
        if not wanted(name):
            continue
        here, there = a.objects.get(name), b.objects.get(name)
        if here is None or there is None:
            yield from _missing(name, here, there, here is None)
        elif "all" in here and "all" in there:
            yield from _values(name, here["all"], there["all"])
        else:
            for rank in sorted({*_ranks(here), *_ranks(there)}, key=int):
                yield from _values(f"{name}[rank {rank}]", _of(here, rank), _of(there, rank))


def _ranks(stored: Mapping[str, Any]) -> list[str]:
    return list(stored.get("ranks", {}))


def _of(stored: Mapping[str, Any], rank: str) -> Any:
    """One rank's value; what all ranks shared is every rank's."""
    return stored["all"] if "all" in stored else stored["ranks"].get(rank)


def _values(path: str, a: Any, b: Any) -> Iterator[ObjectDifference]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            if key not in a or key not in b:
                yield from _missing(f"{path}.{key}", a.get(key), b.get(key), key not in a)
            else:
                yield from _values(f"{path}.{key}", a[key], b[key])
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _values(f"{path}.{i}", x, y)
    elif type(a) is not type(b) or a != b:
        yield ObjectDifference(path, a, b)


def _missing(path: str, a: Any, b: Any, in_b: bool) -> Iterator[ObjectDifference]:
    if tree.references(b if in_b else a) != [path]:  # a tensor, which is told as such
        yield ObjectDifference(path, a, b, "only in B" if in_b else "only in A")


def _flatten(index: tuple[int, ...], shape: tuple[int, ...]) -> int:
    flat = 0
    for i, size in zip(index, shape, strict=True):
        flat = flat * size + i
    return flat


def _unflatten(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        flat, i = divmod(flat, size)
        index.append(i)
    return tuple(reversed(index))
