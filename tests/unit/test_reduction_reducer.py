"""Gradients of a model: the same bits for any number of ranks, which are threads here."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from local_ranks import on_threads
from reductions import MICRO_BATCHES, Net, gradients, one_step, tokens_of

from planaria.core.deadline import Deadline
from planaria.elastic.reduction.assignment import assign
from planaria.elastic.reduction.buckets import Segment, make_buckets
from planaria.elastic.reduction.reducer import GradientReducer
from planaria.elastic.reduction.transport import Alone
from planaria.elastic.rng import compute_seed, micro_batch_rng
from planaria.errors import ConfigError, NotSupportedError


def by_hand(step: int) -> dict[str, torch.Tensor]:
    """The gradients as plain torch gives them, in float64."""
    model = Net(torch.float64)
    for index in range(MICRO_BATCHES):
        with micro_batch_rng(5, step, index):
            (model(tokens_of(step, index), rare=index == 4) / MICRO_BATCHES).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_one_rank_computes_the_mean_gradient() -> None:
    model = Net(torch.float64)
    parameters = dict(model.named_parameters())
    reducer = GradientReducer(
        parameters, MICRO_BATCHES, assign(MICRO_BATCHES, 1), Alone(), columns=1, bucket_bytes=300
    )
    assert reducer.order == list(range(MICRO_BATCHES))
    assert reducer.slots <= 3
    for step in range(2):
        reduced = one_step(reducer, model, step)
        reduced.assign(parameters)
        plain = by_hand(step)
        assert set(plain) == reduced.touched
        for name, parameter in parameters.items():
            if name in plain:
                assert parameter.grad is not None
                torch.testing.assert_close(parameter.grad, plain[name])
            else:
                assert parameter.grad is None, name
        assert reduced.weight == MICRO_BATCHES
        assert len(reduced.values) == MICRO_BATCHES
    reducer.close()
    # Its hooks are off: gradients are torch's again.
    model(tokens_of(0, 0), rare=False).backward()
    assert model.hidden.weight.grad is not None


@pytest.mark.parametrize("group", [1, 2])
def test_memory_is_used_again_and_what_was_in_it_does_not_count(group: int) -> None:
    model, before = Net(), None
    leaves = -(-MICRO_BATCHES // group)
    found: list[list[torch.Tensor]] = []
    used: list[set[int]] = []
    for _ in range(2):
        reducer = GradientReducer(
            dict(model.named_parameters()), MICRO_BATCHES, assign(leaves, 1), Alone(),
            group=group, columns=1, bucket_bytes=300, before=before,
        )  # fmt: skip
        slots = [slot for bucket in reducer._buckets for slot in bucket._slots]
        for memory in (*slots, *(bucket.result for bucket in reducer._buckets)):
            memory.fill_(torch.nan)
        used.append({slot.data_ptr() for slot in slots})
        found.append([t.clone() for t in one_step(reducer, model, 0).segments.values()])
        reducer.close()
        before = reducer
    assert used[0] == used[1]
    assert all(map(torch.equal, *found))
    assert all(t.isfinite().all() for t in found[0])


def test_gradients_outside_of_micro_batches_are_left_alone() -> None:
    model = Net()
    reducer = GradientReducer(dict(model.named_parameters()), 2, assign(2, 1), Alone())
    model(tokens_of(0, 0), rare=False).backward()
    assert model.hidden.weight.grad is not None
    reducer.close()


def test_a_gradient_that_is_there_is_not_counted() -> None:
    model, reducer = setup()
    found = []
    for _ in range(2):
        reducer.begin(Deadline(60))
        for index in range(2):
            with reducer.micro_batch(index), micro_batch_rng(0, 0, index):
                model(tokens_of(0, index), rare=False).backward()
        reduced = reducer.finish()
        found.append([t.clone() for t in reduced.segments.values()])
        reduced.assign(dict(model.named_parameters()))
    reducer.close()
    assert all(map(torch.equal, *found))


@contextmanager
def no_rng(seed: int, step: int, index: int) -> Iterator[None]:
    """Threads share the global generators: tests with threads do without dropout's."""
    yield


@pytest.fixture
def _no_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p: x)


@pytest.mark.usefixtures("_no_dropout")
@pytest.mark.parametrize(
    ("dtype", "group"),
    [(torch.float32, 1), (torch.float32, 3), (torch.bfloat16, 2), (torch.float16, 1)],
)
def test_all_worlds_give_the_same_gradients(dtype: torch.dtype, group: int) -> None:
    leaves = -(-MICRO_BATCHES // group)
    alone = gradients(Alone(), dtype=dtype, group=group, rng=no_rng)
    for world in (w for w in (2, 3, 4, 7) if w <= leaves):
        found = on_threads(world, lambda t: gradients(t, dtype=dtype, group=group, rng=no_rng))
        assert found == [alone] * world


def owned(world: int) -> list[Segment]:
    """Segments of uneven sizes, with owners in no order."""
    segments = []
    for i, (name, p) in enumerate(Net().named_parameters()):
        cut = p.numel() // 3
        if p.requires_grad:
            segments += [
                Segment(name, 0, cut, i % world),
                Segment(name, cut, p.numel(), -i % world),
            ]
    return segments


@pytest.mark.usefixtures("_no_dropout")
@pytest.mark.parametrize("world", [1, 3, 5])
def test_owners_get_their_segments_only(world: int) -> None:
    segments = owned(world)
    alone = gradients(Alone(), owned=[Segment(s.name, s.start, s.stop, 0) for s in segments],
                      rng=no_rng)  # fmt: skip
    found = on_threads(world, lambda t: gradients(t, owned=segments, rng=no_rng))
    for rank, steps in enumerate(found):
        mine = {(s.name, s.start) for s in segments if s.owner == rank}
        for (values, *rest), (all_values, *same) in zip(steps, alone, strict=True):
            assert values == {key: all_values[key] for key in mine}
            assert rest == same


@pytest.mark.usefixtures("_no_dropout")
def test_weights_are_those_of_the_micro_batches() -> None:
    def weight(index: int) -> float:
        return float(3 + index % 3)

    alone = gradients(Alone(), weights=weight, rng=no_rng)
    assert alone[0][1] == sum(map(weight, range(MICRO_BATCHES)))
    for world in (2, 5):
        assert on_threads(world, lambda t: gradients(t, weights=weight, rng=no_rng)) == (
            [alone] * world
        )


@pytest.mark.usefixtures("_no_dropout")
@pytest.mark.parametrize("segments", [False, True])
def test_the_fast_way_agrees_up_to_rounding(segments: bool) -> None:
    world = 3
    alone = gradients(Alone(), rng=no_rng, owned=owned(1) if segments else None)
    found = on_threads(
        world,
        lambda t: gradients(
            t, rng=no_rng, consistency="fast", owned=owned(world) if segments else None
        ),
    )
    for steps in found:
        for (values, *_), (exact, *_) in zip(steps, alone, strict=True):
            for key, value in values.items():
                torch.testing.assert_close(
                    torch.frombuffer(bytearray(value), dtype=torch.float32),
                    torch.frombuffer(bytearray(exact[key]), dtype=torch.float32),
                )


def setup(transport: Any = None, **options: Any) -> tuple[Net, GradientReducer]:
    model = Net()
    return model, GradientReducer(
        dict(model.named_parameters()), 2, assign(2, 1), transport or Alone(), **options
    )


@pytest.mark.usefixtures("_no_dropout")
def test_misuse_is_refused() -> None:
    model, reducer = setup()
    with pytest.raises(ConfigError, match=r"begin\(\) comes first"), reducer.micro_batch(0):
        pass
    reducer.begin(Deadline(60))
    with pytest.raises(ConfigError, match="0 is next"), reducer.micro_batch(1):
        pass
    with pytest.raises(ConfigError, match="after all micro-batches"):
        reducer.finish()
    with pytest.raises(ConfigError, match="second gradient"):
        _backward_twice(model, reducer)
    with pytest.raises(ConfigError, match="no more micro-batches"), reducer.micro_batch(0):
        pass
    # A step that nobody has heard of can begin again.
    reducer.begin(Deadline(60))
    for index in range(2):
        with reducer.micro_batch(index):
            model(tokens_of(0, index), rare=False).backward()
        with pytest.raises(ConfigError, match="1 values, where 0"):
            reducer.record([1.0])
    first = {s: t.clone() for s, t in reducer.finish().segments.items()}
    reducer.begin(Deadline(60))
    for index in range(2):
        with reducer.micro_batch(index):
            model(tokens_of(0, index), rare=False).backward()
    assert all(torch.equal(first[s], t) for s, t in reducer.finish().segments.items())
    reducer.close()
    for wrong, match in (
        ({"group": 2}, "do not make the 2 leaves"),
        ({"consistency": "slow"}, "choose 'bitwise' or 'fast'"),
        ({"segments": [Segment("hidden.weight", 0, 64, 0)]}, "in no segment"),
    ):
        with pytest.raises(ConfigError, match=match):
            setup(**wrong)


def test_buckets_are_sent_while_backward_runs() -> None:
    """When the last gradient reaches the first layer, those of the others are on their way."""
    model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)])
    reducer = GradientReducer(
        dict(model.named_parameters()), 2, assign(2, 1), Alone(), bucket_bytes=80
    )
    sent: list[list[bool]] = []

    def look(*_: Any) -> None:
        sent.append([bucket.sent for bucket in reducer._buckets])

    reducer.begin(Deadline(60))
    for index in range(2):
        with reducer.micro_batch(index):
            hidden = model[0](torch.ones(4))
            hidden.register_hook(look)
            model[1:](hidden).sum().backward()
    assert sent == [[False] * 4, [True, True, True, False]]
    reducer.finish()
    reducer.close()


def test_no_weight_is_no_mean() -> None:
    model, reducer = setup()
    reducer.begin(Deadline(60))
    for index in range(2):
        with reducer.micro_batch(index, 0.0):
            pass
    with pytest.raises(ConfigError, match="weights of all micro-batches are 0"):
        reducer.finish()
    reducer.close()
    del model


def test_any_memory_format_is_summed() -> None:
    """Convolutions in channels-last order, whose gradients are not contiguous."""
    model = torch.nn.Conv2d(3, 4, 3).double()
    model.weight.data = model.weight.data.contiguous(memory_format=torch.channels_last)
    parameters = dict(model.named_parameters())
    image = torch.randn(2, 3, 5, 5).double()
    model(image).sum().backward()
    plain = {name: p.grad for name, p in parameters.items()}
    reducer = GradientReducer(parameters, 1, assign(1, 1), Alone(), bucket_bytes=100)
    reducer.begin(Deadline(60))
    with reducer.micro_batch(0):
        model(image).sum().backward()
    reducer.finish().assign(parameters)
    reducer.close()
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, plain[name])


def _backward_twice(model: Net, reducer: GradientReducer) -> None:
    with reducer.micro_batch(0):
        for _ in range(2):
            model(tokens_of(0, 0), rare=False).backward()


def test_what_cannot_be_summed_is_refused() -> None:
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    reducer = GradientReducer(dict(embedding.named_parameters()), 1, assign(1, 1), Alone())
    reducer.begin(Deadline(60))
    with pytest.raises(NotSupportedError, match="sparse"), reducer.micro_batch(0):
        embedding(torch.tensor([1])).sum().backward()
    reducer.close()
    for tensor in (torch.zeros(2, dtype=torch.complex64), torch.zeros(2, device="meta")):
        parameter = torch.nn.Parameter(tensor)
        with pytest.raises(NotSupportedError):
            GradientReducer({"p": parameter}, 1, assign(1, 1), Alone())


def test_buckets_begin_with_the_last_parameters() -> None:
    parameters = {f"p{i}": torch.zeros(10) for i in range(5)}
    segments = [Segment(name, 0, 10) for name in parameters]
    buckets = make_buckets(parameters, segments, 3, bucket_bytes=80)
    assert [sorted(b.names) for b in buckets] == [["p3", "p4"], ["p1", "p2"], ["p0"]]
    assert [b.bounds for b in buckets] == [[0, 6, 13, 20], [0, 6, 13, 20], [0, 3, 6, 10]]
    # One that is larger is cut.
    big = make_buckets({"p": torch.zeros(100)}, [Segment("p", 0, 100)], 1, bucket_bytes=80)
    assert [b.numel for b in big] == [20] * 5


def test_rng_is_a_function_of_step_and_micro_batch() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    drawn: dict[tuple[int, int, int], Any] = {}
    for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (-1, 2**40, 3)):
        with micro_batch_rng(*key):
            drawn[key] = draw()
        draw()
        with micro_batch_rng(*key):
            assert draw() == drawn[key]
    assert len(set(drawn.values())) == len(drawn)
    assert 0 <= compute_seed(-5, 0, 0) < 2**64


def test_rng_is_given_back() -> None:
    def states() -> list[Any]:
        numpys = np.random.get_state(legacy=False)
        return [random.getstate(), str(numpys), torch.get_rng_state().tolist()]

    def fails() -> None:
        with micro_batch_rng(1, 2, 3):
            torch.rand(3)
            np.random.rand(3)
            random.random()
            raise KeyError

    before = states()
    with pytest.raises(KeyError):
        fails()
    assert states() == before
