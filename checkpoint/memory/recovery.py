"""Which snapshots can be read with the nodes that answer, and their descriptions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from planaria.checkpoint.memory.held import State
from planaria.checkpoint.memory.holdings import Holdings
from planaria.checkpoint.memory.links import Links
from planaria.checkpoint.memory.memory import Key
from planaria.checkpoint.memory.meta import Meta, Snapshot
from planaria.core.deadline import Deadline
from planaria.errors import NotCommittedError, PlanariaError

# While nodes are asked one after the other, a snapshot may be committed.
_ASKED_AGAIN = 5
# Descriptions of snapshots that others hold, and that are remembered.
_REMEMBERED = 4

States = dict[str, dict[Key, State]]


class Recovery:
    """Finds snapshots, whoever holds them. Thread-safe."""

    def __init__(self, links: Links, holdings: Holdings) -> None:
        self._links = links
        self._holdings = holdings
        self._described: dict[Key, tuple[Meta, bytes]] = {}
        self._answered: list[str] = []

    def recoverable(self, uuids: Sequence[str], deadline: Deadline) -> list[Snapshot]:
        """The snapshots that can be read, the newest first.

        A snapshot counts if a node that answers has committed it, and all but m nodes of every
        group answer and have it: who has committed it knows that all were prepared, and who is
        prepared keeps it.

        Args:
            uuids: The nodes of the job; others of whom these know are asked, too.
            deadline: When to give up; a node that is silent uses up a part of it only.
        """
        found: list[Snapshot] = []
        silent: set[str] = set()
        for _ in range(_ASKED_AGAIN):
            states = self._states(uuids, silent, deadline)
            found, moving = self._judge(states, deadline)
            if not moving:
                break
        return sorted(found, key=lambda s: (s.sequence, s.key.step), reverse=True)

    def meta(self, key: Key, deadline: Deadline) -> Meta:
        """A snapshot's meta, from here or from those who answered last.

        Raises:
            NotCommittedError: Nobody has it.
        """
        return self._describe(key, self._answered, deadline)[0]

    def learn(self, meta: Meta, manifest: bytes) -> None:
        """Remembers the description of a snapshot that others hold."""
        with self._holdings.changed:
            while len(self._described) >= _REMEMBERED:
                self._described.pop(next(iter(self._described)))
            self._described[meta.key] = meta, manifest
        self._links.peers.know(meta.members)

    def _describe(self, key: Key, holders: Iterable[str], deadline: Deadline) -> tuple[Meta, bytes]:
        """A snapshot's meta and manifest, from here or from one of the holders."""
        held = self._holdings.find(key)
        if held is not None and held.meta is not None and held.manifest is not None:
            return held.meta, held.manifest
        if (known := self._described.get(key)) is not None:
            return known
        why = ""
        for uuid in holders:
            try:
                request = {"op": "describe", "key": key.to_json()}
                part = self._part(deadline)
                _, (meta, manifest) = self._links.call(uuid, request, deadline=part)
                found = Meta.from_bytes(bytes(meta)), bytes(manifest)
            except (PlanariaError, ValueError) as error:
                why = f": node {uuid}: {error}"
                continue
            self.learn(*found)
            return found
        raise NotCommittedError(f"nothing is known here of a snapshot of {key}{why}")

    def _states(self, uuids: Sequence[str], silent: set[str], deadline: Deadline) -> States:
        """What each node that answers has, asking also those of whom others know."""
        states: States = {}
        ask = {self._links.uuid, *uuids}
        for held in self._holdings.all():
            ask |= {member.uuid for member in held.members}
        while now := ask - states.keys() - silent:
            answers = self._links.ask(
                sorted(now), {"op": "holdings"}, deadline=self._part(deadline)
            )
            for uuid, answer in answers.items():
                if isinstance(answer, PlanariaError):
                    silent.add(uuid)
                    continue
                header: dict[str, Any] = answer[0]
                states[uuid] = {Key.from_json(key): State(state) for key, state in header["held"]}
                for key, state in states[uuid].items():
                    if state >= State.PREPARED:
                        ask |= self._members_of(key, uuid, deadline)
        self._answered = sorted(states)
        return states

    def _members_of(self, key: Key, holder: str, deadline: Deadline) -> set[str]:
        try:
            return set(self._describe(key, [holder], deadline)[0].uuids)
        except NotCommittedError:
            return set()  # a newer one has taken its place meanwhile

    def _judge(self, states: States, deadline: Deadline) -> tuple[list[Snapshot], bool]:
        """What can be read, and whether something was on the move while nodes were asked."""
        found: list[Snapshot] = []
        moving = False
        for key in {
            key for held in states.values() for key, s in held.items() if s == State.COMMITTED
        }:
            holders = [u for u, held in states.items() if held.get(key, -1) >= State.PREPARED]
            # Committed there, so prepared here by now: this node was asked before.
            moving |= any(key in held for uuid, held in states.items() if uuid not in holders)
            try:
                meta, manifest = self._describe(key, holders, deadline)
            except NotCommittedError:
                moving = True
                continue
            lost = [uuid for uuid in meta.uuids if uuid not in holders]
            if all(len(set(lost) & set(each.uuids)) <= each.stripes.m for each in meta.groups):
                found.append(Snapshot(key, manifest, meta.files, lost, meta.sequence))
        return found, moving

    def _part(self, deadline: Deadline) -> Deadline:
        return deadline.sub(min(self._links.timeout_s, deadline.remaining() / 3))
