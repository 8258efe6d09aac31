"""What a save need not write: which digests are known, and where their bytes lie.

All ranks refer to what one and the same committed step holds, the newest that rank 0 knows, and
rank 0 keeps that step from being removed while the save is under way. So what is referred to is
there until the commit, however many saves overlap and whatever `keep` says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from planaria.checkpoint.capture.packing import Packed, Packer, Places
from planaria.checkpoint.format import checksum
from planaria.checkpoint.format.manifest import FileInfo, Manifest, StoredBox, TensorInfo
from planaria.checkpoint.layout.plan import SavePlan
from planaria.checkpoint.steps_in_use import StepsInUse
from planaria.checkpoint.storage.names import data_label, data_path
from planaria.checkpoint.storage.root import Root
from planaria.errors import StorageError

#: A file of which less is wanted than this is not referred to again: else a few cold tensors would
#: keep many large files from being removed.
MIN_WANTED = 0.25
#: Files that a step refers to, per rank; of more, the next one writes the smaller half's part anew.
MOST_FILES = 64


@dataclass(frozen=True)
class Base:
    """A committed step that saves may refer to.

    Attributes:
        step: Its number.
        attempt: Id of the save that wrote it.
        places: Digest -> where it, or the step that it refers to itself, holds the bytes.
    """

    step: int
    attempt: str
    places: Places


class Unchanged:
    """What one rank knows of committed steps.

    Args:
        steps: Which steps are in use.
    """

    def __init__(self, steps: StepsInUse) -> None:
        self._steps = steps
        self._bases: tuple[Base, ...] = ()  # the newest two: ranks may be one commit apart

    def hold(self) -> Base | None:
        """On rank 0: the step to refer to, None for none; not removed until it is let go."""
        while self._bases:
            base = self._bases[-1]
            if not self._steps.hold(base.step):
                return None
            # Asked after it was held: had it been removed before, a newer one would be known.
            if self._bases and self._bases[-1] is base:
                return base
            self._steps.let_go(base.step)
        return None

    def places(self, attempt: str | None) -> Places:
        """What the step that this attempt wrote holds, as far as this rank knows."""
        return next((b.places for b in self._bases if b.attempt == attempt), {})

    def forget(self) -> None:
        """Nothing is known any more: the next save writes everything."""
        self._bases = ()

    def committed(
        self, step: int, attempt: str, file: FileInfo | None, packed: Sequence[Packed]
    ) -> None:
        """This rank's part of a save is part of a committed step now."""
        mine = None if file is None else replace(file, step=step)
        found = {
            bytes.fromhex(p.digest): (p.file or mine, p.start) for p in packed if p.digest
        }  # fmt: skip
        places = {digest: (f, start) for digest, (f, start) in found.items() if f is not None}
        self._bases = (*self._bases[-1:], Base(step, attempt, places))

    def retire(self, names: Sequence[str] | None) -> None:
        """Files of these names are not referred to by later saves; None stands for all."""
        if names is None:
            self.forget()
        if not names or not self._bases:
            return
        gone, last = set(names), self._bases[-1]
        places = {d: at for d, at in last.places.items() if at[0].name not in gone}
        self._bases = (*self._bases[:-1], replace(last, places=places))

    def restored(self, manifest: Manifest) -> None:
        """The run goes on from this step of its root."""
        self.forget()
        if manifest.checksum != checksum.DEFAULT:  # the next manifest could not say how to verify
            return
        own = [f if f.step is not None else replace(f, step=manifest.step) for f in manifest.files]
        places = {
            bytes.fromhex(digest): (own[b.file], b.start)
            for name, digests in manifest.digests.items()
            for digest, b in zip(digests, manifest.tensors[name].boxes, strict=True)
            if digest
        }
        self._bases = (Base(manifest.step, manifest.attempt, places),)
        self.retire(wasteful(manifest))


@dataclass
class Gathered:
    """What all ranks have written or referred to, as a manifest wants it."""

    files: list[FileInfo] = field(default_factory=list)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    digests: dict[str, list[str]] = field(default_factory=dict)


def to_record(packer: Packer) -> dict[str, Any]:
    """What a rank tells of its part, as JSON data: the files it refers to, and each entry's place.

    In a place, 0 stands for the file that the rank writes, n for the n-th that it refers to.
    """
    places: list[list[Any]] = []
    by_name: dict[str, FileInfo] = {}
    numbers: dict[str, int] = {}
    for packed in packer.packed:
        number = 0
        if packed.file is not None:
            by_name[packed.file.name] = packed.file
            number = numbers.setdefault(packed.file.name, len(numbers) + 1)
        places.append([number, packed.start, packed.digest])
    return {"files": [f.to_json() for f in by_name.values()], "places": places}


def gather(
    plan: SavePlan,
    own: Sequence[FileInfo | None],
    records: Sequence[Mapping[str, Any]],
    nan_names: set[str],
) -> Gathered:
    """Puts together what ranks tell.

    Args:
        plan: Who has which entries.
        own: The file that each rank has written.
        records: What each has made by `to_record`.
        nan_names: Tensors in which a NaN was seen.
    """
    result = Gathered(files=[file for file in own if file is not None])
    numbers = {file.name: i for i, file in enumerate(result.files)}
    boxes: dict[str, list[StoredBox]] = {name: [] for name in plan.shapes}
    digests: dict[str, list[str]] = {name: [] for name in plan.shapes}
    for rank, entries in plan.entries.items():
        mine = own[rank]
        files: list[int] = [-1 if mine is None else numbers[mine.name]]
        for data in records[rank]["files"]:
            file = FileInfo.from_json(data)
            if file.name not in numbers:
                numbers[file.name] = len(result.files)
                result.files.append(file)
            files.append(numbers[file.name])
        for entry, (number, start, digest) in zip(entries, records[rank]["places"], strict=True):
            boxes[entry.name].append(StoredBox(entry.box, files[number], start))
            digests[entry.name].append(digest)
    result.tensors = {
        name: TensorInfo(plan.dtypes[name], plan.shapes[name], found, name in nan_names)
        for name, found in boxes.items()
    }
    result.digests = {name: found for name, found in digests.items() if any(found)}
    return result


def check_referenced(root: Root, manifest: Manifest) -> None:
    """Makes sure that what a step refers to is there.

    Raises:
        StorageError: It is not.
    """
    for file in manifest.files:
        if file.step is None:
            continue
        size = root.storage.size(data_path(manifest, file))
        if size != file.nbytes:
            state = "is missing" if size is None else f"has {size} bytes instead of {file.nbytes}"
            raise StorageError(
                f"{root.storage.url}/{data_label(file)}, which holds tensors that have not changed "
                f"since, {state}; the next save writes everything anew"
            )


def wasteful(manifest: Manifest) -> list[str]:
    """Names of the files of which a step wants so little that the next should do without them."""
    wanted = [0] * len(manifest.files)
    for info in manifest.tensors.values():
        for b in info.boxes:
            wanted[b.file] += b.box.volume * info.dtype.itemsize
    little = [
        file.name
        for file, nbytes in zip(manifest.files, wanted, strict=True)
        if nbytes < MIN_WANTED * file.data_nbytes
    ]
    others = sorted(
        (nbytes, file.name)
        for file, nbytes in zip(manifest.files, wanted, strict=True)
        if file.step is not None and file.name not in little
    )
    many = len(others) > MOST_FILES * manifest.world_size
    return little + [name for _, name in others[: len(others) // 2 if many else 0]]
