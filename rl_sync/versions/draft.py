"""What of a version is ready while the rest is still being looked for and encoded.

Receivers that stand at its base may read such pieces and decode them, so that encoding, the way and
decoding go on side by side. A piece says nothing that counts: what is applied, and whether at all,
is said by the version's signed manifest, which names the hash of everything.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from planaria.core.deadline import Deadline
from planaria.rl_sync.layout.table import BlockTable
from planaria.rl_sync.transports.feed import Ahead, Piece
from planaria.rl_sync.versions.encoding import Encoded


@dataclass
class _Draft:
    base: int
    digest: tuple[str, ...]
    name: str = field(default_factory=lambda: secrets.token_hex(8))
    parts: list[Encoded] = field(default_factory=list)
    ended: bool = False


class Drafts:
    """The version that is being made, and the last one that was. Safe for threads."""

    def __init__(
        self, table: BlockTable, changed: threading.Condition, newest: Callable[[], int | None]
    ) -> None:
        """Sets it up.

        Args:
            table: What versions are made of.
            changed: Notified with every new version, too.
            newest: The newest version's number; called with `changed` held.
        """
        self._table, self._changed, self._newest = table, changed, newest
        self._draft: _Draft | None = None

    def begin(self, base: int, digest: tuple[str, ...]) -> None:
        """Begins a version on a base with this digest by shard."""
        with self._changed:
            self._draft = _Draft(base, digest)
            self._changed.notify_all()

    def add(self, part: Encoded) -> None:
        """Some of its blocks are ready."""
        with self._changed:
            if self._draft is not None and not self._draft.ended:
                self._draft.parts.append(part)
                self._changed.notify_all()

    def end(self) -> None:
        """Nothing more of it comes; it was published or given up."""
        with self._changed:
            if self._draft is not None:
                self._draft.ended = True
                self._changed.notify_all()

    def ahead(
        self, have: tuple[int, str], shard: int, seen: tuple[str, int] | None, waiting: Deadline
    ) -> Ahead:
        """See `Feed.ahead`."""
        started = time.monotonic()
        with self._changed:
            self._changed.wait_for(
                lambda: self._found(have, shard, seen) is not None, timeout=waiting.timeout()
            )
            found = self._found(have, shard, seen)
        if found is None:
            return Ahead(None, over=False)
        if isinstance(found, bool):
            return Ahead(None, over=True)
        draft, number = found
        piece = self._piece(draft, number, shard)
        return Ahead(piece, over=False, waited=time.monotonic() - started)

    def _found(
        self, have: tuple[int, str], shard: int, seen: tuple[str, int] | None
    ) -> tuple[_Draft, int] | bool | None:
        """The next piece; False if none comes, None if one may come."""
        draft, newest = self._draft, self._newest()
        if draft is not None and draft.base == have[0]:
            if not 0 <= shard < len(draft.digest) or draft.digest[shard] != have[1]:
                return False
            number = seen[1] if seen is not None and seen[0] == draft.name else 0
            given_up = draft.ended and newest == have[0]  # then another one may begin
            if number < len(draft.parts) and not given_up:
                return draft, number
            if not draft.ended:
                return None
        return None if newest == have[0] else False

    def _piece(self, draft: _Draft, number: int, shard: int) -> Piece:
        part = draft.parts[number]
        places = [
            i for i, e in enumerate(part.entries)
            if shard in self._table.blocks[e.block].audience
        ]  # fmt: skip
        used = sorted({part.entries[i].model for i in places} - {-1})
        renumbered = {-1: -1} | {old: new for new, old in enumerate(used)}
        return Piece(
            draft.name,
            number,
            tuple(part.models[m] for m in used),
            tuple(part.entries[i].with_model(renumbered[part.entries[i].model]) for i in places),
            tuple(part.payloads[i] for i in places),
        )
