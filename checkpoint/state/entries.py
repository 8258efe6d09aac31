"""What a rank has to say of its state: tensor boxes and small objects, by name."""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from planaria.checkpoint.capture.sources import Source, is_plain
from planaria.checkpoint.format.dtypes import StoredDtype, stored_dtype
from planaria.checkpoint.state.dtensors import local_box
from planaria.core.box import Box
from planaria.errors import StateError


@dataclass(slots=True, eq=False)
class TensorEntry:
    """One box of a logical tensor, on this rank.

    Attributes:
        name: Logical name.
        shape: Global shape.
        box: Which part this rank holds; may be empty.
        dtype: Stored dtype.
        local: The live data, of shape `box.extent`, any strides, any device; detached.
        lazy: True if it changes only in an optimizer's step (or after `before_update`), so that it
            may be copied in the background; False if it must be copied at once.
        same_everywhere: Whether replicas must be equal bit for bit, which is then checked.
        pinned_writer: Whether the lowest rank that holds it must write it (buffers of which rank
            0's are the ones that count, as under DDP).
        alias_of: Name of the entry that is the very same memory.
        known: What was found out about the tensor; the same object as long as nothing changed.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    dtype: StoredDtype
    local: torch.Tensor
    lazy: bool = True
    same_everywhere: bool = False
    pinned_writer: bool = False
    alias_of: str | None = None
    known: "KnownTensor | None" = None

    @property
    def source(self) -> Source:
        """How the bytes of `local` are read."""
        known = self.known
        if known is None or not known.plain:
            return Source(self.local)
        return Source.plain(self.local, known.address, known.nbytes)

    def replace(self, copy: torch.Tensor) -> None:
        """Lets a copy stand for the live data."""
        self.local, self.known = copy, None

    @property
    def nbytes(self) -> int:
        return self.box.volume * self.dtype.itemsize


class KnownTensor:
    """What was found out about a tensor, as long as it is the same memory, seen the same way.

    Walking over the state is what a save costs the training thread: a tensor that is where it was
    at the last save need not be looked at as closely again. Keeps no memory alive.
    """

    __slots__ = (
        *("address", "box", "dtype", "key", "nbytes"),
        *("plain", "shape", "spec", "strides", "tensor"),
    )

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.box, local = locate(name, tensor)
        self.tensor, self.spec = weakref.ref(tensor), getattr(tensor, "_spec", None)
        self.address, self.strides = local.data_ptr(), local.stride()
        self.plain, self.nbytes = is_plain(local), local.numel() * local.element_size()
        self.dtype = stored_dtype(tensor.dtype, name)
        self.shape = tuple(tensor.shape)
        #: Equal for tensors that are the very same elements in memory; None for empty ones.
        self.key = (memory_key(local), self.box, self.shape) if local.numel() else None

    def local_if_same(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The tensor's live local data; None if something about it is not as it was."""
        if self.tensor() is not tensor:
            return None
        if self.spec is not None:
            if tensor._spec is not self.spec:  # pyright: ignore[reportAttributeAccessIssue]
                return None
            tensor = tensor._local_tensor  # pyright: ignore[reportAttributeAccessIssue]
        if (
            tensor.data_ptr() != self.address
            or tensor.shape != self.box.extent
            or tensor.stride() != self.strides
            or tensor.dtype is not self.dtype.dtype
            or tensor.is_conj()
            or tensor.is_neg()
        ):
            return None
        return tensor.detach()


@dataclass
class Collector:
    """Gathers the entries of all providers and finds the ones that are the same memory.

    Attributes:
        tensors: Entries by name.
        objects: JSON data by name.
        before: What was known at the last collection, by name.
        known: What is known now.
    """

    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    before: dict[str, KnownTensor] = field(default_factory=dict)
    known: dict[str, KnownTensor] = field(default_factory=dict)
    _memory: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def tensor(
        self,
        name: str,
        tensor: torch.Tensor,
        *,
        lazy: bool,
        same_everywhere: bool = False,
        pinned_writer: bool = False,
    ) -> None:
        """Adds a tensor.

        Raises:
            StateError: It has no data (meta), no stored form, or its name is taken.
        """
        if name in self.tensors or name in self.objects:
            raise StateError(f"two parts of the state are both named {name!r}; rename one")
        if isinstance(tensor, DTensor) and tensor.device_mesh.get_coordinate() is None:
            return  # its mesh leaves this rank out
        known = self.before.get(name)
        local = known.local_if_same(tensor) if known is not None else None
        if known is None or local is None:
            known, local = KnownTensor(name, tensor), locate(name, tensor)[1]
        self.known[name] = known
        entry = TensorEntry(
            name,
            known.shape,
            known.box,
            known.dtype,
            local,
            lazy,
            same_everywhere,
            pinned_writer,
            None,
            known,
        )
        if known.key is not None:
            first = self._memory.setdefault(known.key, name)
            if first != name:
                entry.alias_of = first
                if not lazy:
                    # The copy is taken through the first name: early enough for both.
                    self.tensors[first].lazy = False
        self.tensors[name] = entry

    def object(self, name: str, value: Any) -> None:
        """Adds an object that is JSON data already.

        Raises:
            StateError: Its name is taken.
        """
        if name in self.tensors or name in self.objects:
            raise StateError(f"two parts of the state are both named {name!r}; rename one")
        self.objects[name] = value


def locate(name: str, tensor: torch.Tensor) -> tuple[Box, torch.Tensor]:
    """The box that this rank holds of a tensor, and its live local data.

    Raises:
        StateError: The tensor has no plain dense data.
    """
    if isinstance(tensor, DTensor):
        local = tensor._local_tensor.detach()
        check_plain(name, local)
        return local_box(name, tensor), local
    check_plain(name, tensor)
    return Box.full(tensor.shape), tensor.detach()


def check_plain(name: str, data: torch.Tensor) -> None:
    """Makes sure that a tensor has plain dense data.

    Raises:
        StateError: It has not; says what to do.
    """
    if isinstance(data, UninitializedParameter | UninitializedBuffer):
        raise StateError(f"tensor {name!r} of a lazy module has no shape yet; run the module once "
                         "before it is saved or restored")  # fmt: skip
    if data.is_meta:
        raise StateError(
            f"tensor {name!r} is on the meta device and has no data; materialise the module first "
            "(module.to_empty(device=...)), then load or initialise it"
        )
    if data.layout is not torch.strided:
        raise StateError(f"tensor {name!r} has layout {data.layout}; only dense tensors can be "
                         "saved (call .to_dense(), or save its indices and values)")  # fmt: skip
    if type(data.detach()) is not torch.Tensor or data.is_nested:
        kind = "nested tensor" if data.is_nested else type(data).__name__
        raise StateError(f"tensor {name!r} is a {kind}, which has no plain dense data; save the "
                         "tensors that it is made of")  # fmt: skip


def memory_key(t: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the very same elements in memory."""
    return (t.untyped_storage().data_ptr(), t.storage_offset(), t.shape, t.stride(), t.dtype,
            t.device, t.is_conj(), t.is_neg())  # fmt: skip
