"""What a checkpoint's names look like to the state that is restored.

Transforms work on boxes, not on data: a target tensor is described as parts of stored tensors, and
only the bytes of those parts are read. They are applied in order, each to the result of the last.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

from planaria.checkpoint.format.dtypes import StoredDtype
from planaria.checkpoint.format.manifest import Manifest
from planaria.core.box import Box
from planaria.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a source tensor, and where it comes from.

    Attributes:
        box: Its place in the tensor that is described.
        stored: Name of the stored tensor; None for a constant.
        offset: First index of the part in the stored tensor.
        fill: Value of the constant.
    """

    box: Box
    stored: str | None
    offset: tuple[int, ...]
    fill: float = 0.0


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor that can be read from a checkpoint.

    Attributes:
        dtype: Stored dtype.
        shape: Global shape.
        parts: Disjoint parts; together the whole tensor.
    """

    dtype: StoredDtype
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def crop(self, box: Box) -> "SourceTensor":
        """The tensor that this box of it is."""
        parts = []
        for part in self.parts:
            common = part.box.intersect(box)
            if common is not None:
                inner = common.relative_to(part.box).shifted(part.offset).offset
                parts.append(replace(part, box=common.relative_to(box), offset=inner))
        return replace(self, shape=box.extent, parts=tuple(parts))


Sources = dict[str, SourceTensor]


class Transform(Protocol):
    """Maps the tensors of a checkpoint to the ones that the state asks for."""

    def __call__(self, sources: Sources) -> Sources:
        """Returns the new names; does not change its argument.

        Raises:
            ConfigError: It applies to nothing, or its sizes do not fit.
        """
        ...


def sources_of(manifest: Manifest) -> Sources:
    """Every tensor of a step under its own name and its aliases."""
    found: Sources = {}
    for name, info in manifest.tensors.items():
        whole = Box.full(info.shape)
        found[name] = SourceTensor(info.dtype, info.shape, (Part(whole, name, whole.offset),))
    found.update((alias, found[name]) for alias, name in manifest.aliases.items())
    return found


@dataclass(frozen=True)
class Rename:
    """Renames tensors.

    Args:
        old: A name, with at most one ``*``, or a function of a name that returns the new one.
        new: The new name, with a ``*`` where `old` has one.
    """

    old: str | Callable[[str], str]
    new: str = ""

    def __call__(self, sources: Sources) -> Sources:
        """See `Transform`."""
        if callable(self.old):
            names = {name: self.old(name) for name in sources}
        else:
            _check_stars(self, [self.old, self.new])
            matches = _matches(self.old, sources)
            names = {n: _fill_in(self.new, m) for m, n in matches.items()}
        if all(old == new for old, new in names.items()):
            raise ConfigError(f"{self} changes no name of the checkpoint")
        renamed = {names.get(name, name): source for name, source in sources.items()}
        if len(renamed) < len(sources):
            raise ConfigError(f"{self} gives two tensors the same name")
        return renamed


@dataclass(frozen=True)
class Fuse:
    """Concatenates tensors into one, such as q, k and v into qkv.

    Args:
        parts: Names in order, each with at most one ``*``, filled in alike.
        into: Name of the result.
        dim: Dimension along which they are joined.
    """

    parts: Sequence[str]
    into: str
    dim: int = 0

    def __call__(self, sources: Sources) -> Sources:
        """See `Transform`."""
        result = dict(sources)
        _check_stars(self, [*self.parts, self.into])
        for match in _matches(self.parts[0], sources):
            names = [_fill_in(part, match) for part in self.parts]
            lost = [name for name in names if name not in sources]
            if lost:
                raise ConfigError(f"{self}: the checkpoint has no tensor {lost[0]!r}")
            tensors = [result.pop(name) for name in names]
            dim = _dimension(self, self.dim, tensors[0].shape)
            shapes = {(*t.shape[:dim], -1, *t.shape[dim + 1 :]) for t in tensors}
            if len(shapes) > 1 or len({t.dtype for t in tensors}) > 1:
                raise ConfigError(f"{self}: {names} differ in shape or dtype")
            parts, at = [], 0
            for tensor in tensors:
                delta = [0] * len(tensor.shape)
                delta[dim] = at
                parts += [replace(p, box=p.box.shifted(delta)) for p in tensor.parts]
                at += tensor.shape[dim]
            shape = list(tensors[0].shape)
            shape[dim] = at
            fused = replace(tensors[0], shape=tuple(shape), parts=tuple(parts))
            _put(self, result, _fill_in(self.into, match), fused)
        return result


@dataclass(frozen=True)
class Split:
    """Cuts a tensor into several, such as qkv into q, k and v.

    Args:
        name: Its name, with at most one ``*``.
        into: Names of the results, each with its size along `dim`, in order.
        dim: Dimension along which it is cut.
    """

    name: str
    into: Mapping[str, int]
    dim: int = 0

    def __call__(self, sources: Sources) -> Sources:
        """See `Transform`."""
        result = dict(sources)
        _check_stars(self, [self.name, *self.into])
        for match, name in _matches(self.name, sources).items():
            tensor = result.pop(name)
            sizes, dim = list(self.into.values()), _dimension(self, self.dim, tensor.shape)
            if sum(sizes) != tensor.shape[dim]:
                raise ConfigError(f"{self}: {name!r} has {tensor.shape[dim]} indices along "
                                  f"dimension {dim}, not {sum(sizes)}")  # fmt: skip
            starts = [0, *accumulate(sizes)]
            for new, start, size in zip(self.into, starts, sizes, strict=False):
                offset, extent = [0] * len(tensor.shape), list(tensor.shape)
                offset[dim], extent[dim] = start, size
                part = tensor.crop(Box(tuple(offset), tuple(extent)))
                _put(self, result, _fill_in(new, match), part)
        return result


@dataclass(frozen=True)
class Pad:
    """Grows or crops a tensor at its far end, such as a vocabulary padded to a multiple of 64.

    Args:
        name: Its name, with at most one ``*``.
        shape: The new shape.
        fill: Value of the new elements.
    """

    name: str
    shape: Sequence[int]
    fill: float = 0.0

    def __call__(self, sources: Sources) -> Sources:
        """See `Transform`."""
        result = dict(sources)
        for name in _matches(self.name, sources).values():
            tensor = sources[name]
            if len(tensor.shape) != len(self.shape):
                raise ConfigError(f"{self}: {name!r} has shape {tensor.shape}")
            whole, origin = Box.full(self.shape), (0,) * len(self.shape)
            new = whole.subtract(Box.full(tensor.shape))
            kept = tensor.crop(whole)
            constant = tuple(Part(box, None, origin, self.fill) for box in new)
            result[name] = replace(kept, parts=kept.parts + constant)
        return result


def _matches(pattern: str, sources: Sources) -> dict[str, str]:
    """What stands for the ``*`` -> the whole name, for every name that fits."""
    if pattern.count("*") > 1:
        raise ConfigError(f"pattern {pattern!r} has more than one *")
    head, star, tail = pattern.partition("*")
    found = {
        (name[len(head) : len(name) - len(tail)] if star else ""): name
        for name in sources
        if name == pattern
        or (
            star
            and name.startswith(head)
            and name.endswith(tail)
            and len(name) >= len(head) + len(tail)
        )
    }
    if not found:
        raise ConfigError(f"pattern {pattern!r} matches no tensor of the checkpoint")
    return found


def _check_stars(transform: Transform, patterns: Sequence[str]) -> None:
    if len({pattern.count("*") for pattern in patterns}) > 1:
        raise ConfigError(f"{transform}: either all of its names have a *, or none")


def _dimension(transform: Transform, dim: int, shape: tuple[int, ...]) -> int:
    if not -len(shape) <= dim < len(shape):
        raise ConfigError(f"{transform}: shape {list(shape)} has no dimension {dim}")
    return dim % len(shape)


def _put(transform: Transform, result: Sources, name: str, tensor: SourceTensor) -> None:
    if name in result:
        raise ConfigError(f"{transform}: the checkpoint has a tensor {name!r} already")
    result[name] = tensor


def _fill_in(template: str, match: str) -> str:
    return template.replace("*", match, 1)
