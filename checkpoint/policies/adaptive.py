"""Saving as often as a given share of the time allows, measured while training runs.

CheckFreq (Mohan et al., FAST'21) chooses an interval of k steps such that the cost of a checkpoint
is at most a given share of k steps, and that it has been written before the next one begins:

    k = max(ceil(persist / step), ceil(cost / (overhead * step)))

and raises it when the run turns out slower than that. Here the second part is an account: every
step earns its share, every save is charged what it was measured to cost, and one begins only when
the account can pay for it. In the steady state that is the same k; and where costs change, what was
overspent is saved again before the next checkpoint, so that the overhead measured over the run
stays below the bound.
"""

import math
from collections import deque
from statistics import median

from planaria import telemetry
from planaria.checkpoint.policies.saving import Progress, VotedPolicy
from planaria.errors import ConfigError

#: Undisturbed steps that have to be seen before the first save, and how many are remembered.
_FIRST, _REMEMBERED = 3, 9
#: The account holds no more than this many saves: a slow disk must not lead to a burst later.
_MOST_SAVES = 2


class Adaptive(VotedPolicy):
    """Saves as often as costs at most a share of the training time, and never two at once.

    What a save costs is what training was blocked for, and what steps took longer while it was
    under way (on rank 0; steps are as fast as the slowest rank). The first save is a trial; until
    it has been paid for, the bound does not hold.

    Args:
        overhead: The share, such as 0.03.

    Attributes:
        overhead: The share.
        cost_s: Expected cost of a save in seconds; None before the first one has ended.
        step_s: Expected seconds of a step that no save disturbs; None before enough were seen.
        persist_s: Expected seconds from a save's call to its commit; None before one.

    Raises:
        ConfigError: The share is not between 0 and 1.
    """

    def __init__(self, overhead: float = 0.03) -> None:
        number = isinstance(overhead, int | float) and not isinstance(overhead, bool)
        if not number or not 0 < overhead < 1:
            raise ConfigError(f"Adaptive({overhead!r}): give a share between 0 and 1, such as 0.03")
        self.overhead = overhead
        self.cost_s: float | None = None
        self.persist_s: float | None = None
        self.step_s: float | None = None
        self._undisturbed: deque[float] = deque(maxlen=_REMEMBERED)
        self._costs: deque[float] = deque(maxlen=3)
        self._uncharged = False  # whether a save has not been charged yet
        self._excess_s = self._blocked_s = 0.0
        self._balance_s = 0.0
        self._useful_s = self._spent_s = 0.0

    @property
    def interval(self) -> int | None:
        """Steps from one save to the next as things stand; None before the first save has ended."""
        if self.cost_s is None or not self.step_s:
            return None
        return max(
            1,
            math.ceil((self.persist_s or 0.0) / self.step_s),
            math.ceil(self.cost_s / (self.overhead * self.step_s)),
        )

    @property
    def measured(self) -> float:
        """What saves have cost so far, as a share of the time without them."""
        return self._spent_s / self._useful_s if self._useful_s else 0.0

    def wants(self, progress: Progress) -> bool:
        """See `VotedPolicy.wants`."""
        if progress.rank != 0:
            return False
        self._observe(progress)
        # An undisturbed step lies between two saves: else there is nothing to compare to.
        if progress.saving or progress.disturbed or self.step_s is None:
            return False
        if self.cost_s is None:
            return True
        return progress.since_save >= (self.interval or 1) and self._balance_s >= self.cost_s

    def _observe(self, progress: Progress) -> None:
        """Takes the last step into account."""
        # With several ranks it comes a step late, and may be charged to the next save.
        self._blocked_s += progress.blocked_s
        if progress.step_s is not None:
            if progress.disturbed:
                usual = progress.step_s if self.step_s is None else self.step_s
                self._excess_s += progress.step_s - usual
                self._earn(usual)
                self._uncharged = True
            else:
                self._undisturbed.append(progress.step_s)
                self._earn(progress.step_s)
                if len(self._undisturbed) >= _FIRST:
                    self.step_s = median(self._undisturbed)
        if self._uncharged and not progress.saving:
            self._charge(progress)

    def _earn(self, seconds: float) -> None:
        self._useful_s += seconds
        self._balance_s += self.overhead * seconds
        if self.cost_s is not None:
            self._balance_s = min(self._balance_s, _MOST_SAVES * self.cost_s)

    def _charge(self, progress: Progress) -> None:
        """The save is over: its cost is known."""
        cost = max(self._excess_s, self._blocked_s, 0.0)
        if progress.persist_s is not None:
            # What took longer than the save itself was something else, such as an evaluation.
            cost = min(cost, max(progress.persist_s, self._blocked_s))
        self._costs.append(cost)
        self._balance_s -= cost
        self._spent_s += cost
        self.cost_s, self.persist_s = max(self._costs), progress.persist_s
        self._excess_s, self._blocked_s, self._uncharged = 0.0, 0.0, False
        telemetry.event(
            "checkpoint.adaptive",
            step=progress.step,
            interval=self.interval,
            cost_s=cost,
            persist_s=self.persist_s,
            step_s=self.step_s,
            overhead=self.measured,
        )

    def __repr__(self) -> str:
        return f"Adaptive({self.overhead!r})"
