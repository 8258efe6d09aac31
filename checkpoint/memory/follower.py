"""A node's side of a snapshot: it seals, exchanges, is prepared, and does what the leader decided.

Where the leader is silent it asks. What is prepared is kept until it is certain that no node has
committed it, or until a newer one is committed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from planaria.checkpoint.memory import points
from planaria.checkpoint.memory.held import Held, State
from planaria.checkpoint.memory.holdings import Holdings
from planaria.checkpoint.memory.links import Links
from planaria.checkpoint.memory.memory import Key, Member, Scheme
from planaria.checkpoint.memory.meta import Meta
from planaria.core.deadline import Deadline
from planaria.core.points import point
from planaria.errors import (
    ConfigError,
    FaultError,
    NotCommittedError,
    PlanariaError,
    SaveFailedError,
    WireError,
)

#: Encodes this node's stripes: (what is held, what was committed before or None).
Encode = Callable[[Held, Key | None], None]


@dataclass(frozen=True)
class Membership:
    """Who is in the job, as this node was told."""

    members: tuple[Member, ...] = ()
    scheme: Scheme = Scheme(0)  # noqa: RUF009 - frozen
    local_files: int = 0

    @property
    def uuids(self) -> list[str]:
        """The members' identities, the leader first."""
        return [member.uuid for member in self.members]


class Follower:
    """Takes part in snapshots. Thread-safe."""

    def __init__(self, links: Links, holdings: Holdings, encode: Encode) -> None:
        self._links = links
        self._holdings = holdings
        self._encode = encode
        self.membership = Membership()

    def configured(self) -> Membership:
        """Who is in the job.

        Raises:
            ConfigError: This node was not told yet.
        """
        if not self.membership.members:
            raise ConfigError(f"node {self._links.uuid} was not configured yet")
        return self.membership

    def announce(self, held: Held) -> None:
        """Tells the leader, in the background, that this node has sealed its files."""
        membership = self.membership
        request = {
            "op": "sealed",
            "key": held.key.to_json(),
            "node": self._links.uuid,
            "members": [member.to_json() for member in membership.members],
            "scheme": [membership.scheme.losses, membership.scheme.group_size],
            "files": [file.to_json() for file in held.sealed_files()],
            "sequence": self._holdings.sequence,
        }

        def tell() -> None:
            try:
                point(points.SEAL, step=held.key.step)
                self._links.call(held.leader, request, deadline=self._links.deadline())
                held.announced = True
            except (PlanariaError, OSError) as error:
                self._holdings.fail(held.key, f"cannot tell the leader: {error}", State.SEALED)

        self._links.spawn("announce", tell)

    def exchange(self, key: Key, meta: Meta, base: Key | None) -> None:
        """Begins with this node's part of the exchange.

        Raises:
            NotCommittedError: The snapshot is not held here.
            SaveFailedError: It was not sealed here, or with other files.
        """
        with self._holdings.changed:
            held = self._holdings.get(key)
            if held.meta is not None:
                return  # asked twice
            mine = next((n.files for n in meta.nodes if n.member.uuid == self._links.uuid), None)
            if held.state != State.SEALED or mine != held.sealed_files():
                raise SaveFailedError(f"{key} is not sealed at node {self._links.uuid}")
            held.meta = meta
            self._holdings.sequence = max(self._holdings.sequence, meta.sequence)
            self._holdings.changed.notify_all()
        self._links.spawn("encode", self._do_duties, held, base)

    def have_manifest(self, key: Key, manifest: bytes) -> None:
        """Takes in the manifest.

        Raises:
            SaveFailedError: The snapshot has failed.
        """
        with self._holdings.changed:
            held = self._holdings.entry(key, self.membership.members)
            held.manifest = manifest
        self.look(key)

    def look(self, key: Key) -> None:
        """Tells the leader that this node is prepared, if it just has become so."""
        if self._holdings.prepare(key):
            self._links.spawn("prepared", self._tell_prepared, key)

    def commit(self, key: Key, leader: str) -> None:
        """Commits on the leader's word.

        Raises:
            NotCommittedError: The snapshot is not held here.
            SaveFailedError: It is not prepared, or its leader is no member any more.
        """
        with self._holdings.changed:
            held = self._holdings.get(key)
            if leader != held.leader or leader not in self.membership.uuids:
                raise SaveFailedError(
                    f"node {leader} does not decide on {key} at node {self._links.uuid}"
                )
            self._holdings.commit(key)

    def heed_abort(self, key: Key, leader: str, why: str) -> None:
        """Forgets a snapshot on the leader's word.

        Raises:
            SaveFailedError: The word is not its leader's.
        """
        held = self._holdings.find(key)
        if held is not None and held.leader != leader:
            raise SaveFailedError(f"node {leader} does not decide on {key} at {self._links.uuid}")
        self._holdings.fail(key, why or "it was given up")

    def give_up(self, key: Key, why: str) -> None:
        """Has a snapshot fail everywhere, unless it is decided already."""
        held = self._holdings.find(key)
        leader = held.leader if held is not None else (self.membership.uuids or [""])[0]
        request = {"op": "failed", "key": key.to_json(), "node": self._links.uuid, "why": why}
        # A leader that cannot be told will hear that this node has given up when it asks.
        with contextlib.suppress(PlanariaError):
            self._links.call(leader, request, deadline=self._links.deadline())
        self._holdings.fail(key, f"node {self._links.uuid}: {why}", State.SEALED)

    def wait(self, key: Key, deadline: Deadline) -> None:
        """Waits until all nodes have committed; see `SnapshotNode.wait`."""
        patience = Deadline(self._links.ask_after_s)
        while True:
            with self._holdings.changed:
                outcome = self._holdings.outcome(key)
                held = self._holdings.find(key)
                if outcome is not None and outcome.complete:
                    return
                if outcome is not None and outcome.why:
                    was = "was not committed"
                    if outcome.committed:
                        was = "was committed here, but perhaps not everywhere"
                    raise SaveFailedError(f"snapshot of {key} {was}: {outcome.why}")
                if held is None:
                    raise NotCommittedError(f"nothing is known of a snapshot of {key}")
                what = (
                    f"the snapshot of {key} to be committed on all nodes; it is "
                    f"{held.state.name.lower()} at node {self._links.uuid}, and node "
                    f"{held.leader} leads"
                )
                self._holdings.wait_changed(deadline, what, self._links.ask_after_s)
            if patience.expired and held.announced:
                doubt = self.consult(held, deadline)
                if doubt:
                    raise SaveFailedError(f"whether {key} was committed is not known: {doubt}")
                patience = Deadline(self._links.ask_after_s)

    def make_room(self, key: Key, deadline: Deadline) -> None:
        """Waits until no other snapshot is on its way at this node.

        Raises:
            DeadlineError: One still is; says what it waits for.
        """
        doubt = ""
        patience = Deadline(self._links.ask_after_s)
        while True:
            with self._holdings.changed:
                others = self._holdings.unfinished(but=key)
                if not others:
                    return
                names = ", ".join(f"{h.key} ({h.state.name.lower()})" for h in others)
                what = f"an earlier snapshot, {names}, to be over{doubt}"
                self._holdings.wait_changed(deadline, what, self._links.ask_after_s)
            for held in others:
                if held.mends is not None and held.state < State.PREPARED:  # this protects more
                    why = f"a snapshot of {key} begins"
                    self._holdings.fail(held.key, f"node {self._links.uuid}: {why}", State.SEALED)
                    self._links.spawn("give-up", self.give_up, held.key, why)
            if patience.expired:
                for held in others:
                    why = self.settle(held, deadline)
                    doubt = f": {why}" if why else doubt
                patience = Deadline(self._links.ask_after_s)

    def consult(self, held: Held, deadline: Deadline) -> str:
        """Asks the leader how a snapshot ended, and does as it says; why that cannot be known."""
        key = held.key
        request = {"op": "outcome", "key": key.to_json()}
        try:
            if held.leader not in self.membership.uuids:
                raise WireError("it is no member any more")  # others may have decided without it
            answer, _ = self._links.call(
                held.leader, request, deadline=deadline.sub(self._links.timeout_s)
            )
        except PlanariaError as error:
            why = f"its leader, node {held.leader}, is gone: {error}"
            self._holdings.fail(key, why, State.SEALED)
            self._holdings.complete(key, why)
            return why if held.state == State.PREPARED and not held.dropped else ""
        state, why = answer["state"], str(answer["why"])
        if state in ("failed", "unknown"):
            self._holdings.fail(key, why or "its leader knows nothing of it")
        elif state in ("committed", "complete") and held.state >= State.PREPARED:
            self._holdings.commit(key)
            if state == "complete" or why:
                self._holdings.complete(key, why)
        return ""

    def settle(self, held: Held, deadline: Deadline) -> str:
        """Finds out how a snapshot ended whose leader may be gone; why that cannot be known."""
        if not held.announced:
            return ""
        doubt = self.consult(held, deadline)
        if not doubt:
            return ""
        key, membership = held.key, self.membership
        asked = dict.fromkeys([*membership.uuids, *(m.uuid for m in held.members)])
        answers = self._links.ask(
            [uuid for uuid in asked if uuid not in (self._links.uuid, held.leader)],
            {"op": "outcome", "key": key.to_json()},
            deadline=deadline.sub(self._links.timeout_s),
        )
        states = {u: a[0] for u, a in answers.items() if not isinstance(a, PlanariaError)}
        if any(answer["state"] in ("committed", "complete") for answer in states.values()):
            self._holdings.commit(key)
            self._holdings.complete(key, doubt)
            return ""
        # A node gives up by itself only before it is prepared; then the leader cannot have decided.
        gave_up = any(answer["state"] == "failed" for answer in states.values())
        # All who are left know of each other that they obey the lost leader no more.
        silent = [
            uuid
            for uuid in membership.uuids
            if uuid != self._links.uuid
            and (uuid not in states or states[uuid]["members"] != membership.uuids)
        ]
        if gave_up or (not silent and held.leader not in membership.uuids):
            self._holdings.fail(key, f"no node has committed it, and {doubt}")
            return ""
        return doubt

    def _do_duties(self, held: Held, base: Key | None) -> None:
        try:
            self._encode(held, base)
            with self._holdings.changed:
                held.encoded = True
        except (PlanariaError, OSError) as error:
            self.give_up(held.key, str(error))
            return
        self.look(held.key)

    def _tell_prepared(self, key: Key) -> None:
        held = self._holdings.find(key)
        if held is None:
            return
        request: dict[str, Any] = {"op": "prepared", "key": key.to_json(), "node": self._links.uuid}
        try:
            point(points.PREPARE, step=key.step)
            self._links.call(held.leader, request, deadline=self._links.deadline())
        except (SaveFailedError, FaultError) as error:
            self._holdings.fail(key, str(error))  # it was not told, or has given up itself
        except (PlanariaError, OSError):
            pass  # in doubt: whoever waits asks
