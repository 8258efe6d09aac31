"""A rank's own boxes at the last versions: one dense copy, and what changed from each to the next.

The dense copy is in the rollout's format. For each version that a receiver may still be at, the
positions of what changed since and the bits before are kept; so any of these versions can be had
back, block by block, and the changes between any two of them, in time and memory in proportion to
the changes. An old version is let go of when no receiver needs it: the base of what a receiver is
sent is always a version that it has acknowledged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from planaria.errors import NotCommittedError
from planaria.rl_sync.diff.scan import Bits, Changes, gather, no_changes, scatter


class Undo(NamedTuple):
    """Where a block changed and what was there before."""

    pos: np.ndarray
    old: np.ndarray


class History:
    """The blocks that one rank owns, at all versions that are kept. Not safe for threads."""

    def __init__(self) -> None:
        self._now: dict[int, Bits] = {}
        self._steps: dict[int, tuple[int, dict[int, Undo]]] = {}  # version -> base and its undo
        self.version: int | None = None

    def begin(self, version: int, blocks: Mapping[int, Bits]) -> None:
        """Forgets everything; these are the blocks at a version."""
        self._now = dict(blocks)
        self._steps.clear()
        self.version = version

    def commit(self, version: int, changes: Mapping[int, Changes]) -> None:
        """Moves to the next version by changes of the newest one."""
        assert self.version is not None  # begin() comes first
        undo = {i: Undo(c.pos, c.old) for i, c in changes.items() if c.size}
        for i, c in changes.items():
            scatter(self._now[i], c.pos, c.new)
        self._steps[version] = (self.version, undo)
        self.version = version

    def versions(self) -> list[int]:
        """All versions that can be had, the oldest first."""
        if self.version is None:
            return []
        return [*(base for base, _ in self._steps.values()), self.version]

    @property
    def nbytes(self) -> int:
        """Bytes that the past takes, without the dense copy."""
        return sum(
            u.pos.nbytes + u.old.nbytes for _, step in self._steps.values() for u in step.values()
        )

    def newest(self, block: int) -> Bits:
        """The bits of a block at the newest version; not to be changed."""
        return self._now[block]

    def at(self, block: int, version: int) -> Bits:
        """The bits of a block at a version; not to be changed.

        Raises:
            NotCommittedError: The version is not kept.
        """
        steps = [u[block] for u in self._since(version) if block in u]
        if not steps:
            return self._now[block]
        bits = self._now[block].copy()
        for undo in reversed(steps):
            scatter(bits, undo.pos, undo.old)
        return bits

    def between(self, block: int, base: int, version: int) -> Changes:
        """What changed in a block from one version to a later one, several steps in one.

        Raises:
            NotCommittedError: One of them is not kept.
        """
        after = self._since(version)
        steps = [u[block] for u in self._since(base)[: -len(after) or None] if block in u]
        later = [u[block] for u in after if block in u]
        now = self._now[block]
        if not steps:
            return no_changes(now.itemsize)
        # Stable, and the oldest step first: of several olds the first is the one at the base.
        pos, first = np.unique(np.concatenate([u.pos for u in steps]), return_index=True)
        old = np.concatenate([u.old for u in steps])[first]
        new = np.empty_like(old)
        gather(now, pos, new)
        for undo in reversed(later):
            found = np.searchsorted(pos, undo.pos)
            inside = found < pos.size
            hit = inside & (pos[np.minimum(found, pos.size - 1)] == undo.pos)
            new[found[hit]] = undo.old[hit]
        real = old != new
        return Changes(pos[real].astype(np.uint32), old[real], new[real])

    def forget(self, needed: Iterable[int], keep: int, max_bytes: int) -> None:
        """Lets go of old versions.

        Args:
            needed: Versions that receivers have acknowledged last.
            keep: So many versions before the newest are kept anyway.
            max_bytes: More than this is not kept even if it is needed.
        """
        oldest = min(needed, default=self.version)
        while self._steps:
            version, (base, _) = next(iter(self._steps.items()))
            wanted = (oldest is not None and base >= oldest) or len(self._steps) <= keep
            if wanted and self.nbytes <= max_bytes:
                return
            del self._steps[version]

    def _since(self, version: int) -> list[dict[int, Undo]]:
        """The undo of each step after a version, the oldest first."""
        if version == self.version:
            return []
        found = [undo for base, undo in self._steps.values() if base >= version]
        if version not in (base for base, _ in self._steps.values()):
            raise NotCommittedError(f"weights of version {version} are not kept any more")
        return found
