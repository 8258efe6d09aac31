"""Memory of sums that are over, for the sums that follow them.

The first touch of fresh memory costs more than adding up in it, and after a loss every rank needs
all of its sums anew, at once. So what a generation leaves is used by the next one: only where
nothing is under way in it any more, as links that break may still write into what they were given.
"""

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: Of the memory of a part so much more is asked for, in halves: where one of three ranks or more is
#: lost the others' parts grow by no more. Until then nobody touches it, and so it is not there.
_ROOM = 2
#: What is larger by more than this is left alone.
_MOST = 2


class Memory:
    """Flat tensors that are free. It may be used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[torch.Tensor] = []

    def give(self, tensor: "torch.Tensor") -> None:
        """Takes memory back; nothing else may refer to it, and nothing be under way in it.

        Args:
            tensor: What :meth:`take` gave, or another that begins where its memory begins.
        """
        whole = tensor.untyped_storage().nbytes() // tensor.element_size()
        with self._lock:
            self._free.append(tensor.as_strided((whole,), (1,), 0))

    def take(
        self, numel: int, dtype: "torch.dtype", device: "torch.device", *, grows: bool = False
    ) -> "torch.Tensor":
        """A flat tensor, of what is free or of fresh memory; it is not cleared.

        Args:
            numel: Its number of elements.
            dtype: Its dtype.
            device: Where it is.
            grows: Whether one of another generation may have to be larger.
        """
        import torch

        with self._lock:
            fitting = [
                (tensor.numel(), i)
                for i, tensor in enumerate(self._free)
                if tensor.dtype == dtype
                and tensor.device == device
                and numel <= tensor.numel() <= _MOST * numel
            ]
            found = self._free.pop(min(fitting)[1]) if fitting else None
        if found is None:
            room = numel // _ROOM if grows and device.type == "cpu" else 0
            found = torch.empty(numel + room, dtype=dtype, device=device)
        return found[:numel]

    def clear(self) -> None:
        """Lets go of what is free."""
        with self._lock:
            self._free.clear()
