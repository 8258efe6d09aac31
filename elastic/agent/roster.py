"""Who is where in a job, as every agent knows it, and who may take over: no I/O."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from planaria.core.procs import Identity, is_alive
from planaria.elastic.membership.decision import Past
from planaria.elastic.membership.quorum import has_quorum
from planaria.elastic.membership.view import View, ids
from planaria.errors import ConfigError, WireError

# Ids that a coordinator may have given before it could tell: they are left out.
_SPARE_IDS = 1000


@dataclass
class Entry:
    """One agent: where it listens, which process it is, and its members' processes."""

    address: tuple[str, int]
    identity: list[Any]
    members: dict[int, list[Any] | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` takes."""
        return {
            "address": list(self.address),
            "identity": self.identity,
            "members": {str(member): who for member, who in self.members.items()},
        }

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Entry:
        """Reads an entry.

        Raises:
            WireError: It is malformed.
        """
        try:
            host, port = record["address"]
            members = {int(member): who for member, who in record["members"].items()}
            return Entry((str(host), int(port)), list(record["identity"]), members)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise WireError(f"a malformed entry of a roster: {error!r}") from None


@dataclass(frozen=True)
class Pledge:
    """What an agent brings to the election of a coordinator.

    Attributes:
        name: The agent's name.
        members: Its members that are not proven dead.
        term: The newest term that it has taken part in.
        accepted: The newest generation that it was asked to remember, and in which term.
        dead: Members that it has proven dead.
    """

    name: str
    members: frozenset[int]
    term: int
    accepted: tuple[int, View] | None
    dead: frozenset[int]

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` takes."""
        accepted = self.accepted
        return {
            "name": self.name,
            "members": sorted(self.members),
            "term": self.term,
            "accepted": None if accepted is None else [accepted[0], accepted[1].to_json()],
            "dead": sorted(self.dead),
        }

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Pledge:
        """Reads a pledge.

        Raises:
            WireError: It is malformed.
        """
        try:
            accepted = record["accepted"]
            return Pledge(
                str(record["name"]),
                frozenset(ids(record["members"])),
                int(record["term"]),
                None if accepted is None else (int(accepted[0]), View.from_json(accepted[1])),
                frozenset(ids(record["dead"])),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise WireError(f"a malformed pledge: {error!r}") from None


def newest(pledges: Iterable[Pledge]) -> View | None:
    """The newest generation that any of the agents remembers."""
    found = [p.accepted for p in pledges if p.accepted is not None]
    if not found:
        return None
    return max(found, key=lambda each: (each[0], each[1].generation))[1]


def takeover(
    pledges: Collection[Pledge],
    dead: Collection[int],
    next_id: int,
    facts: Mapping[str, Any] | None,
) -> tuple[int, Past] | None:
    """The term and the past of a new coordinator, or None if the agents are no quorum.

    Args:
        pledges: Those of all agents that agree, the candidate's own included.
        dead: Members that are proven dead, beside what the pledges say.
        next_id: The first id that is free, as far as is known.
        facts: What has to be equal on all members.
    """
    view = newest(pledges)
    if view is None:
        return None
    proven = frozenset(dead).union(*(p.dead for p in pledges))
    present = frozenset[int]().union(*(p.members for p in pledges)) - proven
    if not present & set(view.members) or not has_quorum(present, view.members, proven):
        return None
    free = max([next_id, *view.members, *present, *proven]) + _SPARE_IDS
    term = max(p.term for p in pledges) + 1
    dead = proven & set(view.members)
    return term, Past(view.generation, view.members, dead, free, facts, view.last)


def order(roster: Mapping[str, Entry], view: View | None, first: str | None) -> list[str]:
    """The agents in the order in which they are turned to: the coordinator, then by their members.

    Args:
        roster: All agents.
        view: The newest generation.
        first: The agent of the coordinator that was followed last.
    """
    members = () if view is None else view.members

    def place(name: str) -> tuple[bool, int, str]:
        here = [m for m in roster[name].members if m in members]
        return name != first, min(here, default=1 << 60), name

    return sorted(roster, key=place)


def proven_dead(
    entry: Entry, alive: Callable[[Identity], bool] = is_alive
) -> frozenset[int] | None:
    """The members of an agent if it and all of them are proven dead from here, else None."""
    try:
        if alive(Identity(*entry.identity)):
            return None
        for who in entry.members.values():
            if who is None or alive(Identity(*who)):
                return None
    except (ConfigError, TypeError):
        return None  # they ran on another machine, which alone can tell
    return frozenset(entry.members)
