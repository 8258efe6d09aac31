from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planaria.core.box import (
    Box,
    BoxIndex,
    Layout,
    plan_transfers,
    row_major_blocks,
)
from planaria.errors import ConfigError

SIDE = 6


def box_in(shape: tuple[int, ...], least: int = 0) -> st.SearchStrategy[Box]:
    def one(size: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.integers(0, max(size - least, 0)).flatmap(
            lambda o: st.tuples(st.just(o), st.integers(min(least, size), size - o))
        )

    return st.tuples(*map(one, shape)).map(
        lambda dims: Box(tuple(o for o, _ in dims), tuple(e for _, e in dims))
    )


shapes = st.lists(st.integers(0, SIDE), max_size=3).map(tuple)


@st.composite
def boxes_of_one_shape(draw: st.DrawFn, least: int = 0, most: int = 12):
    shape = draw(shapes)
    return shape, draw(st.lists(box_in(shape), min_size=least, max_size=most))


def cells(box: Box) -> set[tuple[int, ...]]:
    return set(product(*(range(o, o + e) for o, e in zip(box.offset, box.extent, strict=True))))


def check_exact(parts: list[Box], expected: set[tuple[int, ...]]) -> None:
    """The parts are disjoint and make up exactly these cells."""
    found = [cell for part in parts for cell in cells(part)]
    assert len(found) == len(set(found)), "an element twice"
    assert set(found) == expected


@given(boxes_of_one_shape(least=2, most=2))
def test_intersect_subtract_contain(case):
    _, (a, b) = case
    common = a.intersect(b)
    assert (cells(common) if common else set()) == cells(a) & cells(b)
    assert common is None or common.volume > 0
    assert a.intersect(b) == b.intersect(a)
    assert a.contains(b) == (cells(b) <= cells(a))
    rest = a.subtract(b)
    assert len(rest) <= max(1, 2 * len(a.offset))
    check_exact(rest, cells(a) - cells(b))


@given(boxes_of_one_shape(least=1, most=1))
def test_slices_volume_and_shifts(case):
    shape, (box,) = case
    grid = np.arange(prod(shape)).reshape(shape)
    assert grid[box.slices()].size == box.volume == len(cells(box))
    assert box.shifted((3,) * len(shape)).relative_to(Box((3,) * len(shape), shape)) == box
    assert Box.full(shape).contains(box)


@given(boxes_of_one_shape(least=1, most=1), st.integers(0, 9))
def test_split_rows_cuts_into_like_slabs(case, parts):
    _, (box,) = case
    slabs = box.split_rows(parts)
    if box.volume:
        check_exact(slabs, cells(box))
        assert len(slabs) <= max(parts, 1)
        rows = [s.extent[0] for s in slabs if s.extent]
        assert not rows or max(rows) - min(rows) <= 1
        assert all(slab.volume for slab in slabs)
    else:
        assert slabs == [box]


@given(shapes, st.data())
def test_row_major_blocks_are_the_range_in_order(extent, data):
    total = prod(extent)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    grid = np.arange(total).reshape(extent)
    blocks = list(row_major_blocks(extent, start, stop))
    found = [int(v) for block in blocks for v in grid[block.slices()].reshape(-1)]
    assert found == list(range(start, stop))
    assert len(blocks) <= max(1, 2 * len(extent) - 1)
    assert all(block.volume for block in blocks)


@given(boxes_of_one_shape(), st.data())
def test_index_finds_what_brute_force_finds(case, data):
    shape, boxes = case
    wanted = data.draw(box_in(shape))
    found = dict(BoxIndex(boxes).overlapping(wanted))
    expected = {i: b.intersect(wanted) for i, b in enumerate(boxes) if b.intersect(wanted)}
    assert found == expected


@given(boxes_of_one_shape(), st.data())
def test_cover_takes_each_element_once_and_names_the_holes(case, data):
    shape, boxes = case
    wanted = data.draw(box_in(shape))
    parts, missing = BoxIndex(boxes).cover(wanted)
    held = set().union(*(cells(b) for b in boxes)) & cells(wanted)
    check_exact([p for _, p in parts], held)
    check_exact(missing, cells(wanted) - held)
    assert all(boxes[i].contains(part) for i, part in parts)


class Counting(Box):
    """Counts the comparisons that a search makes."""

    __slots__ = ()
    count = 0

    def intersect(self, other: Box) -> Box | None:
        Counting.count += 1
        return super().intersect(other)


@pytest.mark.parametrize("dim", [0, 1])
def test_index_looks_only_at_neighbours(dim):
    """Whole planning stays near-linear: a search does not compare with far-away shards."""
    shards, size = 20_000, 3
    shape = [4, 4]
    shape[dim] = shards * size

    def shard(i: int) -> Box:
        offset, extent = [0, 0], [4, 4]
        offset[dim], extent[dim] = i * size, size
        return Counting(tuple(offset), tuple(extent))

    index = BoxIndex([shard(i) for i in range(shards)])
    Counting.count = 0
    for i in range(0, shards, 100):
        assert len(list(index.overlapping(shard(i)))) == 1
    assert Counting.count <= 3 * (shards // 100)


def test_box_refuses_nonsense():
    with pytest.raises(ConfigError, match="differ in length"):
        Box((0,), (1, 1))
    with pytest.raises(ConfigError, match=">= 0"):
        Box((0, 0), (1, -1))
    with pytest.raises(ConfigError, match="rank 3 holds"):
        Layout((4,), ((3, Box((2,), (3,))),))


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], whole: bool):
    """Random holders; every element held by somebody if `whole`."""
    holders = draw(st.lists(st.tuples(st.integers(0, 4), box_in(shape)), max_size=8))
    if whole:
        held = BoxIndex([b for _, b in holders]).cover(Box.full(shape))[1]
        holders += [(draw(st.integers(0, 4)), hole) for hole in held]
    return Layout(shape, tuple(holders))


@given(shapes, st.data())
def test_missing_is_what_nobody_holds(shape, data):
    layout = data.draw(layouts(shape, whole=False))
    held = set().union(*(cells(b) for _, b in layout.holders))
    check_exact(layout.missing(), cells(Box.full(shape)) - held)
    for box, ranks in layout.replicas().items():
        assert ranks == [r for r, b in layout.holders if b == box]


@given(shapes, st.data())
def test_transfers_bring_each_element_once_from_a_holder(shape, data):
    source = data.draw(layouts(shape, whole=True))
    target = Layout(
        shape,
        # One box a rank, so that what arrives at a rank is what its box needs.
        tuple((rank, data.draw(box_in(shape))) for rank in range(data.draw(st.integers(0, 4)))),
    )
    transfers = plan_transfers(source, target)
    for t in transfers:
        assert any(r == t.source and b.contains(t.box) for r, b in source.holders)
    for rank, box in target.holders:
        check_exact([t.box for t in transfers if t.target == rank], cells(box))
        mine = set().union(*(cells(b) for r, b in source.holders if r == rank))
        kept = set().union(*(cells(t.box) for t in transfers if t.target == t.source == rank))
        assert kept == mine & cells(box), "what a rank has already is not sent to it"


@settings(max_examples=30)
@given(st.integers(2, 8), st.integers(1, 40))
def test_replicas_share_the_sending(replicas, rows):
    whole = Box.full((rows * replicas, 2))
    source = Layout(whole.extent, tuple((rank, whole) for rank in range(replicas)))
    targets = whole.split_rows(rows * replicas)
    target = Layout(whole.extent, tuple((100 + i, box) for i, box in enumerate(targets)))
    sent = dict.fromkeys(range(replicas), 0)
    for t in plan_transfers(source, target):
        sent[t.source] += t.box.volume
    assert max(sent.values()) - min(sent.values()) <= 2


def test_transfers_name_what_nobody_holds():
    source = Layout((4, 4), ((0, Box((0, 0), (2, 4))),))
    with pytest.raises(ConfigError, match=r"no rank holds .*offset=\(2, 0\)"):
        plan_transfers(source, Layout((4, 4), ((0, Box.full((4, 4))),)))
    with pytest.raises(ConfigError, match="cannot move"):
        plan_transfers(source, Layout((4, 5), ()))
