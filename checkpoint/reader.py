"""Looking into a checkpoint without the job that wrote it."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from planaria.checkpoint.capture.pool import BufferPool
from planaria.checkpoint.format.checksum import checksum
from planaria.checkpoint.format.manifest import FileInfo, Manifest
from planaria.checkpoint.format.safetensors import parse_header
from planaria.checkpoint.layout.reading import Reader, tensors_in_chunk
from planaria.checkpoint.layout.transforms import SourceTensor, sources_of
from planaria.checkpoint.mapping import map_tensor
from planaria.checkpoint.state import tree
from planaria.checkpoint.state.provider import Target
from planaria.checkpoint.storage.base import Storage, open_storage
from planaria.checkpoint.storage.names import data_label, data_path
from planaria.checkpoint.storage.root import Root
from planaria.core.box import Box
from planaria.errors import ConfigError, CorruptError, NotCommittedError

_POOL_NBYTES, _BUFFER_NBYTES = 64 << 20, 4 << 20


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a checkpoint.

    Attributes:
        file: File name.
        what: What is wrong.
        chunk: Number of the bad chunk, None if it is the whole file or its header.
        tensors: Names of the tensors that it holds.
    """

    file: str
    what: str
    chunk: int | None
    tensors: list[str]

    def __str__(self) -> str:
        where = self.file if self.chunk is None else f"{self.file}, chunk {self.chunk}"
        names = ", ".join(self.tensors[:5]) + (", ..." if len(self.tensors) > 5 else "")
        return f"{where}: {self.what}" + (f" (holds {names})" if names else "")


class Checkpoint:
    """One committed step, read-only.

    Attributes:
        manifest: Everything that is known of it.
    """

    def __init__(self, root: Root, manifest: Manifest) -> None:
        self._root, self.manifest = root, manifest
        self._sources = sources_of(manifest)
        self._pool = BufferPool(_POOL_NBYTES, _BUFFER_NBYTES)

    @property
    def step(self) -> int:
        """Step number."""
        return self.manifest.step

    @property
    def url(self) -> str:
        """Path or URL of the root that it lies in."""
        return self._root.storage.url

    @property
    def metrics(self) -> dict[str, Any]:
        """What was passed to `Checkpointer.step`."""
        return tree.decode(self.manifest.metrics)

    def is_current(self) -> bool:
        """Whether the root still holds what was opened.

        A job that goes on meanwhile removes old steps, and may save one anew: then what was found
        missing is no damage.
        """
        try:
            return self._root.manifest(self.step).attempt == self.manifest.attempt
        except NotCommittedError:
            return False
        except CorruptError:
            return True

    def names(self) -> list[str]:
        """Names of all tensors, aliases included, sorted."""
        return sorted(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape of a tensor."""
        return self._source(name).shape

    def read(self, name: str, box: Box | None = None, *, mapped: bool = False) -> torch.Tensor:
        """Reads a tensor, or a box of it; only the chunks that hold it are read, and verified.

        Args:
            name: A name of `names`.
            box: Which part; all by default.
            mapped: Give a view of the file instead of a copy, where the whole tensor is asked for
                and lies in one piece in a local folder. It takes no memory but the page cache's;
                what is written to it stays in this process.

        Returns:
            A host tensor of shape `box.extent`.

        Raises:
            ConfigError: There is no such tensor or box.
            CorruptError: Its bytes are not what was written.
            NotCommittedError: The step has gone since it was opened.
        """
        if mapped and (box is None or box == Box.full(self.shape(name))):
            found = map_tensor(self._root.storage, self.manifest, name)
            if found is not None:
                return found
        return self.read_many([(name, box)])[0]

    def read_many(self, parts: Sequence[tuple[str, Box | None]]) -> list[torch.Tensor]:
        """Reads several at once: what lies in the same chunks is read once.

        Args:
            parts: Names and boxes, as for `read`, which says what else there is to know.
        """
        targets = []
        for name, part in parts:
            source = self._source(name)
            whole = Box.full(source.shape)
            box = whole if part is None else part
            if len(box.offset) != len(source.shape) or not whole.contains(box):
                raise ConfigError(f"{box} is no part of {name!r}, of shape {list(source.shape)}")
            targets.append(
                Target(name, box, torch.empty(box.extent, dtype=source.dtype.dtype), source)
            )
        try:
            reader = Reader(self._root.storage, self.manifest, targets, self._pool)
            reader.load()  # verifies, too; a pass before would only guard live tensors
        except CorruptError as error:
            if self.is_current():
                raise
            raise NotCommittedError(
                f"step {self.step} of {self.url} was removed, or saved anew, while it was read: a "
                "job goes on there; read a step that it keeps"
            ) from error
        return [target.local for target in targets]

    def object(self, name: str, rank: int = 0) -> Any:
        """A small object, such as ``sched`` or ``optim.param_groups``.

        Args:
            name: Its name.
            rank: Whose, where ranks had different ones.

        Raises:
            ConfigError: There is no such object.
        """
        stored = self.manifest.objects.get(name)
        if stored is None or ("ranks" in stored and str(rank) not in stored["ranks"]):
            raise ConfigError(
                f"step {self.step} has no object {name!r} of rank {rank}; there are "
                f"{', '.join(sorted(self.manifest.objects))}"
            )
        return tree.decode(stored["all"] if "all" in stored else stored["ranks"][str(rank)],
                           self.read)  # fmt: skip

    def verify(self) -> list[Problem]:
        """Reads every byte of the step and compares; an empty list if all is well.

        Of files of other steps, those chunks that hold something of this one.
        """
        return [p for file in self.manifest.files for p in self._verify_file(file)]

    def _verify_file(self, file: FileInfo) -> Iterator[Problem]:
        storage, path = self._root.storage, data_path(self.manifest, file)
        label, own = data_label(file), file.step is None
        number = self.manifest.files.index(file)
        inside = [
            name
            for name, info in self.manifest.tensors.items()
            if any(b.file == number for b in info.boxes)
        ]
        try:
            size = storage.size(path)
            if size is None:
                yield Problem(label, "is missing", None, inside)
                return
            if size != file.nbytes:
                what = f"has {size} bytes instead of {file.nbytes}"
                yield Problem(label, what, None, inside if size < file.nbytes else [])
            header = bytearray(file.data_start if own else 0)
            storage.read_into(path, 0, memoryview(header))
            if own and checksum(header, self.manifest.checksum) != file.header_checksum:
                yield Problem(label, "header is damaged", None, [])
            elif own and len(parse_header(bytes(header))) == 0 and file.data_nbytes:
                yield Problem(label, "header lists no tensors", None, inside)
            used = None if own else self._chunks_used(number)
            for chunk, expected in enumerate(file.chunk_checksums):
                if used is not None and chunk not in used:
                    continue
                start, nbytes = file.chunk_range(chunk)
                there = size - file.data_start - start
                data = bytearray(max(0, min(nbytes, there)))  # no more on a manifest's word
                count = storage.read_into(path, file.data_start + start, memoryview(data))
                if count < nbytes or checksum(data, self.manifest.checksum) != expected:
                    what = "is cut off" if count < nbytes else "does not match its checksum"
                    names = tensors_in_chunk(self.manifest, file, chunk)
                    yield Problem(label, what, chunk, names)
        except OSError as error:
            yield Problem(label, f"cannot be read: {error}", None, inside)

    def _chunks_used(self, number: int) -> set[int]:
        """The chunks of a file that hold something of this step."""
        size = self.manifest.files[number].chunk_nbytes
        used: set[int] = set()
        for info in self.manifest.tensors.values():
            for b in info.boxes:
                if b.file == number and b.box.volume:
                    end = b.start + b.box.volume * info.dtype.itemsize
                    used.update(range(b.start // size, -(-end // size)))
        return used

    def _source(self, name: str) -> SourceTensor:
        if name not in self._sources:
            close = [n for n in self._sources if name.split(".")[-1] in n][:5]
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise ConfigError(f"step {self.step} has no tensor {name!r}{hint}")
        return self._sources[name]


def open_root(path: "str | os.PathLike[str] | Storage") -> Root:
    """The root at a path, for reading.

    Raises:
        NotCommittedError: There is no checkpoint root.
    """
    storage = open_storage(path)
    root = Root(storage)
    if storage.size("planaria.json") is None:
        raise NotCommittedError(f"{storage.url} is no checkpoint folder (it has no planaria.json)")
    return root


def open_checkpoint(
    path: "str | os.PathLike[str] | Storage", step: int | None = None
) -> Checkpoint:
    """Opens a committed step for reading.

    Args:
        path: A checkpoint root, or the folder of one step in it.
        step: Which step; by default the newest one whose manifest is whole.

    Raises:
        NotCommittedError: There is none.
        CorruptError: Its manifest is damaged.
    """
    if not isinstance(path, Storage):
        text = os.fspath(path).rstrip("/")
        head, _, tail = text.rpartition("/")
        match = re.fullmatch(r"step-(\d{8,})", tail)
        if match and step is None:
            path, step = head or ".", int(match[1])
    root = open_root(path)
    if step is not None:
        return Checkpoint(root, root.manifest(step))
    damaged = None
    for candidate in reversed(root.steps()):
        try:
            return Checkpoint(root, root.manifest(candidate))
        except NotCommittedError:  # just removed
            continue
        except CorruptError as error:
            damaged = error
    if damaged is not None:
        raise damaged
    raise NotCommittedError(f"{root.storage.url} holds no committed step")
