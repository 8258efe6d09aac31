"""Iterable datasets, read through a fixed number of logical workers."""

from collections.abc import Iterator
from copy import copy
from itertools import chain, islice
from typing import Any

from planaria.data.order import StreamOrder
from planaria.data.rng import micro_batch_seed, seed_rng
from planaria.errors import ConfigError

_END = object()


class Stream:
    """Logical worker `index` of `count`: an endless sequence of elements, pass after pass.

    Its elements are those of `dataset.shard(num_shards=count, index=index)` where the dataset has
    that method, else every `count`-th element of the whole dataset, starting with `index`. Before
    each pass `set_epoch(pass)` is called where it exists. Micro-batch `index` of step `s` is
    elements `[s * size, (s + 1) * size)`.

    Reading forward is free. To jump ahead, `skip(n)` is used where it exists (a pass that ends
    before the target is read through once, to count it), otherwise elements are read and dropped
    under the seeds they would have been read with. To go back is to start over.

    Args:
        dataset: An iterable that can be iterated again and again.
        order: Number of logical workers, size of a micro-batch, seed.
        index: Number of this logical worker, from 0.
    """

    def __init__(self, dataset: Any, order: StreamOrder, index: int) -> None:
        self._index, self._count = index, order.n_micro_batches
        self._size, self._seed = order.micro_batch_size, order.seed
        self._sharded = hasattr(dataset, "shard")
        if self._sharded:
            self._source = dataset.shard(num_shards=self._count, index=index)
        else:
            # Logical workers may be in different passes, and an epoch is the source's attribute.
            self._source = copy(dataset) if hasattr(dataset, "set_epoch") else dataset
        self._rewind()

    def read(self, step: int) -> list[Any]:
        """Returns the elements of this worker's micro-batch of a step; seeds the global RNG.

        Raises:
            ConfigError: A pass has no elements.
        """
        if step < self._step:
            self._rewind()
        try:
            if step > self._step and hasattr(self._source, "skip"):
                self._skip((step - self._step) * self._size)
                self._step = step
            while self._step < step:
                self._draw()
            return self._draw()
        except BaseException:
            # What raised may be half read: a generator that raised would pass for an exhausted one.
            self._rewind()
            raise

    def _draw(self) -> list[Any]:
        seed_rng(micro_batch_seed(self._seed, self._step, self._index))
        samples = list(islice(self._elements, self._size))
        self._offset += len(samples)
        while len(samples) < self._size:
            if not self._start(self._pass + 1):
                raise self._empty()
            more = list(islice(self._elements, self._size - len(samples)))
            self._offset += len(more)
            samples += more
        self._step += 1
        return samples

    def _rewind(self) -> None:
        self._step = 0
        self._pass, self._offset = -1, 0
        self._elements: Iterator[Any] = iter(())

    def _start(self, number: int, offset: int = 0) -> bool:
        """Opens a pass at an offset; returns whether there is an element."""
        source = self._source
        _set_epoch(source, number)
        if offset:
            source = source.skip(offset * (1 if self._sharded else self._count))
            _set_epoch(source, number)
        elements = iter(source)
        if not self._sharded:
            elements = islice(elements, self._index, None, self._count)
        # The body of a generator runs at the first element only: take that one while the epoch
        # is what it should be.
        first = next(elements, _END)
        self._elements = iter(()) if first is _END else chain([first], elements)
        self._pass, self._offset = number, offset
        return first is not _END

    def _skip(self, amount: int) -> None:
        number, offset = max(self._pass, 0), self._offset
        rest = self._elements if self._pass >= 0 else None
        while not self._start(number, offset + amount):
            if rest is None:
                if not self._start(number):
                    raise self._empty()
                rest = self._elements
            amount -= sum(1 for _ in rest)
            number, offset, rest = number + 1, 0, None

    def _empty(self) -> ConfigError:
        where = f"logical worker {self._index} of {self._count}"
        why = (
            f"dataset.shard(num_shards={self._count}, index={self._index}) is empty"
            if self._sharded
            else f"the dataset yields {self._index} elements or fewer"
        )
        return ConfigError(
            f"{where} has nothing to read in pass {self._pass}: {why}. Give a dataset with at "
            f"least {self._count} elements or shards, or have fewer micro-batches in a step"
        )


def _set_epoch(source: Any, number: int) -> None:
    if hasattr(source, "set_epoch"):
        source.set_epoch(number)
