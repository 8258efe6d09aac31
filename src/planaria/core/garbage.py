"""Keeping Python's cyclic garbage collector out of short blocks that allocate a lot."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """A block, or a decorated function, in which no cyclic garbage is looked for.

    A process that has torch loaded holds millions of objects; a collection that a few thousand new
    ones set off takes longer than making them. For blocks of at most seconds that drop no cycles.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
