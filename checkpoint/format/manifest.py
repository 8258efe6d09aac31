"""The manifest: the one file that makes a step exist.

It is JSON and says where every box of every tensor lies, with a checksum of every chunk of every
data file, the small objects, and what the run was. Its own SHA-256 stands in front of the body.
Everything read from it is checked before it is used: it may come from anywhere.

Format 2 is format 1 and two things more: boxes may lie in files of other steps, and digests of
boxes say what a later step need not write again. A manifest that uses neither is of format 1.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from planaria.checkpoint.format import checksum
from planaria.checkpoint.format.dtypes import StoredDtype, dtype_by_name
from planaria.core.box import Box
from planaria.core.garbage import no_collection
from planaria.errors import ConfigError, CorruptError, FormatError

#: The newest format that is read.
FORMAT = 2
#: The format of what needs no newer one.
PLAIN_FORMAT = 1
NAME = "manifest.json"

_PREFIX, _MIDDLE, _SUFFIX = b'{"sha256":"', b'","manifest":', b"}\n"
_BODY_AT = len(_PREFIX) + 64 + len(_MIDDLE)
# A bare file name: nothing that could lead out of the step's folder.
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\.safetensors")
_DIGEST = re.compile(r"([0-9a-f]{64})?")
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, RecursionError, ArithmeticError)
# What is allocated in one go on a manifest's word.
_MAX_NBYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One data file of a step.

    Attributes:
        name: File name inside the step's folder.
        data_start: Length of the header, where the data section starts.
        data_nbytes: Length of the data section.
        chunk_nbytes: Bytes per checksummed chunk; the last one may be shorter.
        header_checksum: Checksum of the header.
        chunk_checksums: Checksum of each chunk of the data section.
        step: The step that wrote it and in whose folder it lies, where that is another one.
    """

    name: str
    data_start: int
    data_nbytes: int
    chunk_nbytes: int
    header_checksum: int
    chunk_checksums: list[int]
    step: int | None = None

    @property
    def nbytes(self) -> int:
        return self.data_start + self.data_nbytes

    def chunk_range(self, chunk: int) -> tuple[int, int]:
        """First byte and length of a chunk, counted in the data section."""
        start = chunk * self.chunk_nbytes
        return start, min(self.chunk_nbytes, self.data_nbytes - start)

    def to_json(self) -> list[Any]:
        """The file as JSON data."""
        return [self.name, self.data_start, self.data_nbytes, self.chunk_nbytes,
                self.header_checksum, checksum.pack(self.chunk_checksums),
                *([] if self.step is None else [self.step])]  # fmt: skip

    @classmethod
    def from_json(cls, data: list[Any]) -> "FileInfo":
        """Inverse of `to_json`.

        Raises:
            CorruptError: The data makes no sense.
        """
        name, start, nbytes, chunk, header, packed, *step = data
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise CorruptError(f"file name {name!r} does not stay inside the step's folder")
        _check_whole(name, start, nbytes, chunk, header, *step)
        info = cls(name, start, nbytes, chunk, header, checksum.unpack(packed), *step)
        # Elements have up to 16 bytes, and none may lie across two chunks.
        if not 8 <= start <= _MAX_NBYTES or not 16 <= chunk <= _MAX_NBYTES or chunk % 16:
            raise CorruptError(f"{name}: impossible sizes {start}, {nbytes}, {chunk}")
        if len(info.chunk_checksums) != -(-nbytes // chunk):
            raise CorruptError(f"{name}: {len(info.chunk_checksums)} checksums for {nbytes} bytes")
        return info


@dataclass(frozen=True, slots=True)
class StoredBox:
    """Where one box of a tensor lies: file number, and first byte in its data section."""

    box: Box
    file: int
    start: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One logical tensor of a step.

    Attributes:
        dtype: Stored dtype.
        shape: Global shape.
        boxes: The stored boxes; disjoint, together the whole tensor.
        nan: Whether a NaN was seen in it when it was saved.
    """

    dtype: StoredDtype
    shape: tuple[int, ...]
    boxes: list[StoredBox]
    nan: bool = False

    @property
    def nbytes(self) -> int:
        return Box.full(self.shape).volume * self.dtype.itemsize

    def to_json(self) -> list[Any]:
        """The tensor as JSON data."""
        boxes = [[b.box.offset, b.box.extent, b.file, b.start] for b in self.boxes]
        return [self.dtype.name, self.shape, boxes, *([True] if self.nan else [])]

    @classmethod
    def from_json(cls, name: str, data: list[Any], files: list[FileInfo]) -> "TensorInfo":
        """Inverse of `to_json`.

        Raises:
            CorruptError: The data makes no sense, or does not fit the files.
        """
        if (plain := cls._of_one_box(data, files)) is not None:
            return plain
        _check_whole(f"tensor {name!r}", *data[1])
        dtype, shape, whole = dtype_by_name(data[0]), tuple(data[1]), Box.full(data[1])
        boxes = []
        for offset, extent, file, start in data[2]:
            _check_whole(f"tensor {name!r}", *offset, *extent, file, start)
            box = Box(tuple(offset), tuple(extent))
            if len(box.offset) != len(shape) or not whole.contains(box):
                raise CorruptError(f"tensor {name!r}: {box} is no part of shape {shape}")
            if not 0 <= file < len(files):
                raise CorruptError(f"tensor {name!r} names file {file} of {len(files)}")
            if start % dtype.itemsize:
                raise CorruptError(f"tensor {name!r} starts inside an element, at byte {start}")
            if start + box.volume * dtype.itemsize > files[file].data_nbytes:
                raise CorruptError(f"tensor {name!r} reaches past the end of {files[file].name}")
            boxes.append(StoredBox(box, file, start))
        if sum(b.box.volume for b in boxes) != whole.volume:
            raise CorruptError(f"tensor {name!r}: its boxes do not make up its shape {shape}")
        return cls(dtype, shape, boxes, len(data) > 3)

    @classmethod
    def _of_one_box(cls, data: list[Any], files: list[FileInfo]) -> "TensorInfo | None":
        """The tensor if it is whole and nothing is wrong with it, in the common case of one box."""
        name, extent, boxes = data[:3]
        if len(boxes) != 1 or boxes[0][1] != extent or any(boxes[0][0]):
            return None
        offset, extent, file, start = boxes[0]
        if {*map(type, offset), *map(type, extent), type(file), type(start)} != {int} or (
            len(offset) != len(extent) or not 0 <= file < len(files) or start < 0
        ):
            return None
        dtype, whole = dtype_by_name(name), Box.full(extent)
        end = start + whole.volume * dtype.itemsize
        if start % dtype.itemsize or end > files[file].data_nbytes:
            return None
        return cls(dtype, whole.extent, [StoredBox(whole, file, start)], len(data) > 3)


@dataclass
class Manifest:
    """Everything that is known of a committed step.

    Attributes:
        step: Step number.
        attempt: Random id of the save that wrote it; its files carry it in their names.
        created: Wall-clock time, in seconds since the epoch.
        world_size: How many ranks saved it.
        files: Data files; boxes refer to them by position.
        tensors: Logical name -> where it lies.
        aliases: Further names of a tensor that is stored once (tied weights).
        objects: Name -> {"all": value}, or {"ranks": {rank: value}} where ranks differ.
        metrics: What the caller passed to `Checkpointer.step`.
        run: What wrote it: configuration and versions.
        checksum: Name of the checksum of headers and chunks.
        format: The format that it is written in; the lowest that will do.
        digests: Name -> SHA-256 of each of its boxes, in their order; empty where none was made.
        tensors_json: `tensors` as `tensors_to_json` gives it, where that is known already.
    """

    step: int
    attempt: str
    created: float
    world_size: int
    files: list[FileInfo]
    tensors: dict[str, TensorInfo]
    aliases: dict[str, str] = field(default_factory=dict)
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    checksum: str = checksum.DEFAULT
    format: int = PLAIN_FORMAT
    digests: dict[str, list[str]] = field(default_factory=dict)
    tensors_json: str | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.digests or any(f.step is not None for f in self.files):
            self.format = max(self.format, 2)

    @property
    def nbytes(self) -> int:
        """Bytes of all data files that the step wrote itself."""
        return sum(f.nbytes for f in self.files if f.step is None)

    @property
    def referenced_nbytes(self) -> int:
        """Bytes of its tensors that lie in files of other steps."""
        return sum(
            b.box.volume * info.dtype.itemsize
            for info in self.tensors.values()
            for b in info.boxes
            if self.files[b.file].step is not None
        )

    @property
    def nan_names(self) -> list[str]:
        """Tensors in which a NaN was seen."""
        return [name for name, info in self.tensors.items() if info.nan]

    def resolve(self, name: str) -> TensorInfo | None:
        """The tensor of this name or alias, None where there is none."""
        return self.tensors.get(self.aliases.get(name, name))

    def names(self) -> Iterator[str]:
        """All tensor names, aliases included."""
        yield from self.tensors
        yield from self.aliases

    def to_bytes(self) -> bytes:
        """The manifest file."""
        fields = dict(self.__dict__)
        tensors = fields.pop("tensors_json", None) or tensors_to_json(self.tensors)
        fields["files"] = [f.to_json() for f in self.files]
        if not self.digests:
            del fields["digests"]
        parts = [
            f'"{name}":{tensors if name == "tensors" else _compact(value)}'
            for name, value in fields.items()
        ]
        body = f"{{{','.join(parts)}}}".encode()
        return _PREFIX + _digest(body) + _MIDDLE + body + _SUFFIX

    @classmethod
    @no_collection()
    def from_bytes(cls, data: bytes, where: str) -> "Manifest":
        """Reads and checks a manifest file.

        Args:
            data: Its bytes.
            where: Its path, for error messages.

        Raises:
            CorruptError: The bytes are not what was written, or make no sense.
            FormatError: A newer version wrote it.
        """
        body = data[_BODY_AT : -len(_SUFFIX)]
        whole = _PREFIX + _digest(body) + _MIDDLE + body + _SUFFIX
        if data != whole:
            _refuse_newer_container(data, where)
            raise CorruptError(f"{where}: the manifest is damaged (its checksum does not match)")
        try:
            fields = json.loads(body)
            if fields["format"] > FORMAT:
                raise FormatError(newer(fields["format"]))
            files = [FileInfo.from_json(f) for f in fields.pop("files")]
            tensors = {
                name: TensorInfo.from_json(name, t, files)
                for name, t in fields.pop("tensors").items()
            }
            manifest = cls(files=files, tensors=tensors, **fields)
            if manifest.format != fields["format"]:
                raise CorruptError(f"format {fields['format']} refers to no other step")
            manifest._check_fields()
            return manifest
        except (CorruptError, FormatError) as error:
            raise type(error)(f"{where}: {error}") from error
        except (*_MALFORMED, ConfigError) as error:
            raise CorruptError(f"{where}: the manifest makes no sense ({error!r})") from error

    def _check_fields(self) -> None:
        _check_whole("the format, the step or its world size", self.format, self.step,
                     self.world_size)  # fmt: skip
        kinds = (
            (self.attempt, str),
            (self.checksum, str),
            (self.created, int | float),
            (self.metrics, dict),
            (self.run, dict),
        )
        wrong = [value for value, kind in kinds if not isinstance(value, kind)]
        if wrong or self.world_size < 1:
            raise CorruptError(f"impossible fields {wrong or self.world_size}")
        lost = [alias for alias, name in self.aliases.items() if name not in self.tensors]
        if lost:
            raise CorruptError(f"alias {lost[0]!r} points at no tensor")
        for name, found in self.digests.items():
            if len(found) != len(self.tensors[name].boxes) or not all(
                map(_DIGEST.fullmatch, found)
            ):
                raise CorruptError(f"tensor {name!r}: its digests do not fit its boxes")
        for name, stored in self.objects.items():
            per_rank = isinstance(stored, dict) and isinstance(stored.get("ranks"), dict)
            if per_rank:
                _check_whole(f"a rank of object {name!r}", *map(int, stored["ranks"]))
            elif not isinstance(stored, dict) or set(stored) != {"all"}:
                raise CorruptError(f"object {name!r} belongs to no rank")


def tensors_to_json(tensors: dict[str, TensorInfo]) -> str:
    """What a manifest says of its tensors."""
    return _compact({name: t.to_json() for name, t in tensors.items()})


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def newer(number: int) -> str:
    """What to say of a format that is newer than `FORMAT`."""
    return (
        f"format {number} is newer than this version of Planaria reads (up to {FORMAT}); install "
        "a newer one"
    )


def _refuse_newer_container(data: bytes, where: str) -> None:
    """Raises FormatError where a newer format may well be whole, but keeps its digest otherwise."""
    if data.startswith(_PREFIX) and data[_BODY_AT - len(_MIDDLE) : _BODY_AT] == _MIDDLE:
        return
    try:
        outer = json.loads(data)
        number = outer["format"] if "format" in outer else outer["manifest"]["format"]
        if number <= FORMAT:
            return
    except _MALFORMED:
        return
    raise FormatError(f"{where}: {newer(number)}")


def _check_whole(what: str, *values: Any) -> None:
    """Sizes and places are whole numbers; another kind would only fail much later."""
    for value in values:
        if type(value) is not int or value < 0:
            raise CorruptError(f"{what}: {value!r} stands where a whole number belongs")


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()
