"""The leader's side of a snapshot: two-phase commit over the nodes that take part.

All nodes seal, then exchange parity, then say that they are prepared; only then is the snapshot
committed, first here, then everywhere. A node that is prepared keeps what it holds until it hears.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from planaria.checkpoint.memory import points
from planaria.checkpoint.memory.holdings import Holdings
from planaria.checkpoint.memory.links import Links, failures
from planaria.checkpoint.memory.memory import Key, Member, Scheme
from planaria.checkpoint.memory.meta import ImageFile, Meta, NodeFiles, files_from_json
from planaria.core.deadline import Deadline
from planaria.core.points import point
from planaria.errors import ConfigError, PlanariaError, SaveFailedError, WireError


@dataclass(eq=False)
class Round:
    """One snapshot that is on its way, as its leader sees it."""

    key: Key
    members: tuple[Member, ...]
    scheme: Scheme
    sealed: dict[str, tuple[ImageFile, ...]] = field(default_factory=dict)
    prepared: set[str] = field(default_factory=set)
    failed: str = ""
    decided: bool = False

    @property
    def uuids(self) -> list[str]:
        """Who takes part."""
        return [member.uuid for member in self.members]


class Leader:
    """Leads the snapshots of which this node is the first member. Thread-safe."""

    def __init__(self, links: Links, holdings: Holdings, block_nbytes: int) -> None:
        self._links = links
        self._holdings = holdings
        self._block_nbytes = block_nbytes
        self._rounds: dict[Key, Round] = {}

    def sealed(
        self, key: Key, members: Sequence[Member], scheme: Scheme, request: dict[str, Any]
    ) -> None:
        """A node has sealed its files.

        Raises:
            SaveFailedError: The snapshot is over.
            ConfigError: The node was configured otherwise than this one.
        """
        node = str(request["node"])
        theirs = [list(each) for each in request["members"]]
        if theirs != [m.to_json() for m in members] or request["scheme"] != [
            scheme.losses,
            scheme.group_size,
        ]:
            raise ConfigError(
                f"node {node} was told of other members or another scheme than its leader "
                f"{self._links.uuid}: configure all nodes alike before a snapshot"
            )
        files = files_from_json(request["files"])
        with self._holdings.changed:
            self._holdings.sequence = max(self._holdings.sequence, int(request["sequence"]))
            self._round(key, members, scheme).sealed[node] = files
            self._holdings.changed.notify_all()

    def prepared(self, key: Key, node: str) -> None:
        """A node is prepared.

        Raises:
            SaveFailedError: The snapshot is over.
        """
        with self._holdings.changed:
            running = self._rounds.get(key)
            if running is None:
                outcome = self._holdings.outcome(key)
                if outcome is not None and outcome.committed:
                    return
                raise SaveFailedError(f"{key} is over{f': {outcome.why}' if outcome else ''}")
            running.prepared.add(node)
            self._holdings.changed.notify_all()

    def failed(
        self, key: Key, members: Sequence[Member], scheme: Scheme, node: str, why: str
    ) -> None:
        """Something went wrong on a node: the snapshot fails everywhere, if it is not decided."""
        with self._holdings.changed:
            if self._holdings.outcome(key) is None:
                running = self._round(key, members, scheme)
                running.failed = running.failed or f"node {node}: {why}"
                self._holdings.changed.notify_all()

    def running(self, key: Key) -> bool:
        """Whether the outcome is still open."""
        with self._holdings.changed:
            return key in self._rounds

    def _round(self, key: Key, members: Sequence[Member], scheme: Scheme) -> Round:
        running = self._rounds.get(key)
        if running is None:
            outcome = self._holdings.outcome(key)
            if outcome is not None:
                raise SaveFailedError(f"{key} is over{f': {outcome.why}' if outcome.why else ''}")
            running = self._rounds[key] = Round(key, tuple(members), scheme)
            self._links.spawn("lead", self._lead, running)
        return running

    def _lead(self, running: Round) -> None:
        try:
            try:
                self._agree(running)
            except PlanariaError as error:
                self._abort(running, str(error))
            else:
                self._commit(running)
        finally:
            with self._holdings.changed:
                self._rounds.pop(running.key, None)
                self._holdings.changed.notify_all()

    def _agree(self, running: Round) -> None:
        """Goes on once all nodes are prepared."""
        key, deadline = running.key, self._links.deadline()
        self._wait(running, lambda: set(running.sealed), deadline, f"images of {key} to be sealed")
        with self._holdings.changed:
            self._holdings.sequence += 1
            sequence = self._holdings.sequence
        nodes = tuple(NodeFiles(m, running.sealed[m.uuid]) for m in running.members)
        meta = Meta(key, sequence, running.scheme, nodes, self._block_nbytes)
        if len(meta.files) != sum(len(node.files) for node in nodes):
            raise SaveFailedError(f"two nodes have a file of the same name for {key}")
        base = self._holdings.committed()
        request = {
            "op": "exchange",
            "key": key.to_json(),
            "base": base.to_json() if base is not None else None,
        }
        deadline = self._links.deadline()
        wrong = failures(
            self._links.ask(running.uuids, request, [meta.to_bytes()], deadline=deadline)
        )
        if wrong:
            raise SaveFailedError(wrong)
        self._wait(running, lambda: running.prepared, deadline, f"nodes to be prepared for {key}")
        with self._holdings.changed:
            if running.failed:
                raise SaveFailedError(running.failed)
            running.decided = True
        # Here first: whoever asks this node finds the decision, whatever becomes of the others.
        point(points.DECIDED, step=key.step)
        self._holdings.commit(key)

    def _wait(
        self, running: Round, who: Callable[[], set[str]], deadline: Deadline, what: str
    ) -> None:
        patience = Deadline(self._links.ask_after_s)
        while True:
            with self._holdings.changed:
                if running.failed:
                    raise SaveFailedError(running.failed)
                if self._links.closed:
                    raise WireError(f"node {self._links.uuid} was closed")
                missing = [uuid for uuid in running.uuids if uuid not in who()]
                if not missing:
                    return
                self._holdings.wait_changed(
                    deadline, f"{what}: node {', '.join(missing)}", self._links.ask_after_s
                )
            if patience.expired:
                self._look_after(running, missing, deadline)
                patience = Deadline(self._links.ask_after_s)

    def _look_after(self, running: Round, missing: list[str], deadline: Deadline) -> None:
        """Asks those who say nothing; who is gone or has given up will not come any more."""
        request = {"op": "outcome", "key": running.key.to_json()}
        part = deadline.sub(10 * self._links.ask_after_s)  # who is silent may yet come
        answers = self._links.ask(missing, request, deadline=part)
        for uuid, answer in answers.items():
            if isinstance(answer, WireError):
                raise SaveFailedError(f"node {uuid}: {answer}")
            if not isinstance(answer, PlanariaError) and answer[0]["state"] == "failed":
                raise SaveFailedError(f"node {uuid}: {answer[0]['why']}")

    def _commit(self, running: Round) -> None:
        """Tells the others; this node has committed already."""
        key = running.key
        others = [uuid for uuid in running.uuids if uuid != self._links.uuid]
        try:
            point(points.COMMIT, step=key.step)
            request = {"op": "commit", "key": key.to_json(), "node": self._links.uuid}
            wrong = failures(self._links.ask(others, request, deadline=self._links.deadline()))
            point(points.COMPLETE, step=key.step)
        except (PlanariaError, OSError) as error:
            wrong = str(error)
        request = {"op": "complete", "key": key.to_json(), "why": wrong}
        self._links.ask(running.uuids, request, deadline=self._links.deadline())

    def _abort(self, running: Round, why: str) -> None:
        request = {
            "op": "abort",
            "key": running.key.to_json(),
            "node": self._links.uuid,
            "why": why,
        }
        # Here first, so that whoever asks hears of it; and no longer than it takes to be told.
        self._holdings.fail(running.key, why)
        self._links.ask(running.uuids, request, deadline=self._links.deadline())
