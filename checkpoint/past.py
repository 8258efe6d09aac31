"""What a run knows of its past, rank by rank, and what ranks that meet anew make of it.

Ranks that went on from an earlier group know as much as that had told them when it ended: one may
have seen a commit of which another was not told any more. Ranks that join know nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Past:
    """What one rank knows.

    Attributes:
        goes_on: Whether what the root holds is this run's own past.
        newest_at_open: The newest step that the root held when the run began.
        restored: The step that was restored, until the first commit after it.
        owes: Whether the next step is to be made durable, whatever the policy says.
        stopping: Whether ranks have agreed to stop.
        locks: Marks of the locks by which ranks of this job have held the root.
    """

    goes_on: bool = False
    newest_at_open: int | None = None
    restored: int | None = None
    owes: bool = False
    stopping: bool = False
    locks: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Past:
        """The inverse of `to_json`."""
        return cls(**data)


def merged(pasts: Sequence[Past]) -> Past:
    """What ranks know together.

    Args:
        pasts: Of those that were part of an earlier group; the others know nothing.
    """
    if not pasts:
        return Past()
    # Who knows of a commit has no restored step left: the others were not told any more.
    seen = any(p.restored is None for p in pasts)
    newest = [p.newest_at_open for p in pasts if p.newest_at_open is not None]
    return Past(
        goes_on=any(p.goes_on for p in pasts),
        newest_at_open=max(newest, default=None),
        restored=None if seen else pasts[0].restored,
        owes=any(p.owes for p in pasts),
        stopping=any(p.stopping for p in pasts),
        locks=sorted({lock for p in pasts for lock in p.locks}),
    )
