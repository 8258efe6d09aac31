"""GlobalBatch over iterable datasets: logical workers."""

import random
from collections import Counter
from collections.abc import Iterator
from itertools import chain, count, islice
from typing import Any

import pytest
import torch
from data_runs import Segment, committed_steps
from hypothesis import given, settings
from hypothesis import strategies as st

from planaria.data import GlobalBatch
from planaria.errors import ConfigError, NotSupportedError


class Plain:
    """Any iterable."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[Any]:
        return iter(range(self.length))


class Epochs(Plain, torch.utils.data.IterableDataset):
    """Torch's kind; every epoch has another length and other elements, named (epoch, i)."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        # The epoch is looked up again and again: whoever shares this object must not change it.
        for i in range(self.length + self.epoch % 3):
            yield self.epoch, i


class Sharded(Epochs):
    """Cuts itself into contiguous shards, and can skip."""

    def __init__(self, length: int, bounds: tuple[int, int] = (0, 1), skipped: int = 0) -> None:
        super().__init__(length)
        self.bounds, self.skipped = bounds, skipped

    def shard(self, num_shards: int, index: int) -> "Sharded":
        return Sharded(self.length, (index, num_shards))

    def skip(self, n: int) -> "Sharded":
        return Sharded(self.length, self.bounds, self.skipped + n)

    def __iter__(self) -> Iterator[Any]:
        index, num_shards = self.bounds
        whole = list(super().__iter__())
        start, stop = (len(whole) * i // num_shards for i in (index, index + 1))
        return iter(whole[start:stop][self.skipped :])


class SkipsOnly(Epochs):
    """Can skip, but not shard."""

    skipped = 0

    def skip(self, n: int) -> "SkipsOnly":
        other = SkipsOnly(self.length)
        other.skipped = self.skipped + n
        return other

    def __iter__(self) -> Iterator[Any]:
        return islice(super().__iter__(), self.skipped, None)


def expected_stream(dataset: Any, index: int, of: int) -> Iterator[Any]:
    """What a logical worker reads, from the definition."""

    def one_pass(number: int) -> list[Any]:
        if hasattr(dataset, "shard"):
            shard = dataset.shard(num_shards=of, index=index)
            shard.set_epoch(number)
            return list(shard)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(number)
        return list(dataset)[index::of]

    return chain.from_iterable(one_pass(number) for number in count())


def batch_of(dataset: Any, micro: int, n_micro: int, **options: Any) -> GlobalBatch:
    return GlobalBatch(dataset, micro * n_micro, micro, collate_fn=list, **options)


kinds = st.sampled_from([Plain, Epochs, Sharded, SkipsOnly])


@given(
    kinds,
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 25),
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=4
    ),
)
@settings(max_examples=80, deadline=None)
def test_exactly_once_over_any_world_sizes_and_restarts(
    kind: type[Plain], micro: int, n_micro: int, extra: int, segments: list[Segment]
) -> None:
    segments = [(min(world, n_micro), steps, lost) for world, steps, lost in segments]
    length = n_micro + extra

    def make(rank: int, world_size: int) -> GlobalBatch:
        return batch_of(kind(length), micro, n_micro, rank=rank, world_size=world_size)

    found = committed_steps(make, segments)
    streams = [expected_stream(kind(length), i, n_micro) for i in range(n_micro)]
    assert found == [[x for s in streams for x in islice(s, micro)] for _ in found]


def test_a_pass_is_read_exactly_once() -> None:
    data = batch_of(Epochs(24), 2, 3)
    samples = [s for batch in islice(data, 4) for s in batch]
    assert Counter(samples) == Counter((0, i) for i in range(24))


@given(kinds, st.lists(st.integers(0, 40), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_load_is_a_pure_function(kind: type[Plain], steps: list[int]) -> None:
    data = batch_of(kind(11), 2, 3)
    wanted = [list(islice(expected_stream(kind(11), i, 3), 82)) for i in range(3)]
    for step in steps:
        i = step % 3
        assert data.load(step, i) == wanted[i][2 * step : 2 * step + 2]


def test_skipping_reads_little() -> None:
    class Counted(SkipsOnly):
        read = 0

        def skip(self, n: int) -> "Counted":
            other = Counted(self.length)
            other.skipped = self.skipped + n
            return other

        def __iter__(self) -> Iterator[Any]:
            for element in super().__iter__():
                Counted.read += 1
                yield element

    data = batch_of(Counted(10_000), 2, 2)
    data.load(2000, 1)
    assert Counted.read < 20


def test_a_dataset_that_draws_random_numbers_resumes_exactly() -> None:
    class Shuffled(Plain):
        """A shuffle buffer on the global generator, as in many a pipeline."""

        def __iter__(self) -> Iterator[int]:
            held: list[int] = []
            for element in range(self.length):
                held.append(element)
                if len(held) > 5:
                    yield held.pop(random.randrange(len(held)))
            yield from held

    whole = list(islice(batch_of(Shuffled(20), 2, 1), 25))
    resumed = batch_of(Shuffled(20), 2, 1)
    resumed.step = 13
    assert list(islice(resumed, 12)) == whole[13:]


def test_an_empty_pass_is_an_error_and_not_an_endless_loop() -> None:
    data = batch_of(Plain(2), 1, 3)
    assert data.load(5, 1) == [1]
    with pytest.raises(ConfigError, match=r"logical worker 2 of 3 .* pass 0.* yields 2 elements"):
        data.load(0, 2)
    with pytest.raises(ConfigError, match=r"shard\(num_shards=3, index=0\) is empty"):
        batch_of(Sharded(1), 1, 3).load(7, 0)

    class Dries(Plain):
        left = 2

        def __iter__(self) -> Iterator[int]:
            self.left -= 1
            return iter(range(4 if self.left else 0))

    dries = batch_of(Dries(0), 2, 2)
    next(iter(dries.micro_batches(0)))
    with pytest.raises(ConfigError, match="pass"):
        list(islice(dries, 3))


def test_reading_again_after_an_error_loses_nothing() -> None:
    class Flaky(Plain):
        failed = False

        def __iter__(self) -> Iterator[int]:
            for i in super().__iter__():
                if i == 5 and not self.failed:
                    self.failed = True
                    raise OSError("read error")
                yield i

    data = batch_of(Flaky(12), 2, 1)
    loop = iter(data)
    found = [next(loop), next(loop)]
    with pytest.raises(OSError, match="read error"):
        next(loop)
    assert data.step == 2
    assert found + list(islice(data, 4)) == [[2 * i, 2 * i + 1] for i in range(6)]


def test_what_an_iterable_does_not_have() -> None:
    data = batch_of(Plain(10), 2, 2, steps=3)
    assert data.steps_per_epoch is None
    assert len(data) == len(list(data)) == 3
    with pytest.raises(NotSupportedError, match="no indices"):
        data.indices(0, 0)
    with pytest.raises(ConfigError, match="epochs= needs"):
        batch_of(Plain(10), 2, 2, epochs=1)


def test_a_torch_iterable_with_a_length_is_still_iterable() -> None:
    class Sized(Epochs):
        def __len__(self) -> int:
            return self.length

    assert batch_of(Sized(8), 2, 2).load(0, 1) == [(0, 1), (0, 3)]
