"""Fetching batches: in this process, or ahead of it in worker processes.

Both feeds give the batch of a key, whatever was asked before; the one with workers is only
fast when the keys come in the order that it was told.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol

from planaria.data.order import MapOrder, StreamOrder
from planaria.data.rng import kept_rng, micro_batch_seed, seed_rng
from planaria.data.streams import Stream
from planaria.data.worker import enter_worker
from planaria.errors import DeadlineError

Key = tuple[int, tuple[int, ...]]
"""A step and some of its micro-batches, whose samples are collated together."""


class Fetcher:
    """Reads and collates the samples of a key; map-style over keys, as DataLoader wants it.

    The micro-batches of a key are read one after the other, each with the global RNG seeded for
    it; collating goes on with the last one's. The caller's RNG is left as it was.

    Args:
        dataset: The dataset, map-style or iterable.
        order: Where the samples stand.
        collate: Makes one batch of a list of samples; None for torch's default.
    """

    def __init__(
        self,
        dataset: Any,
        order: MapOrder | StreamOrder,
        collate: Callable[[list[Any]], Any] | None,
    ) -> None:
        self._dataset, self._order, self._collate = dataset, order, collate
        self._streams: dict[int, Stream] = {}

    def __getitem__(self, key: Key) -> Any:
        from torch.utils.data import default_collate

        step, micro_batches = key
        with kept_rng():
            samples = [s for i in micro_batches for s in self._read(step, i)]
            return (self._collate or default_collate)(samples)

    def _read(self, step: int, micro_batch: int) -> list[Any]:
        if isinstance(self._order, StreamOrder):
            if micro_batch not in self._streams:
                self._streams[micro_batch] = Stream(self._dataset, self._order, micro_batch)
            return self._streams[micro_batch].read(step)
        wanted = self._order.indices(step, micro_batch)
        seed_rng(micro_batch_seed(self._order.seed, step, micro_batch))
        if hasattr(self._dataset, "__getitems__"):
            return list(self._dataset.__getitems__(wanted))
        return [self._dataset[i] for i in wanted]


class Feed(Protocol):
    """Gives batches by key."""

    def get(self, key: Key) -> Any:
        """Returns the batch of a key."""
        ...

    def close(self) -> None:
        """Ends what the feed has started. It may be called again."""
        ...


class InlineFeed:
    """Fetches in this process, when asked."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher

    def get(self, key: Key) -> Any:
        """Returns the batch of a key."""
        return self._fetcher[key]

    def close(self) -> None:
        """Does nothing: nothing was started."""


class WorkerFeed:
    """Fetches ahead in the worker processes of a `torch.utils.data.DataLoader`.

    Args:
        fetcher: What runs in the workers. It must not have been used in this process.
        keys_from: All keys from a given one on, in the order they will be asked for.
        workers: Number of processes.
        timeout: Seconds to wait for one batch.
        context: Start method of the processes; None for torch's own.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        keys_from: Callable[[Key], Iterable[Key]],
        workers: int,
        timeout: float,
        context: str | None,
    ) -> None:
        self._fetcher, self._keys_from = fetcher, keys_from
        self._workers, self._timeout, self._context = workers, timeout, context
        self._batches: Iterator[Any] | None = None
        self._expected: Iterator[Key] = iter(())
        self._next: Key | None = None

    def get(self, key: Key) -> Any:
        """Returns the batch of a key; starts the workers anew if it is not the expected one.

        Raises:
            DeadlineError: The workers did not deliver in time.
        """
        if self._batches is None or key != self._next:
            self._start(key)
        assert self._batches is not None
        try:
            batch = next(self._batches)
        except RuntimeError as error:
            self.close()
            if not str(error).startswith("DataLoader timed out"):
                raise
            raise DeadlineError(
                f"no batch for step {key[0]} within {self._timeout:g} s from "
                f"{self._workers} data worker(s): the dataset is stuck or slow. Raise `timeout`, "
                "or use num_workers=0 to see where it waits"
            ) from error
        except BaseException:
            self.close()
            raise
        self._next = next(self._expected, None)
        return batch

    def close(self) -> None:
        """Ends the worker processes."""
        batches, self._batches = self._batches, None
        # Dropping the iterator ends the workers as well, but not while a traceback holds it.
        shutdown = getattr(batches, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()

    def _start(self, key: Key) -> None:
        import torch
        from torch.utils.data import DataLoader

        self.close()
        self._expected = iter(self._keys_from(key))
        self._next = next(self._expected)
        loader = DataLoader(
            self._fetcher,  # pyright: ignore[reportArgumentType]
            batch_size=None,
            sampler=self._keys_from(key),
            num_workers=self._workers,
            collate_fn=_same,
            timeout=self._timeout,
            worker_init_fn=partial(enter_worker, os.getpid()),
            multiprocessing_context=self._context,
            # It draws a base seed from this: by default from the trainer's RNG.
            generator=torch.Generator(),
        )
        self._batches = iter(loader)


def _same(batch: Any) -> Any:
    return batch
