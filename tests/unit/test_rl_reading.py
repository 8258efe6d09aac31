"""Payloads are read ahead by one batch, and no further."""

import threading
from typing import Any

import pytest

from planaria.errors import WireError
from planaria.rl_sync.versions import staging


def batches(count: int) -> list[Any]:
    return [staging._Batch([n], [[n]], []) for n in range(count)]


def reading(monkeypatch: pytest.MonkeyPatch, failing: int | None = None) -> list[threading.Event]:
    """Stands in for reads; returns an event for each batch that is set once it is asked for."""
    asked = [threading.Event() for _ in range(4)]

    def read(step: Any, numbers: list[int]) -> dict[int, bytes]:
        asked[numbers[0]].set()
        if numbers[0] == failing:
            raise WireError("the connection was lost")
        return {n: bytes([n]) for n in numbers}

    monkeypatch.setattr(staging, "_read", read)
    return asked


def test_the_next_batch_is_read_while_one_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = reading(monkeypatch)
    steps: list[Any] = [object()]
    seen = []
    for batch, payloads in staging._read_ahead(steps, batches(4)):
        number = batch.blocks[0]
        seen.append(number)
        assert payloads == [{number: bytes([number])}]
        assert number == 3 or asked[number + 1].wait(60)
        assert not any(event.is_set() for event in asked[number + 2 :])
    assert seen == [0, 1, 2, 3]


def test_a_read_that_fails_fails_the_batch_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    reading(monkeypatch, failing=2)
    steps: list[Any] = [object()]
    ahead = staging._read_ahead(steps, batches(4))
    assert [next(ahead)[0].blocks, next(ahead)[0].blocks] == [[0], [1]]
    with pytest.raises(WireError, match="lost"):
        next(ahead)


def test_no_thread_is_left_where_decoding_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    reading(monkeypatch)
    steps: list[Any] = [object()]
    ahead = staging._read_ahead(steps, batches(4))
    next(ahead)
    ahead.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("planaria-rl-read")]


def test_there_may_be_nothing_to_read() -> None:
    assert list(staging._read_ahead([], [])) == []
