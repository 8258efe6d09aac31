"""What a node answers its peers: one method for each request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planaria.checkpoint.memory.follower import Follower
from planaria.checkpoint.memory.holdings import Holdings
from planaria.checkpoint.memory.images import view_file
from planaria.checkpoint.memory.leader import Leader
from planaria.checkpoint.memory.links import Links
from planaria.checkpoint.memory.memory import Key, Reply
from planaria.checkpoint.memory.mending import Mending
from planaria.checkpoint.memory.meta import Meta
from planaria.checkpoint.memory.parts import Parts
from planaria.core.byte_stream import Buffer
from planaria.errors import NotCommittedError, WireError

# What a peer may ask for at once.
_MOST_NBYTES = 1 << 28


class Service:
    """The requests of peers. Thread-safe; none waits for another node."""

    def __init__(
        self,
        links: Links,
        holdings: Holdings,
        leader: Leader,
        follower: Follower,
        mending: Mending,
    ) -> None:
        self._links = links
        self._holdings = holdings
        self._leader = leader
        self._follower = follower
        self._mending = mending
        self._parts = Parts(links, holdings)

    def serve(self, request: dict[str, Any], payloads: Sequence[Buffer]) -> Reply:
        """Answers a request of a peer.

        Raises:
            PlanariaError: What went wrong.
            KeyError, TypeError, ValueError: The request is malformed.
        """
        op = request["op"]
        if op == "holdings":
            held = self._holdings.all()
            return {"held": [[h.key.to_json(), int(h.state)] for h in held]}, ()
        answer = _OPERATIONS.get(op)
        if answer is None:
            raise WireError(f"unknown request {op!r}")
        return answer(self, Key.from_json(request["key"]), request, payloads)

    def _serve_sealed(self, key: Key, request: dict[str, Any], _: Sequence[Buffer]) -> Reply:
        now = self._follower.configured()
        self._leader.sealed(key, now.members, now.scheme, request)
        return {}, ()

    def _serve_prepared(self, key: Key, request: dict[str, Any], _: Sequence[Buffer]) -> Reply:
        self._leader.prepared(key, str(request["node"]))
        return {}, ()

    def _serve_failed(self, key: Key, request: dict[str, Any], _: Sequence[Buffer]) -> Reply:
        now = self._follower.configured()
        node, why = str(request["node"]), str(request["why"])
        self._leader.failed(key, now.members, now.scheme, node, why)
        return {}, ()

    def _serve_manifest(self, key: Key, _: dict[str, Any], payloads: Sequence[Buffer]) -> Reply:
        self._follower.have_manifest(key, bytes(payloads[0]))
        return {}, ()

    def _serve_exchange(
        self, key: Key, request: dict[str, Any], payloads: Sequence[Buffer]
    ) -> Reply:
        base = None if request["base"] is None else Key.from_json(request["base"])
        self._follower.exchange(key, Meta.from_bytes(bytes(payloads[0])), base)
        return {}, ()

    def _serve_commit(self, key: Key, request: dict[str, Any], _: Sequence[Buffer]) -> Reply:
        self._follower.commit(key, str(request["node"]))
        return {}, ()

    def _serve_complete(self, key: Key, request: dict[str, Any], _: Sequence[Buffer]) -> Reply:
        self._holdings.complete(key, str(request["why"]))
        return {}, ()

    def _serve_abort(self, key: Key, request: dict[str, Any], _: Sequence[Buffer]) -> Reply:
        self._follower.heed_abort(key, str(request["node"]), str(request["why"]))
        return {}, ()

    def _serve_outcome(self, key: Key, _: dict[str, Any], __: Sequence[Buffer]) -> Reply:
        outcome = self._holdings.outcome(key)
        if outcome is None:
            known = self._leader.running(key) or self._holdings.find(key) is not None
            state, why = ("open" if known else "unknown"), ""
        else:
            state = "complete" if outcome.complete else "committed"
            state, why = (state if outcome.committed else "failed"), outcome.why
        return {"state": state, "why": why, "members": self._follower.membership.uuids}, ()

    def _serve_describe(self, key: Key, _: dict[str, Any], __: Sequence[Buffer]) -> Reply:
        held = self._holdings.get(key)
        if held.meta is None or held.manifest is None:
            raise NotCommittedError(f"{key} is not prepared at node {self._links.uuid}")
        return {}, [held.meta.to_bytes(), held.manifest]

    def _serve_read(self, key: Key, request: dict[str, Any], _: Sequence[Buffer]) -> Reply:
        start, nbytes = int(request["start"]), int(request["nbytes"])
        if not 0 <= nbytes <= _MOST_NBYTES:
            raise WireError(f"{nbytes} bytes were asked for at once")
        name, memory = str(request["file"]), self._holdings.memory
        with self._holdings.pinned(self._holdings.now(key)) as held:
            found = view_file(memory, held, name, start, start + nbytes)
            if not self._holdings.refer(held):
                found = found.copy()
        return {}, [found.data]

    def _serve_fetch(self, key: Key, request: dict[str, Any], _: Sequence[Buffer]) -> Reply:
        start, stop = int(request["start"]), int(request["stop"])
        if not 0 <= stop - start <= _MOST_NBYTES:
            raise WireError(f"bytes {start} to {stop} were asked for at once")
        paced, check = bool(request.get("paced")), bool(request.get("check", True))
        found = self._parts.fetch(key, int(request["stripe"]), start, stop, paced, check)
        if paced:
            pace, yields = self._links.pace, bool(request.get("yields", True))
            pace.take(memoryview(found).nbytes, self._links.deadline(), yields=yields)
        return {}, [found]

    def _serve_store(self, key: Key, request: dict[str, Any], payloads: Sequence[Buffer]) -> Reply:
        checksums = [int(each) for each in request["checksums"]]
        stripe, first = int(request["stripe"]), int(request["first"])
        self._parts.store(key, stripe, first, checksums, payloads[0])
        self._follower.look(key)
        return {}, ()

    def _serve_mend(self, key: Key, request: dict[str, Any], payloads: Sequence[Buffer]) -> Reply:
        meta, manifest = Meta.from_bytes(bytes(payloads[0])), bytes(payloads[1])
        files = [str(name) for name in request["files"]]
        self._mending.take_again(key, meta, manifest, files, list(request["members"]))
        return {}, ()

    def _serve_compare(self, key: Key, request: dict[str, Any], _: Sequence[Buffer]) -> Reply:
        base = Key.from_json(request["base"])
        return {"changed": self._parts.compare(key, base, int(request["stripe"]))}, ()

    def _serve_keep(self, key: Key, request: dict[str, Any], _: Sequence[Buffer]) -> Reply:
        base = Key.from_json(request["base"])
        blocks = [[int(first), int(stop)] for first, stop in request["blocks"]]
        kept = self._parts.keep(key, base, int(request["stripe"]), blocks)
        self._follower.look(key)
        return {"kept": kept}, ()


_OPERATIONS = {
    name.removeprefix("_serve_"): method
    for name, method in vars(Service).items()
    if name.startswith("_serve_")
}
