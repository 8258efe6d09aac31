"""GlobalBatch over map-style datasets."""

import json
import random
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from data_runs import Segment, check_exactly_once
from hypothesis import given, settings
from hypothesis import strategies as st

from planaria.data import GlobalBatch, micro_batch_seed
from planaria.errors import ConfigError, MismatchError


def sized(length: int, batch: int, micro: int, **options: Any) -> GlobalBatch:
    return GlobalBatch(range(length), batch, micro, collate_fn=list, **options)


def no_rank_idles(length: int, micro: int, count: int, world_size: int) -> bool:
    data = sized(length, micro * count, micro, drop_last=False)
    last = (data.steps_per_epoch or 0) - 1
    shares = [data.assign(rank, world_size) for rank in range(world_size)]
    return all(any(data.indices(last, i) for i in share) for share in shares)


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, int, int, bool, bool, list[Segment]]:
    micro = draw(st.integers(1, 4))
    count = draw(st.integers(1, 6))
    drop_last, shuffle = draw(st.booleans()), draw(st.booleans())
    length = draw(st.integers(micro * count, 70))
    worlds = [w for w in range(1, count + 1) if drop_last or no_rank_idles(length, micro, count, w)]
    segment = st.tuples(st.sampled_from(worlds), st.integers(0, 8), st.integers(0, 3))
    segments = draw(st.lists(segment, min_size=1, max_size=4))
    return length, micro * count, micro, drop_last, shuffle, segments


@given(runs(), st.integers(-5, 2**65))
@settings(max_examples=60, deadline=None)
def test_exactly_once_over_any_world_sizes_and_restarts(
    run: tuple[int, int, int, bool, bool, list[Segment]], seed: int
) -> None:
    length, batch, micro, drop_last, shuffle, segments = run

    def make(rank: int, world_size: int) -> GlobalBatch:
        return sized(
            length, batch, micro, seed=seed, drop_last=drop_last, shuffle=shuffle,
            rank=rank, world_size=world_size,
        )  # fmt: skip

    check_exactly_once(make, segments, length)


class KeyedByRank(GlobalBatch):
    """Broken on purpose: each rank permutes with a seed of its own."""

    def __init__(self, *args: Any, seed: int = 0, rank: int, **options: Any) -> None:
        super().__init__(*args, seed=seed + rank, rank=rank, **options)

    def _fingerprint(self) -> dict[str, Any]:
        return {**super()._fingerprint(), "seed": 0}


class AdvancedLate(GlobalBatch):
    """Broken on purpose: the position moves when the next batch is asked for."""

    def _shares(self, share: tuple[int, ...]) -> Generator[Any, None, None]:
        for batch in super()._shares(share):
            self.step -= 1
            yield batch
            self.step += 1


@pytest.mark.parametrize("broken", [KeyedByRank, AdvancedLate])
def test_the_check_notices_a_broken_order(broken: type[GlobalBatch]) -> None:
    def make(rank: int, world_size: int) -> GlobalBatch:
        return broken(range(60), 12, 2, seed=0, collate_fn=list, rank=rank, world_size=world_size)

    with pytest.raises(AssertionError, match="order of a single rank"):
        check_exactly_once(make, [(2, 3, 0), (3, 4, 1)], 60)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 300), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_indices_are_a_pure_function(micro: int, count: int, extra: int, seed: int) -> None:
    length = micro * count + extra
    one, other = (sized(length, micro * count, micro, seed=seed) for _ in range(2))
    keys = [(step, i) for step in (0, 1, 2, 1000) for i in range(count)]
    backwards = {key: other.indices(*key) for key in reversed(keys)}
    other.step = 17
    for key in keys:
        assert one.indices(*key) == backwards[key] == other.indices(*key)
        assert len(backwards[key]) == micro
    assert one.step == 0


def test_epochs_differ_and_shuffle_can_be_off() -> None:
    data = sized(40, 8, 4)
    epochs = [[data.indices(5 * e + s, i) for s in range(5) for i in range(2)] for e in range(2)]
    assert epochs[0] != epochs[1]
    plain = sized(40, 8, 4, shuffle=False)
    assert [plain.indices(s, i) for s in (0, 5) for i in (0, 1)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3], [4, 5, 6, 7],
    ]  # fmt: skip


@given(st.integers(1, 64), st.integers(1, 64))
@settings(deadline=None)
def test_assign_is_balanced_or_says_what_is_possible(count: int, world_size: int) -> None:
    data = sized(count, count, 1)
    assert data.n_micro_batches == count
    if world_size > count:
        with pytest.raises(ConfigError, match=f"1 to {count} ranks can"):
            data.assign(0, world_size)
        return
    shares = [data.assign(rank, world_size) for rank in range(world_size)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    with pytest.raises(ConfigError, match=f"rank {world_size} of {world_size}"):
        data.assign(world_size, world_size)


def test_a_short_last_step_is_spread_over_the_micro_batches() -> None:
    data = sized(21, 8, 2, drop_last=False, epochs=1)
    assert data.steps_per_epoch == len(data) == 3
    assert [len(data.indices(2, i)) for i in range(4)] == [1, 1, 1, 2]
    assert sorted(x for batch in data for x in batch) == list(range(21))

    shorter = sized(18, 8, 2, drop_last=False)
    assert [len(shorter.indices(2, i)) for i in range(4)] == [0, 1, 0, 1]
    assert [i for i, _ in shorter.micro_batches(2)] == [1, 3]
    with pytest.raises(ConfigError, match="micro-batch 2 of step 2 is empty"):
        shorter.load(2, 2)
    for rank in (0, 1):
        share = sized(18, 8, 2, drop_last=False, rank=rank, world_size=2, epochs=1)
        assert [len(batch) for batch in share] == [4, 4, 1]
        with pytest.raises(ConfigError, match="too short for 4 ranks: rank 0"):
            iter(sized(18, 8, 2, drop_last=False, rank=rank, world_size=4))


def test_the_position_is_ahead_of_the_batch_in_hand() -> None:
    data = sized(100, 10, 5, steps=4)
    assert [data.step for _ in data] == [1, 2, 3, 4]
    assert list(data) == []
    data.step = 2
    assert len(list(data)) == 2
    assert len(data) == data.total_steps == 4


def test_epochs_and_steps_bound_the_run_from_its_start() -> None:
    assert sized(100, 10, 5, epochs=3).total_steps == 30
    endless = sized(100, 10, 5)
    assert endless.total_steps is None
    assert endless
    with pytest.raises(TypeError, match="endless"):
        len(endless)
    loop = iter(endless)
    for _ in range(25):
        next(loop)
    assert endless.step == 25
    with pytest.raises(ConfigError, match="not both"):
        sized(100, 10, 5, epochs=1, steps=2)


def test_loading_a_position_moves_a_running_loop() -> None:
    data = sized(100, 10, 5)
    loop = iter(data)
    first = next(loop)
    start = data.state_dict()
    second = next(loop)
    data.load_state_dict(start)
    assert next(loop) == second
    data.step = 0
    assert next(loop) == first


def test_a_state_is_small_json_and_fits_any_world_size() -> None:
    data = sized(100, 12, 3, rank=0, world_size=2)
    for _ in zip(range(5), data, strict=False):
        pass
    text = json.dumps(data.state_dict())
    assert len(text) < 400
    other = sized(100, 12, 3, rank=2, world_size=4, num_workers=2, steps=50)
    other.load_state_dict(json.loads(text))
    assert other.step == data.step == 5


class Words:
    """An iterable of words."""

    def __iter__(self) -> Iterator[str]:
        return iter(["a", "b", "c"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"batch_size": 6}, "batch_size was 12, is 6"),
        ({"micro_batch_size": 6}, "micro_batch_size was 3, is 6"),
        ({"drop_last": False}, "drop_last was True, is False"),
        ({"shuffle": False}, "shuffle was True, is False"),
        ({"dataset": range(99)}, "length was 100, is 99"),
        ({"dataset": Words()}, "kind was 'map', is 'iterable'"),
    ],
)
def test_another_order_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    plain: dict[str, Any] = {"dataset": range(100), "batch_size": 12, "micro_batch_size": 3}
    data = GlobalBatch(**plain)
    data.step = 7
    changed = GlobalBatch(**(plain | change))
    with pytest.raises(MismatchError, match=named):
        changed.load_state_dict(data.state_dict())
    assert changed.step == 0


def test_other_content_and_another_algorithm_are_refused() -> None:
    class Text(list[int]):
        fingerprint = "sha256:1"

    data, state = GlobalBatch(Text(range(64))), GlobalBatch(Text(range(64))).state_dict()
    data.load_state_dict(state)
    Text.fingerprint = "sha256:2"
    with pytest.raises(MismatchError, match="dataset was 'sha256:1', is 'sha256:2'"):
        data.load_state_dict(state)
    state["order"] |= {"algorithm": "other/9", "dataset": "sha256:2"}
    with pytest.raises(MismatchError, match="algorithm was 'other/9'"):
        data.load_state_dict(state)


@pytest.mark.parametrize("state", [{}, {"step": -1, "order": {}}, {"step": "3", "order": {}}])
def test_what_is_no_position_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(MismatchError, match="not a position"):
        sized(10, 2, 1).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 10, "micro_batch_size": 4}, "not a multiple of micro_batch_size 4"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.5}, "give an integer"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"batch_size": 128}, "100 samples, fewer than batch_size 128"),
        ({"dataset": []}, "0 samples"),
        ({"dataset": iter([1])}, "only once"),
        ({"dataset": 5}, "no dataset"),
        ({"timeout": 0}, "timeout"),
        ({"rank": 1}, "both rank and world_size"),
        ({"rank": 0, "world_size": 9}, "1 to 8 ranks can"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GlobalBatch(**dict[str, Any]({"dataset": range(100)} | arguments))


def test_bad_keys_are_refused() -> None:
    data = sized(100, 10, 5)
    for call in (data.indices, data.load):
        with pytest.raises(ConfigError, match="0 to 1"):
            call(0, 2)
        with pytest.raises(ConfigError, match="count from 0"):
            call(-1, 0)
    with pytest.raises(ConfigError, match="both"):
        data.micro_batches(0, rank=1)


def test_the_place_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    data = sized(100, 10, 2)
    assert [i for i, _ in data.micro_batches(0)] == [0, 1, 2, 3, 4]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [i for i, _ in data.micro_batches(0)] == [3, 4]
    assert next(iter(data)) == data.indices(0, 3) + data.indices(0, 4)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE='two'"):
        iter(data)


def test_the_place_comes_from_torch_distributed_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        assert len(next(iter(sized(100, 10, 2)))) == 10
    finally:
        torch.distributed.destroy_process_group()


class Noisy:
    """Draws from all three global generators for every sample."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> tuple[int, float, float, float]:
        return i, random.random(), float(np.random.random()), float(torch.rand(()))


def all_samples(world_size: int) -> list[Any]:
    data = GlobalBatch(Noisy(), 8, 2, collate_fn=list, seed=3)
    return [
        sample
        for step in range(6)
        for rank in range(world_size)
        for _, batch in data.micro_batches(step, rank, world_size)
        for sample in batch
    ]


def test_augmentation_depends_on_the_micro_batch_alone() -> None:
    expected = all_samples(1)
    assert len(set(expected)) == len(expected)
    torch.manual_seed(5)
    random.seed(5)
    for world_size in (2, 3, 4):
        assert all_samples(world_size) == expected
    share = next(iter(GlobalBatch(Noisy(), 8, 2, collate_fn=list, seed=3)))
    assert share == expected[:8]
    random.seed(micro_batch_seed(3, 0, 0))
    assert random.random() == expected[0][1]


def test_the_trainers_random_streams_are_untouched() -> None:
    def drawn(read: bool) -> list[float]:
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        data = GlobalBatch(Noisy(), 8, 2, num_workers=0)
        loop = iter(data)
        numbers: list[float] = []
        for step in range(3):
            if read:
                next(loop)
                data.load(step, 1)
            numbers += [random.random(), float(np.random.random()), float(torch.rand(()))]
        return numbers

    assert drawn(read=True) == drawn(read=False)


def test_random_streams_are_given_back_when_reading_fails() -> None:
    class Broken(Noisy):
        def __getitem__(self, i: int) -> Any:
            super().__getitem__(i)
            raise OSError("unreadable")

    before = torch.get_rng_state(), random.getstate()
    data = GlobalBatch(Broken(), 8, 2)
    with pytest.raises(OSError, match="unreadable"):
        next(iter(data))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert data.step == 0


def test_default_collation_and_batched_reading() -> None:
    class Batched(Noisy):
        asked: list[list[int]] = []

        def __getitems__(self, indices: list[int]) -> list[Any]:
            self.asked.append(indices)
            return [{"x": torch.tensor([i])} for i in indices]

    data = GlobalBatch(Batched(), 8, 2)
    batch = data.load(1, 3)
    assert batch["x"].shape == (2, 1)
    assert Batched.asked == [data.indices(1, 3)]
