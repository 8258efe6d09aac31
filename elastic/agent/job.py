"""A job as one of its agents takes part in it: as the first, or joined to another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from planaria.core.procs import identity
from planaria.elastic.agent.node import Hands, Here, Node
from planaria.elastic.agent.stores import serve_store
from planaria.elastic.membership.coordinator import Coordinator
from planaria.elastic.membership.rules import Rules


class Job:
    """What an agent knows of its job, and what it does for it.

    Args: as for `ElasticAgent`.
    """

    def __init__(
        self,
        name: str,
        hands: Hands,
        rules: Rules,
        *,
        token: bytes | None,
        listen: tuple[str, int],
        join: tuple[str, int] | None,
        facts: Mapping[str, Any],
        offer: Mapping[str, Any],
        adopt: Callable[[Mapping[str, Any]], object],
        on_event: Callable[[str, Mapping[str, Any]], object],
    ) -> None:
        self.rules = rules
        self.store_address: tuple[str, int] = ("", 0)
        self.leaves = False
        self._name = name
        self._on_event = on_event
        self._host = listen[0]
        self._store: Any = None
        self._coordinator: Coordinator | None = None
        self.node = Node(name, hands, rules, token=token, host=listen[0], port=listen[1])
        self._identities: dict[int, list[Any]] = {}

    @property
    def address(self) -> tuple[str, int]:
        """Where members and agents call."""
        return self.node.address

    def open(self, nproc: int) -> list[int]:
        """Founds the job, or joins it; returns the ids of the ranks to start here."""
        self._store, self.store_address = serve_store(self._host)
        coordinator = Coordinator(self.rules, self.store_address, on_note=self._on_event)
        self._coordinator = coordinator
        ids = coordinator.new_ids(self._name, nproc)
        self.node.members.update(ids)
        coordinator.attach(self._name, self.node)
        self.node.follow(Here(self._name, coordinator))
        self.node.open()
        coordinator.start()
        return ids

    def started(self, member: int, pid: int) -> None:
        """A rank was started here."""
        self._identities[member] = list(identity(pid))

    @property
    def over(self) -> bool:
        """Whether there is nothing left to be done for the job here."""
        return self._coordinator is not None and self._coordinator.over

    @property
    def stopped(self) -> str | None:
        """Why the job cannot go on, or None."""
        return self._coordinator.stopped if self._coordinator is not None else None

    def close(self) -> None:
        """Ends this agent's part."""
        if self._coordinator is not None:
            self._coordinator.close()
        self.node.close()
        self._store = None
