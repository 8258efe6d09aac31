"""What a state provider is, and what it sees of a checkpoint when it loads."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch.distributed.tensor import DTensor

from planaria.checkpoint.format.manifest import Manifest
from planaria.checkpoint.layout.transforms import SourceTensor
from planaria.checkpoint.state.entries import Collector, KnownTensor, locate, memory_key
from planaria.core.box import Box
from planaria.errors import MismatchError, StateError


@runtime_checkable
class Provider(Protocol):
    """One part of the training state."""

    key: str

    def collect(self, out: Collector) -> None:
        """Says which boxes and objects this rank holds now. Changes nothing."""

    def load(self, plan: "LoadPlan") -> None:
        """Says where the checkpoint's tensors go, and what to do once they are there.

        It must not change anything itself: it may still turn out that the checkpoint is damaged.
        """


class Recallable(Provider, Protocol):
    """A provider whose tensors can be recognised without a walk: see `recall`."""

    def look(self, signs: list[Any], things: list[Any]) -> None:
        """Appends what a walk would come across.

        Args:
            signs: Names, numbers, kinds: equal as long as the walk would find the same tensors.
            things: Tensors and constants: then the very same objects.
        """

    def can_recall(self) -> bool:
        """Whether what was just collected is known by `look` alone."""
        ...

    def recollect(self, out: Collector) -> None:
        """As `collect` of tensors that have all been recognised: adds the objects alone."""


@dataclass(slots=True)
class Target:
    """A tensor that a checkpoint is read into.

    Attributes:
        name: Logical name.
        box: The part of it that this rank holds.
        local: Where it goes, of shape `box.extent`, any strides, any device.
        source: What the checkpoint has under this name.
    """

    name: str
    box: Box
    local: torch.Tensor
    source: SourceTensor


@dataclass
class LoadPlan:
    """Collects what a restore will do on this rank; nothing is changed until it is carried out.

    Attributes:
        manifest: The step that is restored.
        sources: What it holds by name, after transforms and the `only` filter.
        wanted: Whether a name passes the `only` filter.
        rank: This rank.
        world_size: Number of ranks that restore.
        targets: Tensors to fill.
        missing: Names that the state has and the checkpoint has not.
        problems: Names that both have, but that do not fit, with the reason.
        skipped: Names that are left out, with the reason.
        used: Names of the checkpoint that found a place.
        known: What is known of the state's tensors, by name.
    """

    manifest: Manifest
    sources: dict[str, SourceTensor]
    wanted: Callable[[str], bool]
    rank: int
    world_size: int
    targets: list[Target] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    known: Mapping[str, KnownTensor] = field(default_factory=dict)
    _finish: list[Callable[[], None]] = field(default_factory=list)
    _places: dict[tuple[Any, ...], Target] = field(default_factory=dict)

    def names(self, prefix: str) -> Iterator[str]:
        """Names of tensors in the checkpoint that begin with a prefix."""
        return (name for name in self.sources if name.startswith(prefix))

    def tensor(self, name: str, live: torch.Tensor) -> bool:
        """Reads the checkpoint's tensor of this name into a live one; False where that cannot be.

        A missing name or a misfit is noted, and becomes an error where the restore is strict.
        """
        if not self.wanted(name):
            return False
        source = self.sources.get(name)
        if source is None:
            self.missing.append(name)
            return False
        self.used.add(name)
        if source.shape != tuple(live.shape):
            self.problems.append(
                f"{name}: shape {list(source.shape)} in the checkpoint, {list(live.shape)} here"
            )
            return False
        if source.dtype.dtype != live.dtype:
            self.problems.append(
                f"{name}: dtype {source.dtype.name} in the checkpoint, "
                f"{str(live.dtype).removeprefix('torch.')} here"
            )
            return False
        if isinstance(live, DTensor) and live.device_mesh.get_coordinate() is None:
            return True  # its mesh leaves this rank out
        known = self.known.get(name)
        local = known.local_if_same(live) if known is not None else None
        if known is not None and local is not None:
            box, place = known.box, None if known.key is None else known.key[0]
        else:
            box, local = locate(name, live)
            place = memory_key(local) if local.numel() else None
        if local.is_inference() and not torch.is_inference_mode_enabled():
            raise StateError(
                f"{name!r} was made in torch.inference_mode() and cannot be written outside of it; "
                "make the state outside of it"
            )
        target = Target(name, box, local, source)
        first = self._places.setdefault(place, target) if place is not None else target
        if first.source.parts != source.parts:
            self.problems.append(
                f"{name}: the same memory as {first.name} here (tied weights), but not in the "
                "checkpoint"
            )
            return False
        self.targets.append(target)
        return True

    def object(self, name: str, *, optional: bool = False) -> Any | None:
        """The checkpoint's object of this name as JSON data, None where there is none for us."""
        if not self.wanted(name):
            return None
        stored = self.manifest.objects.get(name)
        if stored is None:
            if not optional:
                self.missing.append(name)
            return None
        self.used.add(name)
        if "all" in stored:
            return stored["all"]
        if self.manifest.world_size != self.world_size or str(self.rank) not in stored["ranks"]:
            self.problems.append(
                f"{name}: differs between the {self.manifest.world_size} ranks that saved it, and "
                f"has no meaning on rank {self.rank} of {self.world_size}"
            )
            return None
        return stored["ranks"][str(self.rank)]

    def objects_of_all_ranks(self, name: str) -> list[Any]:
        """The distinct values of an object over the ranks that saved it, in rank order."""
        if not self.wanted(name):
            return []
        stored = self.manifest.objects.get(name)
        if stored is None:
            self.missing.append(name)
            return []
        self.used.add(name)
        if "all" in stored:
            return [stored["all"]]
        return [stored["ranks"][r] for r in sorted(stored["ranks"], key=int)]

    def then(self, action: Callable[[], None]) -> None:
        """Runs `action` once all targets are filled, in the order given."""
        self._finish.append(action)

    def finish(self) -> None:
        """Carries out what was planned for after the tensors."""
        for action in self._finish:
            action()

    def names_wanted(self) -> list[str]:
        """All names of the checkpoint that pass the filter, in the same order on all ranks."""
        return [n for n in (*self.sources, *self.manifest.objects) if self.wanted(n)]

    def check(self, strict: bool, unexpected: list[str]) -> None:
        """Raises for everything that does not fit, or moves it to `skipped` if not strict.

        Args:
            strict: Whether to raise.
            unexpected: Names of the checkpoint that found no place on any rank.

        Raises:
            MismatchError: Lists all of it.
        """
        if strict and (self.missing or unexpected or self.problems):
            parts = [
                _listing("in the state but not in the checkpoint", self.missing),
                _listing("in the checkpoint but not in the state", unexpected),
                _listing("do not fit", self.problems),
            ]
            raise MismatchError(
                f"step {self.manifest.step} does not match the state to restore: "
                + "; ".join(p for p in parts if p)
                + ". Name what you want with only=[...], map names with transforms=[...], or pass "
                "strict=False to load what matches"
            )
        for problem in self.problems:
            name, _, reason = problem.partition(": ")
            self.skipped[name] = reason
        self.skipped.update((name, "not in the state") for name in unexpected)


def _listing(what: str, names: list[str], limit: int = 20) -> str:
    if not names:
        return ""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} {what}: {', '.join(sorted(names)[:limit])}{more}"
