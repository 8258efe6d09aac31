"""A double of NCCL between processes: what it needs of its callers, without a device.

Launches of a rank run one after the other, as on one stream; messages between two ranks are told
apart by their order alone. Where ranks start their exchanges in different orders that is said, and
the process ended; NCCL would hang, or mix them up. What is broken is noticed by nobody until it is
aborted.
"""

import os
import queue
import threading
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch

from planaria.elastic import engine, generations, session
from planaria.elastic.reduction import nccl
from planaria.elastic.reduction.gloo import GlooGroup

#: How the double says so, before it ends the process.
MIXED = "a message of another exchange"
Launch = list[tuple[Any, ...]]


class Work:
    """A launch."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def is_completed(self) -> bool:
        return self.done.is_set()

    def wait(self) -> None:
        assert self.done.is_set(), "the stream of the caller was made to wait for ever"


class OrderedNccl:
    """Stands for `ProcessGroupNCCL`."""

    class Options:
        _timeout = timedelta(0)

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        self._gloo = GlooGroup(store, rank, size, options._timeout.total_seconds())
        self._seen: Counter[tuple[str, int]] = Counter()
        self._open: Launch | None = None
        self._launches: queue.SimpleQueue[tuple[Launch, Work] | None] = queue.SimpleQueue()

    def eager_connect_single_device(self, device: Any) -> None:
        self._gloo.make()
        threading.Thread(target=self._run, name="stream", daemon=True).start()

    def abort(self) -> None:
        self._gloo.close()
        self._launches.put(None)

    def send(self, tensors: Any, peer: int, tag: int) -> None:
        assert self._open is not None, "alone it would block the others"
        self._open.append(("send", tensors, peer, tag))

    def recv(self, tensors: Any, peer: int, tag: int) -> None:
        assert self._open is not None, "alone it would block the others"
        self._open.append(("recv", tensors, peer, tag))

    def allreduce(self, tensors: Any) -> Work:
        return self._launch([("allreduce", tensors, -1)])

    def _start_coalescing(self, device: Any) -> None:
        assert self._open is None, "two threads launch at a time"
        self._open = []

    def _end_coalescing(self, device: Any) -> Work:
        launch, self._open = self._open, None
        return self._launch(launch or [])

    def _launch(self, launch: Launch) -> Work:
        work = Work()
        self._launches.put((launch, work))
        return work

    def _run(self) -> None:
        while (found := self._launches.get()) is not None:
            launch, work = found
            try:
                for wait in [self._start(*part) for part in launch]:
                    wait()
            except (RuntimeError, AttributeError):
                return  # no launch ends any more
            work.done.set()

    def _start(self, verb: str, tensors: Any, peer: int, tag: int = 0) -> Callable[[], object]:
        group = self._gloo.group
        if verb == "allreduce":
            return group.allreduce(tensors).wait
        self._seen[verb, peer] += 1
        number = 2 * self._seen[verb, peer]
        head = torch.tensor([tag, tensors[0].nbytes])
        if verb == "send":
            works = [group.send([head], peer, number), group.send(tensors, peer, number + 1)]
            return lambda: [work.wait() for work in works]
        due, work = head.tolist(), group.recv([head], peer, number)

        def receive() -> None:
            work.wait()
            if head.tolist() != due:
                print(f"{MIXED}: tag and size are {head.tolist()}, {due} are due", flush=True)
                os.abort()
            group.recv(tensors, peer, number + 1).wait()

        return receive


def play(monkey: pytest.MonkeyPatch, *, in_order: bool) -> None:
    """Has a session take the double, as if all tensors of floats were a device's.

    Args:
        monkey: Nothing is undone: the process is a member's.
        in_order: Whether buckets, of which there are many, go one after the other.
    """
    connect, make = generations.connect_ranks, engine.Settings
    reducer = partial(generations.GradientReducer, bucket_bytes=256)
    device = torch.device("cuda", 0)
    monkey.setattr(nccl, "_backend", lambda: OrderedNccl)
    monkey.setattr(nccl, "_on_device", lambda tensor: tensor.is_floating_point())
    monkey.setattr(generations, "connect_ranks", lambda m, v, d, _: connect(m, v, d, device))
    monkey.setattr(session, "Settings", lambda **o: make(**{**o, "links": "nccl"}))
    if in_order:
        monkey.setattr(generations, "GradientReducer", reducer)
    else:
        more = {"ordered": False}
        monkey.setattr(generations, "GradientReducer", lambda *a, **o: reducer(*a, **{**o, **more}))
