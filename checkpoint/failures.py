"""How what went wrong in the background reaches the caller."""

import contextlib
import warnings
from collections.abc import Sequence

from planaria import telemetry
from planaria.checkpoint.policies import FailurePolicy
from planaria.errors import CollectiveError, PlanariaError


class Failures:
    """Failures that wait to be raised by the next call; may be filled by any thread.

    Args:
        policy: Whether they are raised, or only warned of.
    """

    def __init__(self, policy: FailurePolicy) -> None:
        self._policy = policy
        self._waiting: list[PlanariaError] = []
        self._without_memory = False

    def tell(self, error: PlanariaError) -> None:
        """A failure surfaces as the policy says."""
        if self._policy != "degrade":
            self._waiting.append(error)
            return
        try:
            warnings.warn(f"{error}; training goes on without it", stacklevel=1)
        except Warning:  # this run wants warnings to be errors
            self._waiting.append(error)

    def add(self, error: PlanariaError) -> None:
        """A failure is raised by the next call, whatever the policy."""
        self._waiting.append(error)

    def of_memory(self, step: int, error: PlanariaError | None) -> None:
        """A snapshot in memory has ended, well or not.

        Durable checkpoints are what is promised: only with ``"fatal"`` is the loss of a snapshot
        raised, else it is warned of, once until there is one again.
        """
        told, self._without_memory = self._without_memory, error is not None
        if error is None:
            return
        telemetry.event("memory.failed", step=step, error=str(error))
        if self._policy == "fatal":
            self._waiting.append(error)
        elif not told:
            with contextlib.suppress(Warning):
                warnings.warn(
                    f"{error}; training goes on, with durable checkpoints alone until a snapshot "
                    "succeeds again",
                    stacklevel=1,
                )

    def forget_lost_ranks(self) -> None:
        """Failures because another rank was gone: the ranks that are left go on without it."""
        kept = [e for e in self.take() if not isinstance(e.__cause__, CollectiveError)]
        self._waiting += kept

    def take(self) -> list[PlanariaError]:
        """Those that are waiting, which are not any more."""
        # One by one: a background thread may add another meanwhile.
        return [self._waiting.pop(0) for _ in range(len(self._waiting))]


def raise_first(failures: Sequence[PlanariaError]) -> None:
    """Raises the first, with the others as notes; returns where there is none."""
    if failures:
        for other in failures[1:]:
            failures[0].add_note(f"and: {other}")
        raise failures[0]
