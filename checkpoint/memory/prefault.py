"""Brings a node's memory into being before it is needed, in the background.

At the first write to a page the system must find and clear it: that would slow first snapshots.
"""

from __future__ import annotations

import threading

from planaria.checkpoint.memory.arena import HUGE_PAGE, Mapping

# Each slice costs the system a look at all processors; who ends this waits for one.
_SLICE_NBYTES = 8 * HUGE_PAGE


class Prefault:
    """Touches the first bytes of a memory, as many as were asked for; what they hold stays.

    Args:
        memory: The memory; its lower end is used first.
    """

    def __init__(self, memory: Mapping) -> None:
        self._memory = memory
        self._changed = threading.Condition()
        self._wanted = 0
        self._done = 0
        self._ended = False
        threading.Thread(target=self._run, name="planaria-prefault", daemon=True).start()

    @property
    def done(self) -> int:
        """Bytes that are there."""
        return self._done

    def want(self, nbytes: int) -> None:
        """Asks for the first so many bytes; never more than the memory has."""
        with self._changed:
            self._wanted = max(self._wanted, min(nbytes, self._memory.nbytes))
            self._changed.notify_all()

    def close(self) -> None:
        """Ends it; what is there stays."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._done < self._wanted)
                if self._ended:
                    return
                nbytes = min(_SLICE_NBYTES, self._wanted - self._done)
            if not self._memory.populate(self._done, nbytes):
                return  # an older system, or no memory left: pages come with their first write
            self._done += nbytes
