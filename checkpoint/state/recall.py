"""A state that is laid out as it was at the last save is recognised, not walked over again.

The walk is what a save costs the training thread: names are joined, boxes looked up, entries made,
tensor by tensor. But from save to save nothing changes, as a rule, but the values. So what a
walk came across is remembered, by identity and without keeping it alive, and looked at again in a
few passes that Python makes in C. If anything is not as it was (another tensor, name, shape,
stride, dtype or address, a slot that was made meanwhile), the state is walked over anew.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from operator import add, attrgetter, call, is_
from typing import Any
from weakref import ref
from zlib import crc32

import numpy as np
import torch

from planaria.checkpoint.capture.audit import Addressed, Sample
from planaria.checkpoint.capture.sources import Source, gone
from planaria.checkpoint.state.early import EarlyCopies, small
from planaria.checkpoint.state.entries import KnownTensor, TensorEntry
from planaria.core.box import Box
from planaria.errors import StateError

_address, _stride, _negated = torch.Tensor.data_ptr, torch.Tensor.stride, torch.Tensor.is_neg
_conjugated, _storage = torch.Tensor.is_conj, torch.Tensor.untyped_storage
_begin, _size = torch.UntypedStorage.data_ptr, torch.UntypedStorage.nbytes
_shape, _dtype, _version = attrgetter("shape"), attrgetter("dtype"), attrgetter("_version")
# What is the same object has the same value.
_CONSTANTS = (bool, int, float, str, type(None))
_KNOWN = (torch.Tensor, *_CONSTANTS)


class Structure:
    """Identity of what a walk came across, without keeping it alive.

    Args:
        look: Appends signs, which are equal, and things, which are the very same objects, as long
            as a walk would come across the same again.
    """

    def __init__(self, look: Callable[[list[Any], list[Any]], object]) -> None:
        self._look = look
        #: What of it is gone: it must not be taken for None, which it looks like.
        self._gone: list[Any] = []
        self._signs, things = self._seen()
        #: Whether it can be recognised at all.
        self.is_known = all(isinstance(t, _KNOWN) for t in things)
        self._things = [
            ref(t, self._gone.append) if isinstance(t, torch.Tensor) else _Constant(t)
            for t in things
            if self.is_known
        ]

    def again(self) -> list[Any] | None:
        """The things, if a walk would come across the same again."""
        signs, things = self._seen()
        same = (
            self.is_known
            and not self._gone
            and signs == self._signs
            and len(things) == len(self._things)
            and all(map(is_, things, map(call, self._things)))
        )
        return things if same else None

    def _seen(self) -> tuple[list[Any], list[Any]]:
        signs: list[Any] = []
        things: list[Any] = []
        self._look(signs, things)
        return signs, things


class _Constant:
    def __init__(self, value: Any) -> None:
        self._value = value

    def __call__(self) -> Any:
        return self._value


def _guards(tensors: Sequence[torch.Tensor]) -> Any:
    """Checks of kind, dtype, shape and strides of all of them in one call; None if there are none.

    They are torch.compile's own. What they do not recognise is looked at once more, tensor by
    tensor: they want the same gradients and modes as well.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        shapes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
        make: Any = TensorGuards  # its stubs say less than it takes
        return make(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides)
    except Exception:  # another torch: it is faster with them, and right without
        return None


def label_of(name: str, box: Box) -> tuple[int, str]:
    """Checksum of a name and its box, to be continued; and the name."""
    return crc32(f"{name} {box}".encode()), name


class StateLayout:
    """What is known of tensors while nothing but their values changes: columns, one row a tensor.

    Args:
        entries: The tensors, in order, as a walk found them.
        things: What the walk came across, those tensors among it.
        watch_small: Whether small tensors are captured in the background as well.

    Attributes:
        names: Their names.
        index: Name -> row.
        known: What was found out about each.
        lazy: Rows of those that are captured in the background.
        early: Copies those at the call that lie on the host as they are.
        eager: Rows of the others that are copied at the call.
        in_place: Rows of lazy ones whose bytes lie on the host as they are.
        devices: The CUDA devices that they lie on.
    """

    def __init__(
        self, entries: Sequence[TensorEntry], things: Sequence[Any], *, watch_small: bool = False
    ) -> None:
        self.names = [e.name for e in entries]
        self.index = {name: row for row, name in enumerate(self.names)}
        self.known = [e.known for e in entries if e.known is not None]
        self._fixed = [(e.lazy, e.same_everywhere, e.pinned_writer, e.alias_of) for e in entries]
        kinds = [e.local.device.type for e in entries]
        lazy = [row for row, e in enumerate(entries) if e.lazy and kinds[row] in ("cpu", "cuda")]
        background = set(lazy) - (set() if watch_small else small(lazy, self.known))
        at_call = set(range(len(entries))) - background
        plain = [row for row in sorted(at_call) if self.known[row].plain]
        self.lazy = [row for row in lazy if row not in at_call]
        self.early = EarlyCopies(plain, self.known)
        self.eager = sorted(at_call.difference(plain))
        self.in_place = {row for row in self.lazy if self.known[row].plain}
        self.odd = [row for row in self.lazy if row not in self.in_place]
        self.devices = {e.local.device for e in entries if e.local.is_cuda}
        self.lazy_names = [self.names[row] for row in self.lazy]
        self.ends = list(accumulate(self.known[row].nbytes for row in self.lazy))
        place_of = {id(thing): place for place, thing in enumerate(things)}
        self._places = [place_of.get(id(k.tensor()), -1) for k in self.known]
        self._specs = [(row, k.spec) for row, k in enumerate(self.known) if k.spec is not None]
        self._addresses = [k.address for k in self.known]
        locals_ = [e.local for e in entries]
        looks = (_shape, _stride, _dtype, _negated)
        self._forms = [(look, list(map(look, locals_))) for look in looks]
        self._complex = [row for row, e in enumerate(entries) if e.local.is_complex()]
        self._conjugated = [locals_[row].is_conj() for row in self._complex]
        #: Whether the state can be recognised.
        self.is_known = (
            len(self.known) == len(entries)
            and -1 not in self._places
            and not any(local.is_inference() for local in locals_)
        )
        self._guards = _guards(self._locals(things) or []) if self.is_known else None
        #: Of the next save: see `planaria.checkpoint.capture.audit`.
        self.sample: Any = None

    @cached_property
    def labels(self) -> list[tuple[int, str]]:
        """See `label_of`; of lazy boxes with data, no alias among them."""
        rows = [row for row, k in enumerate(self.known) if k.nbytes and self._fixed[row][0]]
        rows = [row for row in rows if self._fixed[row][3] is None]
        return [label_of(self.names[row], self.known[row].box) for row in rows]

    def find(self, things: Sequence[Any]) -> "Recalled | None":
        """The tensors as they are now; None if one of them is not laid out as it was.

        Args:
            things: What a walk would come across now: the same as when this was made.
        """
        tensors = self._locals(things)
        if tensors is None or list(map(_address, tensors)) != self._addresses:
            return None
        same = self._guards is not None and self._guards.check(*tensors)
        return Recalled(self, tensors) if same or self._same_forms(tensors) else None

    def _locals(self, things: Sequence[Any]) -> list[Any] | None:
        """The tensors' local data; None if one is placed in another way than it was."""
        tensors: list[Any] = list(map(things.__getitem__, self._places))
        for row, spec in self._specs:
            if tensors[row]._spec is not spec:
                return None
            tensors[row] = tensors[row]._local_tensor
        return tensors

    def _same_forms(self, tensors: Sequence[torch.Tensor]) -> bool:
        conjugated = [_conjugated(tensors[row]) for row in self._complex]
        return conjugated == self._conjugated and all(
            list(map(look, tensors)) == form for look, form in self._forms
        )

    def entry(self, row: int, local: torch.Tensor, known: KnownTensor | None) -> TensorEntry:
        """An entry with this data."""
        k = self.known[row]
        lazy, same, pinned, alias = self._fixed[row]
        return TensorEntry(
            self.names[row], k.shape, k.box, k.dtype, local, lazy, same, pinned, alias, known
        )


class Recalled(Mapping[str, TensorEntry], Addressed):
    """The tensors of one save, by name; entries are made where they are asked for.

    Args:
        layout: What is known of them.
        tensors: Their live local data, row by row.

    Attributes:
        layout: The same.
        names: Names of those that are captured in the background.
        ends: The sum of their bytes up to each of them.
    """

    def __init__(self, layout: StateLayout, tensors: Sequence[torch.Tensor]) -> None:
        self.layout = layout
        self.names, self.ends = layout.lazy_names, layout.ends
        self._tensors = tensors
        self._lazy = list(map(tensors.__getitem__, layout.lazy))
        # These keep the memory as it is now, whatever the tensors are made to show later.
        self._storages = dict(zip(layout.lazy, map(_storage, self._lazy), strict=True))
        self._apart = {row: tensors[row].detach() for row in layout.odd}
        self._odd_begins = {row: self._storages[row].data_ptr() for row in layout.odd}
        self._room: torch.Tensor | None = None
        self._copies: dict[int, torch.Tensor] = {}

    def copy_eager(self) -> None:
        """Copies what may change at any time, and what is small."""
        self._room = self.layout.early.take()
        for row in self.layout.eager:
            copy = self._tensors[row].detach().clone(memory_format=torch.contiguous_format)
            self._copies[row] = copy if copy.device.type in ("cpu", "cuda") else copy.cpu()

    def let_go(self) -> None:
        """Once all of it is captured: what was copied at the call is not needed any more."""
        room, self._room = self._room, None
        if room is not None:
            self.layout.early.give_back(room)

    @property
    def room(self) -> torch.Tensor:
        """What was copied at the call, from `layout.early`, uint8[n].

        Raises:
            StateError: It was let go.
        """
        if self._room is None:
            raise StateError("the state of a save is read after it was captured")
        return self._room

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.names)

    def __len__(self) -> int:
        return len(self.layout.names)

    def __getitem__(self, name: str, /) -> TensorEntry:
        """The entry of a tensor.

        Raises:
            TornCaptureError: Its memory was freed or moved.
        """
        row, layout = self.layout.index[name], self.layout
        if row in self._copies:
            return layout.entry(row, self._copies[row], None)
        if self._room is not None and row in layout.early.places:
            return layout.entry(row, self._early(row), None)
        if row in layout.in_place:
            local = self._view(row)
        else:  # what else there is is copied before anything may happen to it
            local = self._apart[row] if row in self._apart else self._tensors[row].detach()
        return layout.entry(row, local, layout.known[row])

    def check_in_place(self, rows: Sequence[int]) -> None:
        """Makes sure that memory is where it was: what was freed or moved must not be read.

        Raises:
            TornCaptureError: It is not; names the tensor.
        """
        now = map(_begin, map(self._storages.__getitem__, rows))
        for row, begin in zip(rows, now, strict=True):
            if begin != self._begins[row]:
                raise gone(self.layout.names[row])

    @cached_property
    def _begins(self) -> dict[int, int]:
        """Row -> where its memory begins; -1 where it is not what it was at the call.

        Looked at in the background, for what was at the call is known: the tensor lay in it.
        """
        storages, known = self._storages.values(), self.layout.known
        begins = list(map(_begin, storages))
        ends = map(add, begins, map(_size, storages))
        found: dict[int, int] = {}
        for row, begin, end in zip(self.layout.lazy, begins, ends, strict=True):
            k = known[row]
            found[row] = begin if not k.nbytes or begin <= k.address <= end - k.nbytes else -1
        for row, begin in self._odd_begins.items():
            found[row] = begin if self._storages[row].data_ptr() == begin else -1
        return found

    def source(self, name: str) -> Source:
        """How the bytes of a tensor that is captured in the background are read."""
        row = self.layout.index[name]
        if row not in self.layout.in_place:
            return Source(self._apart[row])
        known = self.layout.known[row]
        return Source.plain(self._storages[row], known.address, known.nbytes, self._begins[row])

    @property
    def sample(self) -> Sample | None:
        """See `planaria.checkpoint.capture.audit.Addressed`."""
        return self.layout.sample

    @sample.setter
    def sample(self, sample: Sample | None) -> None:
        self.layout.sample = sample

    def addresses(self, places: Sequence[tuple[str, int, int]]) -> np.ndarray | None:
        """See `planaria.checkpoint.capture.audit.Addressed`."""
        layout = self.layout
        if layout.odd:
            return None
        rows = [layout.index[name] for name, _, _ in places]
        starts = [start for _, start, _ in places]
        found = [layout.known[row].address + at for row, at in zip(rows, starts, strict=True)]
        return np.array(found, dtype=np.int64)

    def signs(self) -> list[int]:
        """See `planaria.checkpoint.capture.sources.Watched`."""
        return list(map(_version, self._lazy))

    def moved(self) -> list[str]:
        """See `planaria.checkpoint.capture.sources.Watched`."""
        now = list(map(_begin, self._storages.values()))
        if now == list(self._begins.values()):
            return []
        pairs = zip(self._begins.items(), now, strict=True)
        return [self.layout.names[row] for (row, before), begin in pairs if begin != before]

    def _early(self, row: int) -> torch.Tensor:
        """The copy of a tensor that was made at the call."""
        known, start = self.layout.known[row], self.layout.early.places[row]
        data = self.room[start : start + known.nbytes].view(known.dtype.dtype)
        return data.view(known.box.extent)

    def _view(self, row: int) -> torch.Tensor:
        """The data in the memory that the tensor had: it may show another by now."""
        self.check_in_place([row])
        known, storage = self.layout.known[row], self._storages[row]
        data = torch.empty(0, dtype=known.dtype.dtype, device=storage.device)
        # An empty tensor, such as a shard of few rows over many ranks, has no address.
        offset = (known.address - self._begins[row]) // data.element_size() if known.nbytes else 0
        return data.set_(storage, offset, known.box.extent, known.strides)
