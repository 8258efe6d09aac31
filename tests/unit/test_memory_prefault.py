"""Memory that is touched ahead of its use: as much as was asked for, and nothing changes in it."""

import os
import time

import numpy as np

from planaria.checkpoint.memory.arena import Arena
from planaria.checkpoint.memory.memory import Span
from planaria.checkpoint.memory.prefault import Prefault


def blocks(arena: Arena) -> int:
    return os.fstat(arena.fd).st_blocks * 512


def reach(prefault: Prefault, nbytes: int) -> None:
    until = time.monotonic() + 60
    while prefault.done < nbytes:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_it_takes_what_is_wanted_and_no_more_than_there_is():
    arena = Arena(16 << 20)
    assert blocks(arena) == 0
    prefault = Prefault(arena)
    try:
        prefault.want(5 << 20)
        reach(prefault, 5 << 20)
        assert blocks(arena) == prefault.done == 5 << 20
        prefault.want(1 << 40)
        reach(prefault, 16 << 20)
        assert blocks(arena) == 16 << 20
    finally:
        prefault.close()
        arena.close()


def test_what_was_written_stays():
    arena = Arena(8 << 20)
    prefault = Prefault(arena)
    try:
        view = arena.view(Span(0, 8 << 20))
        view[:] = 7
        prefault.want(8 << 20)
        reach(prefault, 8 << 20)
        assert np.all(view == 7)
    finally:
        prefault.close()
        arena.close()


def test_a_system_that_cannot_is_left_alone():
    class Older(Arena):
        def populate(self, offset: int, nbytes: int) -> bool:
            return False

    arena = Older(1 << 20)
    prefault = Prefault(arena)
    prefault.want(1 << 20)
    time.sleep(0.05)
    assert prefault.done == 0
    prefault.close()
    arena.close()
