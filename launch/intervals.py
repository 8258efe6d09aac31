"""Stretches of time as sorted, disjoint pairs of seconds."""

from collections.abc import Iterable, Sequence

Interval = tuple[float, float]


def union(parts: Iterable[Interval]) -> list[Interval]:
    """What any of the parts covers."""
    merged: list[Interval] = []
    for start, end in sorted(p for p in parts if p[1] > p[0]):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def common(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """What both cover; each is sorted and disjoint."""
    found, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if end > start:
            found.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return found


def without(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """What the first covers and the second does not; each is sorted and disjoint."""
    left, j = [], 0
    for start, end in one:
        while j < len(other) and other[j][1] <= start:
            j += 1
        k = j
        while k < len(other) and other[k][0] < end:
            if other[k][0] > start:
                left.append((start, other[k][0]))
            start = max(start, other[k][1])
            k += 1
        if end > start:
            left.append((start, end))
    return left


def length(parts: Iterable[Interval]) -> float:
    """Seconds in all."""
    return sum(end - start for start, end in parts)
