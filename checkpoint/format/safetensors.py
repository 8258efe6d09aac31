"""The header of a checkpoint's data files: valid safetensors, written before any tensor is copied.

All sizes are known before a byte is captured, so the header and the place of each tensor are fixed
first. The tensors follow without holes (which the format forbids), sorted by descending element
size, so that each starts aligned; the header is padded with spaces to whole pages, so that the data
starts page-aligned too. The box of each entry stands in the header's metadata, in our own key and
in the one torch's Hugging Face reader looks at.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from planaria.checkpoint.format.dtypes import StoredDtype
from planaria.core.box import Box

PAGE = 4096


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One box of a tensor in a file.

    Attributes:
        name: Logical name of the tensor.
        shape: Global shape of the tensor.
        box: Which part of it this is.
        dtype: Stored dtype.
        start: First byte, counted from the start of the data section.
        nbytes: Length in bytes.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    dtype: StoredDtype
    start: int
    nbytes: int


def place(parts: list[tuple[str, tuple[int, ...], Box, StoredDtype]]) -> list[FileEntry]:
    """Gives every part its place in the data section: descending alignment, then dtype and name."""
    parts = sorted(parts, key=lambda p: (-p[3].itemsize, p[3].name, p[0], p[2]))
    entries, start = [], 0
    for name, shape, box, dtype in parts:
        nbytes = box.volume * dtype.itemsize
        entries.append(FileEntry(name, shape, box, dtype, start, nbytes))
        start += nbytes
    return entries


class Header:
    """The header of a file with these entries; only the step in it differs between saves."""

    def __init__(self, entries: Sequence[FileEntry]) -> None:
        tensors: dict[str, object] = {}
        boxes, sharding = {}, {}
        for entry in entries:
            key = entry.name
            if key in tensors:  # a further box of the same tensor: others' readers see the first
                key = f"{entry.name}@{','.join(map(str, entry.box.offset))}"
            tensors[key] = {
                "dtype": entry.dtype.code,
                "shape": entry.dtype.stored_shape(entry.box.extent),
                "data_offsets": (entry.start, entry.start + entry.nbytes),
            }
            boxes[key] = (entry.dtype.name, entry.shape, entry.box.offset, entry.box.extent)
            offset = (*entry.box.offset, 0) if entry.dtype.per_element > 1 else entry.box.offset
            sharding[key] = {"saved_offsets": offset}
        # Metadata values are strings: JSON within JSON. It is cut in two where the step stands.
        before = _compact(tensors)[:-1] + ("," if tensors else "")
        before += '"__metadata__":{"format":"pt","planaria":"{\\"step\\":'
        inner = _compact(_compact(boxes))[1:-1]
        after = f',\\"boxes\\":{inner}}}","DCP_SHARDING_INFO":{_compact(_compact(sharding))}}}}}'
        self._before, self._after = before.encode(), after.encode()

    def render(self, step: int, nbytes: int | None = None) -> bytes:
        """The length prefix and the header, padded to whole pages, or to a given length.

        Raises:
            ValueError: It is longer than that.
        """
        number = str(step).encode()
        length = len(self._before) + len(number) + len(self._after)
        padding = -(length + 8) % PAGE if nbytes is None else nbytes - 8 - length
        if padding < 0:
            raise ValueError(f"a header of {length + 8} bytes does not fit into {nbytes}")
        prefix = (length + padding).to_bytes(8, "little")
        return b"".join((prefix, self._before, number, self._after, b" " * padding))


def header_bytes(entries: Sequence[FileEntry], step: int) -> bytes:
    """The length prefix and header of a file with these entries, padded to whole pages."""
    return Header(entries).render(step)


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def parse_header(head: bytes) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Reads a header as others would: name -> (dtype code, stored shape, start, end)."""
    size = int.from_bytes(head[:8], "little")
    header = json.loads(head[8 : 8 + size])
    header.pop("__metadata__", None)
    return {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()}


def data_nbytes(entries: list[FileEntry]) -> int:
    """Length of the data section."""
    return sum(prod(e.box.extent) * e.dtype.itemsize for e in entries)
