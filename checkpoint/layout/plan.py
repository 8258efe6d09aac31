"""Who writes what: all ranks' announcements in, the same plan on every rank out.

A box that several ranks hold is written by one of them, and the bytes are balanced over them. A
box so large that it would unbalance them is cut into slabs, one for each replica.
"""

import hashlib
import heapq
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from planaria.checkpoint.format.dtypes import StoredDtype, dtype_by_name
from planaria.checkpoint.format.manifest import StoredBox, TensorInfo
from planaria.checkpoint.format.safetensors import FileEntry, place
from planaria.checkpoint.state.entries import TensorEntry
from planaria.core.box import Box, BoxIndex
from planaria.core.garbage import no_collection
from planaria.errors import StateError

#: Boxes below this size are never cut: a cut costs more than it balances.
MIN_SLAB_NBYTES = 1 << 20
#: Rows of which no more than this fit into a piece are not put together.
_ROWS_APART = 16


@dataclass
class SavePlan:
    """The plan of one save, equal on all ranks.

    Attributes:
        entries: Rank -> what it writes, in the order of its file; ranks that write nothing are
            left out.
        dtypes: Tensor name -> stored dtype.
        shapes: Tensor name -> global shape.
        aliases: Further name of a tensor -> the name it is stored under.
    """

    entries: dict[int, list[FileEntry]] = field(default_factory=dict)
    dtypes: dict[str, StoredDtype] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def tensors(self, file_of_rank: dict[int, int], nan_names: set[str]) -> dict[str, TensorInfo]:
        """The tensors of a manifest, when rank r's file is number `file_of_rank[r]`."""
        boxes: dict[str, list[StoredBox]] = {name: [] for name in self.shapes}
        for rank, entries in self.entries.items():
            for e in entries:
                boxes[e.name].append(StoredBox(e.box, file_of_rank[rank], e.start))
        return {
            name: TensorInfo(self.dtypes[name], self.shapes[name], found, name in nan_names)
            for name, found in boxes.items()
        }


def announce(entries: Iterable[TensorEntry]) -> list[Any]:
    """What a rank tells the others of the tensors it holds, as JSON data."""
    return [
        [e.name, e.dtype.name, e.shape, e.box.offset, e.box.extent, e.alias_of, e.pinned_writer]
        for e in entries
    ]


def digest(announcement: list[Any]) -> str:
    """A short name for an announcement: equal ones need not be sent twice."""
    return hashlib.sha256(json.dumps(announcement).encode()).hexdigest()[:32]


@dataclass(slots=True)
class _Holding:
    dtype: str
    shape: tuple[int, ...]
    first_rank: int
    pinned: bool
    boxes: dict[Box, list[int]]
    aliases: set[str | None]


@no_collection()
def make_plan(announcements: list[list[Any]], piece_nbytes: int | None = None) -> SavePlan:
    """Plans a save.

    Args:
        announcements: What each rank announced, in rank order; ranks with equal announcements may
            share one list object.
        piece_nbytes: Cut boxes into pieces of at most so many bytes, whoever writes them, instead
            of into as few as balance the writers.

    Raises:
        StateError: Ranks disagree about a tensor, or no rank holds a part of one.
    """
    holdings = _merge(announcements)
    plan = SavePlan()
    jobs: list[tuple[int, str, Box, list[int]]] = []
    for name, h in holdings.items():
        alias = next(iter(h.aliases)) if len(h.aliases) == 1 else None
        if alias is not None and alias in holdings:
            plan.aliases[name] = alias
            continue
        dtype = dtype_by_name(h.dtype)
        plan.dtypes[name], plan.shapes[name] = dtype, h.shape
        for box, ranks in _disjoint(name, h):
            writers = ranks[:1] if h.pinned else ranks
            for part in (
                [box] if piece_nbytes is None else pieces(box, dtype.itemsize, piece_nbytes)
            ):
                jobs.append((part.volume * dtype.itemsize, name, part, writers))
    # Chains cannot arise (an entry is an alias of the first name only), except by renamed ranks.
    plan.aliases = {a: plan.aliases.get(n, n) for a, n in plan.aliases.items()}
    for rank, parts in _balance(jobs, may_cut=piece_nbytes is None).items():
        plan.entries[rank] = place([(n, plan.shapes[n], b, plan.dtypes[n]) for n, b in parts])
    plan.entries = dict(sorted(plan.entries.items()))
    return plan


def _merge(announcements: list[list[Any]]) -> dict[str, _Holding]:
    holdings: dict[str, _Holding] = {}
    for rank, announcement in enumerate(announcements):
        for name, dtype, shape, offset, extent, alias, pinned in announcement:
            h = holdings.get(name)
            if h is None:
                h = holdings[name] = _Holding(dtype, tuple(shape), rank, pinned, {}, set())
            elif (h.dtype, h.shape) != (dtype, tuple(shape)):
                raise StateError(
                    f"tensor {name!r} is {h.dtype}{list(h.shape)} on rank {h.first_rank} and "
                    f"{dtype}{list(shape)} on rank {rank}; give different things different names"
                )
            box = Box(tuple(offset), tuple(extent))
            if box.volume:
                h.boxes.setdefault(box, []).append(rank)
                h.aliases.add(alias)
    return holdings


def _disjoint(name: str, h: _Holding) -> list[tuple[Box, list[int]]]:
    """The boxes to store: those that ranks hold, cut where they overlap."""
    whole = Box.full(h.shape)
    if whole.volume == 0:
        return [(whole, [h.first_rank])]
    boxes = list(h.boxes)
    if boxes == [whole]:
        return list(h.boxes.items())
    parts, missing = BoxIndex(boxes).cover(whole)
    if missing:
        raise StateError(
            f"no rank holds {missing[0]} of tensor {name!r} of shape {list(h.shape)}; every rank "
            "of its mesh must take part in saving"
        )
    return [(part, h.boxes[boxes[i]]) for i, part in parts]


def pieces(box: Box, itemsize: int, most: int) -> list[Box]:
    """Cuts a box into runs of rows of at most `most` bytes; of a longer row, into parts of it.

    Rows that are large and of several dimensions are what changes by itself (experts of a fused
    tensor): each is a piece of its own. Where the cuts are follows from the box alone: not from the
    ranks, and not from other boxes.
    """
    if not box.volume or not box.extent:
        return [box]
    row = box.volume // box.extent[0] * itemsize
    experts = len(box.extent) > 2 and box.extent[0] > 1 and row * _ROWS_APART >= most
    if box.volume * itemsize <= most and not experts:
        return [box]
    dim = next(d for d, n in enumerate(box.extent) if n > 1)
    row = box.volume // box.extent[dim] * itemsize
    rows = 1 if experts else max(1, most // row)
    found: list[Box] = []
    for start in range(0, box.extent[dim], rows):
        offset, extent = list(box.offset), list(box.extent)
        offset[dim], extent[dim] = offset[dim] + start, min(rows, extent[dim] - start)
        found += pieces(Box(tuple(offset), tuple(extent)), itemsize, most)
    return found


def _balance(
    jobs: list[tuple[int, str, Box, list[int]]], *, may_cut: bool
) -> dict[int, list[tuple[str, Box]]]:
    """Gives each box to one of its holders, the largest first, to the one with the least so far."""
    total: dict[tuple[int, ...], int] = {}
    for nbytes, _, _, ranks in jobs:
        key = tuple(ranks)
        total[key] = total.get(key, 0) + nbytes
    # Slabs of one box go to different ranks: a file then holds a tensor once, as others expect.
    cut: list[tuple[list[tuple[int, Box]], str, tuple[int, ...]]] = []
    for nbytes, name, box, ranks in jobs:
        key = tuple(ranks)
        too_large = may_cut and nbytes > max(total[key] // (2 * len(key)), MIN_SLAB_NBYTES)
        slabs = _slabs(box, len(key)) if len(key) > 1 and too_large else [box]
        sized = [(nbytes * s.volume // max(1, box.volume), s) for s in slabs]
        cut.append((sorted(sized, key=lambda s: (-s[0], s[1])), name, key))
    cut.sort(key=lambda job: (-job[0][0][0], job[1], job[0][0][1]))
    load: dict[int, int] = {}
    heaps: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    result: dict[int, list[tuple[str, Box]]] = {}
    for slabs, name, key in cut:
        heap = heaps.get(key)
        if heap is None:
            heap = heaps[key] = [(load.get(r, 0), r) for r in key]
            heapq.heapify(heap)
        taken: list[tuple[int, int]] = []
        for nbytes, box in slabs:
            # Loads grow through other groups of replicas as well: refresh what is out of date.
            while heap[0][0] != load.get(heap[0][1], 0):
                heapq.heapreplace(heap, (load[heap[0][1]], heap[0][1]))
            _, rank = heapq.heappop(heap)
            load[rank] = load.get(rank, 0) + nbytes
            taken.append((load[rank], rank))
            result.setdefault(rank, []).append((name, box))
        for entry in taken:
            heapq.heappush(heap, entry)
    return result


def _slabs(box: Box, parts: int) -> list[Box]:
    """Cuts a box into like slabs, along the first dimension that does so to a tenth."""
    # How much larger than a fair share the largest slab is, for each dimension.
    excess = [-(-n // parts) * parts / n for n in box.extent]
    dim = next((d for d, e in enumerate(excess) if e <= 1.1), excess.index(min(excess)))
    return box.split_rows(parts, dim)
