"""The faster way of reading is found, and found again when it changes; both give the same bytes."""

import os
from itertools import pairwise
from pathlib import Path

import pytest

from planaria.checkpoint.capture.aligned import aligned_bytes
from planaria.checkpoint.storage import direct_reads
from planaria.checkpoint.storage.read_choice import (
    LEAST_NBYTES,
    TRIAL_NBYTES,
    TRY_AGAIN_AFTER,
    TRY_AGAIN_AT_LAST,
    ReadChoice,
)

NBYTES = 4 << 20
TRIAL = TRIAL_NBYTES // NBYTES


def reads(choice: ReadChoice, count: int, direct_s: float, plain_s: float) -> int:
    """Reads so often at these costs; how many of them were direct ones."""
    direct = 0
    for _ in range(count):
        way = choice.next(NBYTES)
        choice.took(way, NBYTES, direct_s if way else plain_s)
        direct += way
    return direct


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("slower", [1.3, 5.0])
def test_the_faster_way_is_taken_from_the_third_trial_on(first: bool, slower: float) -> None:
    for direct_is_faster in (True, False):
        choice = ReadChoice(direct=first)
        costs = (1.0, slower) if direct_is_faster else (slower, 1.0)
        reads(choice, 2 * TRIAL, *costs)
        assert choice.direct == direct_is_faster
        # Later trials of the slower way cost next to nothing.
        direct = reads(choice, 4000, *costs)
        slow = 4000 - direct if direct_is_faster else direct
        assert 0 < slow <= 4000 * TRIAL_NBYTES / TRY_AGAIN_AFTER


def test_a_change_is_noticed() -> None:
    choice = ReadChoice()
    reads(choice, 1000, 1.0, 2.0)
    assert choice.direct
    reads(choice, 2 * TRY_AGAIN_AFTER // NBYTES + 8 * TRIAL, 4.0, 1.0)
    assert not choice.direct


def test_trials_grow_rare_while_they_find_nothing_new_and_come_again() -> None:
    choice = ReadChoice()
    at, reads_done = list[int](), 0
    while reads_done < 6 * TRY_AGAIN_AT_LAST // NBYTES:
        way = choice.next(NBYTES)
        if not way and (not at or reads_done - at[-1] > TRIAL):
            at.append(reads_done)
        choice.took(way, NBYTES, 1.0 if way else 2.0)
        reads_done += 1
    gaps = [b - a for a, b in pairwise(at)]
    assert gaps == sorted(gaps)
    assert gaps[0] <= TRY_AGAIN_AFTER // NBYTES + 2 * TRIAL
    assert gaps[-1] == gaps[-2], "there is a longest pause"


def test_what_is_alike_does_not_change_all_the_time() -> None:
    choice = ReadChoice()
    for i in range(1000):
        reads(choice, 1, 1.0 + (i % 2) / 50, 1.0 + (i % 3) / 50)
        assert choice.direct


def test_small_reads_tell_nothing() -> None:
    choice = ReadChoice()
    for _ in range(100):
        assert choice.next(LEAST_NBYTES - 1)
        choice.took(True, LEAST_NBYTES - 1, 100.0)
    reads(choice, 2 * TRIAL, 1.0, 2.0)
    assert choice.direct


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(("start", "nbytes"), [(0, NBYTES), (4096, NBYTES + 5), (1, 9000)])
def test_both_ways_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool, start: int, nbytes: int
) -> None:
    data = os.urandom(NBYTES + 10_000)
    file = tmp_path / "file"
    file.write_bytes(data)
    monkeypatch.setattr(direct_reads, "choice_for", lambda device: ReadChoice(direct=direct))
    monkeypatch.setattr(direct_reads, "_cached", lambda *_: 0)
    buffer = aligned_bytes(nbytes).numpy().data
    count = direct_reads.read_into(str(file), start, buffer, direct=True)
    assert count == min(nbytes, len(data) - start)
    assert bytes(buffer[:count]) == data[start : start + count]
