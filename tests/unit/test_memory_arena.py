"""The memory that snapshots are cut from."""

import gc
import itertools
import mmap
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planaria.checkpoint.memory.arena import HUGE_PAGE, Arena, Mapping
from planaria.checkpoint.memory.memory import Span
from planaria.errors import ConfigError, MemoryBudgetError

PAGE = 4096


def test_what_is_written_by_one_is_seen_by_the_other() -> None:
    arena = Arena(10 * PAGE)
    other = Mapping(os.dup(arena.fd))
    span = arena.allocate(PAGE + 1)
    assert span.nbytes == PAGE + 1
    other.view(span)[:] = 7
    assert np.all(arena.view(span) == 7)
    assert arena.view(span).size == PAGE + 1
    other.close()
    arena.close()


def test_the_budget_holds_and_the_error_says_what_to_do() -> None:
    arena = Arena(3 * PAGE)
    spans = [arena.allocate(PAGE) for _ in range(3)]
    with pytest.raises(MemoryBudgetError, match="larger budget"):
        arena.allocate(1)
    arena.free(spans[1])
    assert arena.allocate(1).offset == spans[1].offset
    arena.close()


def test_a_span_goes_back_once() -> None:
    arena = Arena(PAGE)
    span = arena.allocate(PAGE)
    arena.free(span)
    with pytest.raises(ConfigError, match="twice"):
        arena.free(span)
    arena.close()


def test_nobody_can_cut_the_memory_under_a_rank() -> None:
    """Who mapped it would be killed by the next look at what is gone."""
    arena = Arena(2 * PAGE)
    for nbytes in (PAGE, 4 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, nbytes)
    arena.close()


def test_it_takes_memory_only_where_it_was_written() -> None:
    arena = Arena(1 << 36)
    assert os.fstat(arena.fd).st_blocks == 0
    arena.view(arena.allocate(PAGE))[:] = 1
    assert 0 < os.fstat(arena.fd).st_blocks * 512 <= 4 << 20  # a huge page at most
    arena.close()


def test_a_view_outside_is_refused() -> None:
    arena = Arena(PAGE)
    for span in (Span(0, PAGE + 1), Span(-PAGE, PAGE), Span(PAGE, 1)):
        with pytest.raises(ConfigError, match="does not lie"):
            arena.view(span)
    arena.close()


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5 * PAGE)), max_size=40))
def test_spans_never_overlap_and_nothing_is_lost(steps: list[tuple[bool, int]]) -> None:
    arena = Arena(16 * PAGE)
    out: list[Span] = []
    for gives_back, nbytes in steps:
        if gives_back and out:
            arena.free(out.pop(nbytes % len(out)))
            continue
        try:
            out.append(arena.allocate(nbytes))
        except MemoryBudgetError:
            continue
        assert out[-1].offset % mmap.PAGESIZE == 0
        places = sorted((s.offset, s.offset + s.nbytes) for s in out)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(places))
        assert places[-1][1] <= arena.nbytes
    for span in out:
        arena.free(span)
    assert arena.used == 0
    assert arena.allocate(16 * PAGE).offset == 0  # all of it is in one piece again
    arena.close()


def test_it_is_mapped_where_huge_pages_fit_and_is_unmapped_with_its_last_view() -> None:
    arena = Arena(HUGE_PAGE + PAGE)
    address = arena.view(Span(0, PAGE)).ctypes.data
    assert address % HUGE_PAGE == 0
    other = Mapping(os.dup(arena.fd))
    assert other.view(Span(0, PAGE)).ctypes.data % HUGE_PAGE == 0
    view = arena.view(Span(0, PAGE))
    arena.close()
    del arena
    view[:] = 3  # it lives as long as somebody looks at it
    assert np.all(other.view(Span(0, PAGE)) == 3)
    other.close()
    del view, other
    gc.collect()
    with open("/proc/self/maps") as file:
        starts = [int(line.partition("-")[0], 16) for line in file if "memfd:planaria" in line]
    assert address not in starts


def test_memory_that_comes_into_being_keeps_what_was_written() -> None:
    """Whether as huge pages, or as small ones where the system has none."""
    for older in (False, True):
        arena = Arena(3 * HUGE_PAGE + PAGE)
        arena._collapses = not older
        view = arena.view(Span(0, arena.nbytes))
        view[:: PAGE + 1] = 5
        expected = view.copy()
        assert arena.populate(0, arena.nbytes)
        assert os.fstat(arena.fd).st_blocks * 512 == arena.nbytes
        assert np.array_equal(view, expected)
        arena.close()
