"""Checkpointers of jobs whose ranks are known later, or change."""

from __future__ import annotations

import enum
import os

#: Where this is set, the ranks of the job may change, and a session says who they are.
ELASTIC_ENV = "PLANARIA_ELASTIC"


class Later(enum.Enum):
    """The type of `LATER`."""

    LATER = "LATER"


#: As `process_group`: the ranks are not known yet; `Checkpointer.attach` says who they are.
LATER = Later.LATER


def is_for_later(group: object) -> bool:
    """Whether a checkpointer that was given this as its group waits for `attach`."""
    return group is LATER or (group is None and ELASTIC_ENV in os.environ)
