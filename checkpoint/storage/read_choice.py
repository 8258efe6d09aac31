"""Whether direct reads or reads through the page cache are faster, found out while reading.

Which it is hangs on what lies below the file system: a disk's own queue is filled better by direct
reads, which also take less of the processor; a hypervisor or a network file system may have, or
read ahead, what is asked for. So both are tried on the first large reads, and the slower one again
now and then: what is below may change, and so may what else is read.
"""

import threading
from dataclasses import dataclass, field

#: Bytes in a row that a way gets when it is tried, and below which a read tells nothing.
TRIAL_NBYTES, LEAST_NBYTES = 64 << 20, 1 << 20
#: So many bytes by the faster way are followed by a trial of the other one; twice as many each time
#: that it was found to be the slower one again, up to a limit.
TRY_AGAIN_AFTER, TRY_AGAIN_AT_LAST = 1 << 30, 1 << 34
#: The other way must be better by so much: who is close to the other would change all the time.
_MARGIN = 0.9
_FORGET = 0.8


@dataclass
class ReadChoice:
    """The choice for one device. Thread-safe.

    Args:
        direct: The way that is tried first, and used where nothing is known.

    Attributes:
        direct: The way that is used now.
    """

    direct: bool = True
    _costs: dict[bool, float] = field(default_factory=dict)  # seconds a byte
    _left: int = TRIAL_NBYTES
    _pause: int = TRY_AGAIN_AFTER
    _trying: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self, nbytes: int) -> bool:
        """Whether the next read, of so many bytes, should be a direct one."""
        if nbytes < LEAST_NBYTES:
            return self.direct
        with self._lock:
            way = self.direct != self._trying
            self._left -= nbytes
            if self._left <= 0:
                self._trying = not self._trying
                if self._trying:
                    self._left = TRIAL_NBYTES
                else:
                    self._left = self._pause
                    self._pause = min(2 * self._pause, TRY_AGAIN_AT_LAST)
            return way

    def took(self, direct: bool, nbytes: int, seconds: float) -> None:
        """A read has ended.

        Args:
            direct: Which way it went.
            nbytes: Its length.
            seconds: How long it took; reads of both ways wait for each other alike.
        """
        if nbytes < LEAST_NBYTES:
            return
        cost = seconds / nbytes
        with self._lock:
            before = self._costs.get(direct)
            self._costs[direct] = cost if before is None else _FORGET * before + 0.2 * cost
            mine, other = self._costs.get(self.direct), self._costs.get(not self.direct)
            if mine is not None and other is not None and other < _MARGIN * mine:
                self.direct = not self.direct
                self._trying, self._left = False, TRY_AGAIN_AFTER
                self._pause = 2 * TRY_AGAIN_AFTER


_choices: dict[int, ReadChoice] = {}


def choice_for(device: int) -> ReadChoice:
    """What this process knows of a device (`st_dev`)."""
    return _choices.setdefault(device, ReadChoice())
