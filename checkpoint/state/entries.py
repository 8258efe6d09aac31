"""What a rank has to say of its state: tensor boxes and small objects, by name."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from planaria.checkpoint.format.dtypes import StoredDtype, stored_dtype
from planaria.checkpoint.state.dtensors import local_box
from planaria.core.box import Box
from planaria.errors import StateError


@dataclass(slots=True)
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

    @property
    def nbytes(self) -> int:
        return self.box.volume * self.dtype.itemsize


@dataclass
class Collector:
    """Gathers the entries of all providers and finds the ones that are the same memory."""

    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
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
        box, local = locate(name, tensor)
        entry = TensorEntry(
            name,
            tuple(tensor.shape),
            box,
            stored_dtype(tensor.dtype, name),
            local,
            lazy,
            same_everywhere,
            pinned_writer,
        )
        if local.numel():
            key = (memory_key(local), box, entry.shape)
            entry.alias_of = self._memory.get(key)
            self._memory.setdefault(key, name)
            if entry.alias_of is not None and not lazy:
                # The copy is taken through the first name: it must be early enough for both.
                self.tensors[entry.alias_of].lazy = False
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
