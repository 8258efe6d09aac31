"""Deciding at a step boundary, on all ranks alike: whether to save, whether to stop.

What hangs on the step number is decided on the spot. What only one rank can know (a signal, its
clock, what it measured) is put to a vote of all ranks, whose result is looked at one step later, so
that nobody waits for it.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from planaria.checkpoint.handle import SaveHandle
from planaria.checkpoint.policies import Progress, SavePolicy, VotedPolicy
from planaria.core.collective import Ranks


class Decisions:
    """When one checkpointer saves and stops.

    Args:
        policy: When to save; None only when asked.
        told_to_stop: Whether this rank was told to stop.
    """

    #: This rank's clock in seconds.
    clock: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(self, policy: SavePolicy | None, told_to_stop: Callable[[], bool]) -> None:
        self.stopping = False
        self._policy, self._told_to_stop = policy, told_to_stop
        self._ranks: Ranks | None = None
        self._voted = policy if isinstance(policy, VotedPolicy) else None
        self._opened = False
        self._vote: Callable[[], list[int]] | None = None
        self._saves: deque[_Save] = deque()
        self._persist_s: float | None = None
        self._last_step: int | None = None
        self._last_at: float | None = None
        self._blocked_s = self._blocked_most_s = 0.0
        self._began = self.clock()
        self._since = 0

    def open(self, ranks: Ranks) -> None:
        """Lets the policy take what it needs, such as a signal's handler.

        Where others voted before, what was put to their vote is forgotten. What the policy has
        measured stays each rank's own: a new rank 0 begins anew with that.

        Args:
            ranks: Who votes.

        Raises:
            ConfigError: It cannot have that here.
        """
        self._ranks, self._vote = ranks, None
        self._saves.clear()
        self._last_at = None
        self._blocked_s = self._blocked_most_s = 0.0
        if self._voted is not None and not self._opened:
            self._voted.open()
            self._opened = True

    def save_due(self, n: int) -> bool:
        """Whether to save now that `n` steps are done; `stopping` tells whether to stop.

        To be called by all ranks at each step boundary.

        Raises:
            CollectiveError: Another rank is gone.
        """
        ranks = self._ranks
        assert ranks is not None  # it was opened
        now = self.clock()
        stop, wanted = self._result()
        self.stopping = self.stopping or stop
        due = self.stopping or wanted or (self._policy is not None and self._policy.due(n))
        self._since += 1
        if ranks.size > 1:
            if due:
                self._begin(now)
            if not self.stopping:
                mine = [self._told_to_stop(), self._wants(n, now, due)]
                self._vote = ranks.max_async([*map(int, mine), int(self._blocked_s * 1e6)])
        else:
            self.stopping = self.stopping or self._told_to_stop()
            self._blocked_most_s = self._blocked_s
            due = self._wants(n, now, due) or due or self.stopping
            if due:
                self._begin(now)
        self._blocked_s = 0.0
        self._last_at = now
        return due

    def saving(self, handle: SaveHandle) -> None:
        """A save has been called, by whomever."""
        now = self.clock()
        self._begin(now)
        if self._voted is not None:
            self._saves.append(_Save(handle, now))

    def saved(self, handle: SaveHandle) -> None:
        """A save has ended; may be called by another thread."""
        for save in tuple(self._saves):
            if save.handle is handle:
                save.ended = self.clock()

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Counts a block as time in which training waits for checkpoints."""
        began = self.clock()
        try:
            yield
        finally:
            self._blocked_s += self.clock() - began

    def close(self) -> None:
        """Ends the vote that is under way, in which every rank takes part.

        Raises:
            CollectiveError: Another rank is gone.
        """
        self._result()

    def release(self) -> None:
        """Lets go of what the policy has taken."""
        if self._voted is not None and self._opened:
            self._opened = False
            self._voted.close()

    def _begin(self, now: float) -> None:
        self._began, self._since = now, 0

    def _result(self) -> tuple[bool, bool]:
        """What the last vote came to."""
        vote, self._vote = self._vote, None
        if vote is None:
            return False, False
        stop, save, blocked_us = vote()
        self._blocked_most_s = blocked_us / 1e6
        return bool(stop), bool(save)

    def _wants(self, n: int, now: float, due: bool) -> bool:
        """Asks the policy what this rank wants."""
        if self._voted is None or self._ranks is None:
            return False
        before = self._last_at
        disturbed = False
        for save in tuple(self._saves):
            ended = save.ended
            disturbed = disturbed or ended is None or (before is not None and ended >= before)
            if ended is not None:
                self._saves.remove(save)
                if save.handle.error is None:
                    self._persist_s = ended - save.began
        return self._voted.wants(
            Progress(
                step=n,
                rank=self._ranks.rank,
                since_save_s=now - self._began,
                since_save=self._since,
                step_s=None if before is None else now - before,
                blocked_s=self._blocked_most_s,
                disturbed=disturbed,
                saving=due or bool(self._saves),
                persist_s=self._persist_s,
            )
        )


class _Save:
    """One save that is looked at: when it began, and when it ended."""

    def __init__(self, handle: SaveHandle, began: float) -> None:
        self.handle, self.began = handle, began
        self.ended: float | None = None
