"""Runs that stop and go on at other world sizes, and what a correct order of the data must show."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from planaria.data import GlobalBatch

Make = Callable[[int, int], GlobalBatch]
"""Makes the data of (rank, world size), collating into lists."""

Segment = tuple[int, int, int]
"""World size, steps that run, and how many of these the checkpoint misses when it stops."""


def committed_steps(make: Make, segments: list[Segment]) -> list[list[Any]]:
    """Runs the segments one after the other, each from the last saved position.

    Returns:
        The samples of each step that was not rolled back, all ranks joined in rank order.
    """
    committed: list[list[Any]] = []
    saved = json.dumps(make(0, 1).state_dict())
    for world_size, steps, lost in segments:
        kept = max(steps - lost, 0)
        done: list[list[Any]] = [[] for _ in range(steps)]
        positions = {0: {saved}}
        for rank in range(world_size):
            data = make(rank, world_size)
            data.load_state_dict(json.loads(saved))
            loop = iter(data)
            for n in range(steps):
                done[n] += next(loop)
                positions.setdefault(n + 1, set()).add(json.dumps(data.state_dict()))
        assert all(len(of_ranks) == 1 for of_ranks in positions.values()), "positions differ"
        committed += done[:kept]
        (saved,) = positions[kept]
    return committed


def check_exactly_once(make: Make, segments: list[Segment], length: int) -> None:
    """Checks that segments read what one rank would have read, each sample once an epoch.

    The dataset must be map-style, with `range(length)` as its samples.
    """
    found = committed_steps(make, segments)
    alone = make(0, 1)
    loop = iter(alone)
    assert found == [next(loop) for _ in found], "not the order of a single rank"
    per_epoch = alone.steps_per_epoch
    assert per_epoch is not None
    for start in range(0, len(found), per_epoch):
        epoch = found[start : start + per_epoch]
        counts = Counter(sample for step in epoch for sample in step)
        assert set(counts.values()) <= {1}, "a sample twice in an epoch"
        if len(epoch) == per_epoch:
            whole = alone.state_dict()["order"]["drop_last"] is False
            expected = length if whole else length - length % len(epoch[0])
            assert len(counts) == expected, "a sample missing from an epoch"
