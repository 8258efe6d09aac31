"""Replicas must be equal, for one rank's copy stands for all of them.

What a caller gives as plain tensors is compared whole, and a difference fails the save: which of
them would be the right one? Parameters and optimizer state are compared in a sample, and a
difference is warned of: it means that something keeps ranks from training one model (a forgotten
DDP wrapper, hand-made parallelism without DTensors), or that their hardware rounds differently.
"""

import contextlib
import zlib
from collections.abc import Iterator, Mapping, Sequence

import torch

from planaria.checkpoint.format.checksum import checksum
from planaria.checkpoint.format.dtypes import raw_bytes
from planaria.checkpoint.state.entries import TensorEntry
from planaria.checkpoint.state.recall import Recalled, label_of

#: Tensors of a sample, and bytes looked at in each.
SAMPLE_TENSORS = 64
WINDOW_NBYTES = 4096

Ready = Mapping[torch.device, torch.Event]


def whole_checksums(live: Mapping[str, TensorEntry], ready: Ready) -> dict[str, int]:
    """Name -> checksum of the tensors that every rank must have alike."""
    if isinstance(live, Recalled):
        return {}  # modules and optimizers alone: none of theirs must be
    with _side_streams(ready):
        return {
            e.name: checksum(raw_bytes(e.local).numpy())
            for e in live.values()
            if e.same_everywhere and e.box.extent == e.shape
        }


def sampled_checksums(live: Mapping[str, TensorEntry], ready: Ready, step: int) -> dict[str, int]:
    """Box -> checksum of a window of it, for a sample of boxes that other ranks may hold, too.

    Which windows follows from the names and the step, so that ranks look at the same ones.
    """
    labels = (
        live.layout.labels
        if isinstance(live, Recalled)
        else [
            label_of(e.name, e.box)
            for e in live.values()
            if e.lazy and e.nbytes and e.alias_of is None
        ]
    )
    end = f" {step}".encode()
    places = sorted((zlib.crc32(end, label), name) for label, name in labels)
    found = {}
    with _side_streams(ready):
        for number, name in places[:SAMPLE_TENSORS]:
            entry = live[name]
            start = number % -(-entry.nbytes // WINDOW_NBYTES) * WINDOW_NBYTES
            stop = min(start + WINDOW_NBYTES, entry.nbytes)
            data = torch.empty(stop - start, dtype=torch.uint8)
            source = entry.source
            source.check_in_place(name)
            source.copy_to(data, 0, start, stop)
            if entry.local.is_cuda:
                torch.cuda.current_stream(entry.local.device).synchronize()
            found[f"{name} at {list(entry.box.offset)}"] = checksum(data.numpy())
    return found


def first_difference(of_rank: Sequence[Mapping[str, int]]) -> tuple[str, int, int] | None:
    """What the first two ranks that disagree about something disagree about."""
    seen: dict[str, tuple[int, int]] = {}
    for rank, sums in enumerate(of_rank):
        for name, value in sums.items():
            first, expected = seen.setdefault(name, (rank, value))
            if expected != value:
                return name, first, rank
    return None


@contextlib.contextmanager
def _side_streams(ready: Ready) -> Iterator[None]:
    # On the default stream the capturing thread would wait for the whole backward.
    with contextlib.ExitStack() as stack:
        for device, event in ready.items():
            stream = torch.cuda.Stream(device=device)
            stream.wait_event(event)
            stack.enter_context(torch.cuda.stream(stream))
        yield
