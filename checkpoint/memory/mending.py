"""Making a snapshot whole again once its nodes have changed, without the ranks.

When the members of a job change, the newest snapshot lacks what a node that is gone held: it bears
fewer further losses until the next one is taken, which may be many steps away. So the first of the
members has it taken again, by the nodes alone, over the members that there are now: each copies its
own images, what a lost node held is decoded by one that takes its place, or else by those that have
least, and parity is formed and committed as ever. A snapshot that ranks begin meanwhile is
preferred: this one is given up then. Who reads the old one is led to the new one, which has the
same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planaria.checkpoint.memory.follower import Follower
from planaria.checkpoint.memory.held import State
from planaria.checkpoint.memory.holdings import Holdings
from planaria.checkpoint.memory.links import Links, failures, settled
from planaria.checkpoint.memory.log import say
from planaria.checkpoint.memory.memory import Key
from planaria.checkpoint.memory.meta import ImageFile, Meta
from planaria.checkpoint.memory.reading import Reading
from planaria.checkpoint.memory.recovery import Recovery
from planaria.core.deadline import Deadline
from planaria.errors import PlanariaError, SaveFailedError, WireError

# How often it is tried; what is on its way may be in doubt for a while after a loss.
_TRIES = 4
# Chunks that are read at once.
_CHUNKS = 4


class Mending:
    """Takes the newest snapshot again after a change of members. Thread-safe.

    Args:
        links: The other nodes.
        holdings: What this node holds.
        follower: Who is in the job.
        recovery: Which snapshots there are.
        reading: Reads what a lost node held.
        after_s: So long after a change it begins, so that a snapshot that is due anyway comes
            first; None to leave snapshots as they are.
    """

    def __init__(
        self,
        links: Links,
        holdings: Holdings,
        follower: Follower,
        recovery: Recovery,
        reading: Reading,
        after_s: float | None,
    ) -> None:
        self._links, self._holdings, self._follower = links, holdings, follower
        self._recovery, self._reading, self._after_s = recovery, reading, after_s
        self.mended = 0  #: snapshots that this node has seen whole again

    def members_changed(self) -> None:
        """Begins in the background, if this node is the first of the members."""
        uuids = self._follower.membership.uuids
        if self._after_s is not None and uuids[0] == self._links.uuid:
            self._links.spawn("mend", self._run, uuids, self._after_s)

    def take_again(
        self, key: Key, meta: Meta, manifest: bytes, files: Sequence[str], uuids: Sequence[str]
    ) -> None:
        """Begins with this node's part of it: copies, or decodes, some of the old files.

        Args:
            key: The new snapshot.
            meta: Of the old one.
            manifest: Of both.
            files: Which files.
            uuids: The members, as who asks knows them.

        Raises:
            SaveFailedError: Something else is on its way here, or this node was told of others.
        """
        with self._holdings.changed:
            if self._holdings.find(key) is not None:
                return  # asked twice
            if list(uuids) != self._follower.membership.uuids:
                raise SaveFailedError(f"node {self._links.uuid} was told of other members")
            if others := self._holdings.unfinished():
                self._links.spawn("settle", self._settle)  # nobody else may: it must not stay so
                raise SaveFailedError(
                    f"{others[0].key} is {others[0].state.name.lower()} at node {self._links.uuid}"
                )
            self._recovery.learn(meta, manifest)
            held = self._holdings.entry(key, self._follower.configured().members)
            held.mends, held.manifest = meta.key, manifest
        self._links.spawn("take-again", self._copy, key, meta, list(files))

    def _run(self, uuids: list[str], after_s: float) -> None:
        for attempt in range(_TRIES):
            self._pause(after_s * 2**attempt, uuids)
            if self._links.closed or self._follower.membership.uuids != uuids:
                return  # those that are members now see to it
            try:
                if self._mend(uuids):
                    return
            except PlanariaError as error:
                say(f"a snapshot is not made whole again yet: {error}")

    def _pause(self, seconds: float, uuids: list[str]) -> None:
        pause = Deadline(seconds)
        with self._holdings.changed:
            while not (pause.expired or self._links.closed):
                if self._follower.membership.uuids != uuids:
                    return
                self._holdings.changed.wait(min(pause.timeout(), 0.5))

    def _mend(self, uuids: list[str]) -> bool:
        """Whether nothing is left to do."""
        deadline = self._links.deadline()
        if not self._settle():
            return False  # what it comes to is not known; if it is committed, all is well
        found = self._recovery.recoverable(uuids, deadline)
        if not found or self._follower.membership.scheme.losses == 0 or len(uuids) < 2:
            return True
        old = found[0].key
        meta = self._recovery.meta(old, deadline)
        if set(meta.uuids) <= set(uuids):
            return True
        shares = share(meta, uuids)
        key = old.copy()
        request: dict[str, Any] = {"op": "mend", "key": key.to_json(), "members": uuids}
        described = [meta.to_bytes(), found[0].manifest]
        try:
            coming = {
                uuid: self._links.submit(
                    uuid, {**request, "files": files}, described, deadline=deadline
                )
                for uuid, files in shares.items()
            }
            # All are asked, also if one refuses: each then sees to what is in doubt there.
            if wrong := failures(settled(coming)):
                raise SaveFailedError(wrong)
            self._follower.wait(key, Deadline(2 * self._links.timeout_s))
        except PlanariaError as error:
            self._follower.give_up(key, str(error))
            raise
        self.mended += 1
        say(f"{old} is whole again over {len(uuids)} nodes, as {key}")
        return True

    def _settle(self) -> bool:
        """Finds out how a snapshot ended whose leader is lost; whether nothing is on its way."""
        deadline = self._links.deadline()
        for held in self._holdings.unfinished():
            self._follower.settle(held, deadline)
        return not self._holdings.unfinished()

    def _copy(self, key: Key, meta: Meta, names: list[str]) -> None:
        deadline = self._links.deadline()
        try:
            for name in names:
                self._copy_file(key, meta, name, deadline)
            with self._holdings.changed:
                held = self._holdings.get(key)
                held.state = State.SEALED
            self._follower.announce(held)
        except (PlanariaError, OSError, KeyError) as error:
            self._follower.give_up(key, f"node {self._links.uuid}: {error}")

    def _copy_file(self, key: Key, meta: Meta, name: str, deadline: Deadline) -> None:
        file = next(each for each in meta.owner(name).files if each.name == name)
        members = self._follower.configured().members
        span = self._holdings.allocate(file.nbytes, deadline, f"{name} of {key}")
        span = self._holdings.image(key, members, name, file.nbytes, span)
        try:
            view = self._holdings.memory.view(span).data
            for start, stop in _runs(file):
                held = self._holdings.find(key)
                if held is None or self._links.closed:
                    raise WireError(f"{key} was given up")
                self._links.pace.give_way(deadline)
                self._reading.read(meta.key, name, start, view[start:stop], deadline)
            with self._holdings.changed:
                held = self._holdings.get(key)
                held.images[name].file = file
        finally:
            self._holdings.end_lending(key, name)


def share(meta: Meta, uuids: Sequence[str]) -> dict[str, list[str]]:
    """Which files each node is to have: its own, and those of nodes that are gone shared out.

    Nodes that are new come first, as they are there in the place of others; then who has least.
    """
    there = {node.member.uuid: node for node in meta.nodes}
    shares = {uuid: [f.name for f in there[uuid].files] if uuid in there else [] for uuid in uuids}
    sizes = {uuid: there[uuid].nbytes if uuid in there else 0 for uuid in uuids}
    new = [uuid for uuid in uuids if uuid not in there] or list(uuids)
    for node in meta.nodes:
        if node.member.uuid in shares:
            continue
        for file in sorted(node.files, key=lambda f: -f.nbytes):
            least = min(new, key=lambda uuid: sizes[uuid])
            shares[least].append(file.name)
            sizes[least] += file.nbytes
    return shares


def _runs(file: ImageFile) -> list[tuple[int, int]]:
    """A file as its header, and runs of whole chunks: these are decoded in place."""
    step = _CHUNKS * file.chunk_nbytes
    starts = [0, *range(file.data_start, file.nbytes, step)]
    return list(zip(starts, [*starts[1:], file.nbytes], strict=True))
