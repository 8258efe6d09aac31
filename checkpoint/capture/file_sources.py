"""What the entries of a file are read from, and whether that is still where it was."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from planaria.checkpoint.capture.sources import Source
from planaria.checkpoint.format.safetensors import FileEntry
from planaria.checkpoint.state.entries import TensorEntry
from planaria.checkpoint.state.recall import Recalled, StateLayout
from planaria.core.box import Box


class KnownPlaces:
    """Where a file's entries lie on the host: worked out once, while nothing has moved.

    Args:
        file: The file's entries, in order.
        layout: What is known of the tensors.

    Attributes:
        layout: The same.
        addresses: Address of each entry's bytes, int64[n]; 0 where they are no plain run of bytes,
            or lie elsewhere in every save.
        copied: Numbers of the entries that are copied at the call, int64[m].
        places: First byte of each of those in the room that they are copied to, int64[m].
        columns: Number of each entry's tensor in the layout, int64[n].
    """

    def __init__(self, file: Sequence[FileEntry], layout: StateLayout) -> None:
        self.layout = layout
        self.columns = np.array([layout.index[item.name] for item in file], dtype=np.int64)
        self.addresses = np.zeros(len(file), dtype=np.int64)
        copied: dict[int, int] = {}
        for number, (item, column) in enumerate(zip(file, self.columns.tolist(), strict=True)):
            known, place = layout.known[column], layout.early.places.get(column)
            if not item.nbytes or (place is None and column not in layout.in_place):
                continue
            origin = 0 if item.box is known.box else origin_in(item, known.box)
            if origin is None:
                continue
            if place is None:
                self.addresses[number] = known.address + origin
            else:
                copied[number] = place + origin
        self.copied = np.array(list(copied), dtype=np.int64)
        self.places = np.array(list(copied.values()), dtype=np.int64)


class FileSources:
    """What one file's entries are read from in one save.

    Args:
        file: The file's entries, in order.
        live: The live tensors by name.
        places: What is known of them, if they are recalled.

    Attributes:
        addresses: Address of each entry's bytes on the host, int64[n]; 0 where it has none.
    """

    def __init__(
        self,
        file: Sequence[FileEntry],
        live: Mapping[str, TensorEntry],
        places: KnownPlaces | None = None,
    ) -> None:
        self._file, self._live = file, live
        known = live if places is not None and isinstance(live, Recalled) else None
        self._recalled = known
        self._columns = places.columns if places is not None and known is not None else None
        self._places = places.addresses if places is not None and known is not None else None
        self.addresses = np.zeros(len(file), dtype=np.int64)
        if places is not None and known is not None:
            self.addresses[:] = places.addresses
            self.addresses[places.copied] = known.room.data_ptr() + places.places
        self._others: dict[int, tuple[Source, Source]] = {}
        for number in np.flatnonzero(self.addresses == 0).tolist():
            item = file[number]
            whole = live[item.name].source
            source = source_of(item, live[item.name], whole)
            self._others[number] = source, whole
            self.addresses[number] = source.address or 0

    @property
    def devices(self) -> list[torch.device]:
        """The CUDA devices that entries lie on."""
        found = {s.device for s, _ in self._others.values() if s.device.type == "cuda"}
        return sorted(found, key=str)

    def __getitem__(self, number: int) -> Source:
        """The source of an entry without an address."""
        return self._others[number][0]

    def check_in_place(self, numbers: np.ndarray) -> None:
        """Memory that was given back meanwhile must not be read: that would end the process.

        Args:
            numbers: The entries that are to be read next.

        Raises:
            TornCaptureError: The memory of one of them was freed or moved.
        """
        if self._recalled is not None:
            assert self._columns is not None
            assert self._places is not None
            known = numbers[self._places[numbers] != 0]
            self._recalled.check_in_place(np.unique(self._columns[known]).tolist())
        if self._others:
            for number in numbers.tolist():
                if number in self._others:
                    source, whole = self._others[number]
                    # A slice was made late, and has whatever address the tensor had by then.
                    source.check_in_place(self._file[number].name)
                    whole.check_in_place(self._file[number].name)

    def origin(self, number: int) -> int | None:
        """See `origin_of`."""
        item = self._file[number]
        if self._places is not None and self._places[number] and self._recalled is not None:
            row = self._recalled.layout.index[item.name]
            return int(self.addresses[number]) - self._recalled.layout.known[row].address
        return origin_of(item, self._live[item.name])


def origin_of(item: FileEntry, entry: TensorEntry) -> int | None:
    """First byte of an entry in what this rank holds of its tensor; None if it is no one run."""
    return origin_in(item, entry.box)


def origin_in(item: FileEntry, box: Box) -> int | None:
    """First byte of an entry in a row-major array that is a box; None if it is no one run."""
    if not box.volume:
        return None
    inner, held = item.box.relative_to(box), box.extent
    cut = next((d for d, n in enumerate(inner.extent) if n != 1), len(held))
    if inner.extent[cut + 1 :] != held[cut + 1 :]:
        return None
    first = 0
    for size, offset in zip(held, inner.offset, strict=True):
        first = first * size + offset
    return first * item.dtype.itemsize


def source_of(item: FileEntry, entry: TensorEntry, whole: Source | None = None) -> Source:
    """What an entry of the file is read from.

    Args:
        item: The entry.
        entry: Its tensor.
        whole: The tensor's source, if it is at hand.
    """
    if item.box is entry.box or item.box == entry.box or not entry.nbytes:
        return whole or entry.source
    return Source(entry.local[item.box.relative_to(entry.box).slices()])
