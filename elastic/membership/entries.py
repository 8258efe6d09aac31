"""What a coordinator knows of each process, and of the generation that it takes over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from planaria.elastic.membership.view import Standing
from planaria.elastic.membership.watching import Watched


@dataclass
class Member:
    """What is known of one process, whether it takes part yet or not."""

    watched: Watched
    asked: bool = False  # has asked to join
    fencing: bool = False
    standing: Standing | None = None
    away_since: float | None = None  # its agent is out of reach
    told: str | None = None  # what it was told is wanted


@dataclass(frozen=True)
class Past:
    """What a new coordinator knows of the generation that it takes over."""

    generation: int
    members: tuple[int, ...]
    dead: frozenset[int] = frozenset()
    next_id: int = 0
    facts: Mapping[str, Any] | None = None
    last: str = ""  # why it was the job's last one
