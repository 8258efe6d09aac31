"""Ranks that are threads of one process: every world size in milliseconds, no sockets."""

import queue
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from planaria.core.deadline import Deadline
from planaria.elastic.reduction.transport import Parts, Wait
from planaria.errors import CollectiveError

T = TypeVar("T")


class Hub:
    """What threads leave for each other.

    Attributes:
        sent: Elements that each pair of ranks (from, to) has sent.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._boxes: dict[tuple[int, int, int], queue.SimpleQueue[torch.Tensor]] = defaultdict(
            queue.SimpleQueue
        )
        self._lock = threading.Lock()
        self.sent: dict[tuple[int, int], int] = defaultdict(int)

    def box(self, source: int, target: int, tag: int) -> "queue.SimpleQueue[torch.Tensor]":
        """The letter box between two ranks."""
        with self._lock:
            return self._boxes[source, target, tag]


class LocalTransport:
    """The transport of one thread, see `planaria.elastic.reduction.transport.Transport`."""

    def __init__(self, hub: Hub, rank: int) -> None:
        self.rank, self.size = rank, hub.size
        self._hub = hub
        self._sums = 0

    def exchange(self, tag: int, outgoing: Parts, incoming: Parts) -> Wait:
        assert not outgoing[self.rank]
        assert not incoming[self.rank]
        for peer, tensors in enumerate(outgoing):
            for tensor in tensors:
                assert tensor.is_contiguous()
                self._hub.sent[self.rank, peer] += tensor.numel()
                self._hub.box(self.rank, peer, tag).put(tensor.clone())

        def wait(deadline: Deadline) -> None:
            for peer, tensors in enumerate(incoming):
                for tensor in tensors:
                    tensor.copy_(self._take(peer, tag, deadline))

        return wait

    def all_reduce(self, tensor: torch.Tensor) -> Wait:
        self._sums += 1
        tag = -self._sums
        for peer in range(self.size):
            self._hub.box(self.rank, peer, tag).put(tensor.clone())

        def wait(deadline: Deadline) -> None:
            tensor.copy_(self._take(0, tag, deadline))
            for peer in range(1, self.size):
                tensor.add_(self._take(peer, tag, deadline))

        return wait

    def close(self) -> None:
        pass

    def _take(self, peer: int, tag: int, deadline: Deadline) -> torch.Tensor:
        try:
            return self._hub.box(peer, self.rank, tag).get(timeout=deadline.timeout())
        except queue.Empty:
            raise CollectiveError(f"rank {self.rank}: nothing from rank {peer}") from None


def on_threads(size: int, body: Callable[[LocalTransport], T]) -> list[T]:
    """Runs a function on as many ranks, with a transport each, and returns what they return."""
    hub = Hub(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: body(LocalTransport(hub, rank)), range(size)))
