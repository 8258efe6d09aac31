"""A trainer's word that a collective is under way, to which the forming of parity gives way."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from planaria.checkpoint.memory.courtesy import Marks

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel

_marks: weakref.WeakSet[Marks] = weakref.WeakSet()
_lock = threading.Lock()


def add(marks: Marks) -> None:
    """Has a rank's word be given with `communicating` for as long as it lives."""
    with _lock:
        _marks.add(marks)


def _begin() -> list[Marks]:
    with _lock:
        all_of_them = list(_marks)
    for each in all_of_them:
        each.begin()
    return all_of_them


@contextlib.contextmanager
def communicating() -> Iterator[None]:
    """A block in which this rank waits for others, such as one of collectives.

    While one is under way snapshot processes hold back what they send each other for parity, for
    up to a quarter of a second a batch, and half of `MemoryTier(timeout_s=)` all together. Without
    a memory tier it does nothing; it costs about a microsecond. Blocks may be nested, and be under
    way in several threads.
    """
    under_way = _begin()
    try:
        yield
    finally:
        for each in under_way:
            each.end()


def mark_communication(
    model: DistributedDataParallel,
    hook: Callable[[Any, Any], Any] | None = None,
    state: object = None,
) -> None:
    """Has each gradient bucket of DistributedDataParallel count as `communicating`.

    Args:
        model: The model; it must not have a communication hook yet.
        hook: Its communication hook; by default the mean over all ranks, with the bits that it has
            without one.
        state: The hook's state; by default the process group, which the default hook takes.
    """
    inner = hook or _mean

    def marked(state: Any, bucket: Any) -> Any:
        under_way = _begin()

        def done(future: Any) -> Any:
            for each in under_way:
                each.end()
            return future.value()

        try:
            return inner(state, bucket).then(done)
        except BaseException:
            for each in under_way:
                each.end()
            raise

    marked.__annotations__.clear()  # they are texts here, which it takes for wrong ones
    model.register_comm_hook(model.process_group if state is None else state, marked)


def _mean(group: Any, bucket: Any) -> Any:
    """What DDP does by itself; torch's own hook divides instead, which rounds otherwise."""
    import torch.distributed as dist

    gradients = bucket.buffer().mul_(1.0 / group.size())
    work: Any = dist.all_reduce(gradients, group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])
