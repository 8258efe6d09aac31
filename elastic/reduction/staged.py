"""Tensors of a device between ranks that are connected on the host: copied there and back.

gloo moves memory of the host alone. What a rank sends is copied to pinned memory first, and what it
gets to the device afterwards; the order of the additions, and so their bits, are not touched.
Ranks' threads use streams of their own: :func:`mark` and :func:`settle` put their work in order.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from planaria.core.deadline import Deadline
from planaria.elastic.reduction.transport import Parts, Transport, Wait

if TYPE_CHECKING:
    import torch


class Staged:
    """A transport for tensors of any device, by way of one for those of the host.

    Args:
        inner: The ranks, connected on the host.
    """

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.rank, self.size = inner.rank, inner.size

    def exchange(self, tag: int, outgoing: Parts, incoming: Parts) -> Wait:
        """Starts an exchange, see `Transport`."""
        tensors = [t for parts in (*outgoing, *incoming) for t in parts]
        if all(map(_on_host, tensors)):
            return self._inner.exchange(tag, outgoing, incoming)
        sent = [[_to_host(t) for t in parts] for parts in outgoing]
        got = [[_like(t) for t in parts] for parts in incoming]
        for device in {t.device for parts in outgoing for t in parts}:
            settle(device)
        wait = self._inner.exchange(tag, sent, got)

        def finish(deadline: Deadline) -> None:
            wait(deadline)
            sent.clear()  # until here it had to stay
            _back(incoming, got)

        return finish

    def all_reduce(self, tensor: "torch.Tensor") -> Wait:
        """Starts a plain sum, see `Transport`."""
        if _on_host(tensor):
            return self._inner.all_reduce(tensor)
        host = _to_host(tensor)
        settle(tensor.device)
        wait = self._inner.all_reduce(host)

        def finish(deadline: Deadline) -> None:
            wait(deadline)
            _back([[tensor]], [[host]])

        return finish

    def close(self) -> None:
        """See `Transport`."""
        self._inner.close()


def mark(device: "torch.device") -> Callable[[], None]:
    """Marks what this thread has given a device to do; what is returned waits for it in another.

    That wait is the device's: the thread that calls it goes on, what it gives the device comes
    after.
    """
    if device.type != "cuda":
        return _nothing
    import torch

    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return lambda: torch.cuda.current_stream(device).wait_event(event)


def settle(device: "torch.device") -> None:
    """Returns once a device has done what this thread has given it to do."""
    if device.type == "cuda":
        import torch

        torch.cuda.current_stream(device).synchronize()


def _nothing() -> None:
    pass


def _on_host(tensor: "torch.Tensor") -> bool:
    return tensor.device.type == "cpu"


def _like(tensor: "torch.Tensor") -> "torch.Tensor":
    """Memory of the host for a tensor; its own where it is there."""
    import torch

    if _on_host(tensor):
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def _to_host(tensor: "torch.Tensor") -> "torch.Tensor":
    host = _like(tensor)
    return host if host is tensor else host.copy_(tensor, non_blocking=True)


def _back(tensors: Parts, hosts: Parts) -> None:
    for parts, others in zip(tensors, hosts, strict=True):
        for tensor, host in zip(parts, others, strict=True):
            if host is not tensor:
                tensor.copy_(host, non_blocking=True)
    # The host's memory is given back then, and other threads may read the tensors.
    for device in {t.device for parts in tensors for t in parts}:
        settle(device)
