"""Tensors as views of the files that they lie in: nothing is copied, pages come when needed."""

import mmap
import os

import torch

from planaria.checkpoint.format.checksum import checksum
from planaria.checkpoint.format.manifest import Manifest
from planaria.checkpoint.layout.reading import describe_chunk
from planaria.checkpoint.storage.base import Storage, reading
from planaria.checkpoint.storage.names import data_path
from planaria.errors import CorruptError


def map_tensor(storage: Storage, manifest: Manifest, name: str) -> torch.Tensor | None:
    """A tensor of a step, mapped and verified; None where it does not lie in one local piece.

    What is written to it stays in this process.

    Args:
        storage: The root.
        manifest: The step.
        name: Name of a tensor, or an alias of one.

    Raises:
        CorruptError: Its bytes are not what was written.
        StorageError: The file cannot be read now.
    """
    info = manifest.resolve(name)
    if info is None or storage.local is None or len(info.boxes) != 1 or not info.nbytes:
        return None
    stored = info.boxes[0]
    file = manifest.files[stored.file]
    chunks = range(
        stored.start // file.chunk_nbytes, -(-(stored.start + info.nbytes) // file.chunk_nbytes)
    )
    first, (last, nbytes) = file.chunk_range(chunks[0])[0], file.chunk_range(chunks[-1])
    path = data_path(manifest, file)
    begin = file.data_start + first
    begin -= begin % mmap.ALLOCATIONGRANULARITY
    end = file.data_start + last + nbytes
    data = reading(
        f"{storage.url}/{path}", lambda: _map(os.path.join(storage.local or "", path), begin, end)
    )
    for chunk in chunks:
        start, nbytes = file.chunk_range(chunk)
        at = file.data_start + start - begin
        inside = memoryview(data)[at : at + nbytes] if data is not None else b""
        if data is None or checksum(inside, manifest.checksum) != file.chunk_checksums[chunk]:
            raise CorruptError(describe_chunk(storage.url, manifest, file, chunk, cut=data is None))
    assert data is not None  # there is at least one chunk
    flat = torch.frombuffer(
        data,
        dtype=info.dtype.dtype,
        count=stored.box.volume,
        offset=file.data_start + stored.start - begin,
    )
    return flat.view(info.shape)


def _map(path: str, begin: int, end: int) -> mmap.mmap | None:
    """Bytes [begin, end) of a file; None if it is shorter: what is not there is not touched."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_size < end:
            return None
        return mmap.mmap(fd, end - begin, access=mmap.ACCESS_COPY, offset=begin)
    finally:
        os.close(fd)
