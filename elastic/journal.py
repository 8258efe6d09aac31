"""The record of a run, written by its lowest member and taken over when that one is gone."""

import os
import time
from collections.abc import Sequence

from planaria.elastic.membership.view import View
from planaria.elastic.record import Change, Commit, CommitLog
from planaria.elastic.vote import Decision


class Journal:
    """Writes down commits and changes of members where this member is the one to.

    Args:
        path: The file, which all members can reach.
        seed: The run's seed.
    """

    def __init__(self, path: str | os.PathLike[str], seed: int) -> None:
        self._path, self._seed = path, seed
        self._log: CommitLog | None = None
        self._last: Commit | None = None

    def note_change(self, view: View, members: Sequence[int], step: int, certificate: str) -> None:
        """Notes a generation, or that members in it have got blocks."""
        if not self._writes(view, members):
            return
        assert self._log is not None
        if self._last is not None and self._last.step <= step:
            self._log.append(self._last)  # the writer before may have died over it
        last = self._log.change
        if last is not None and (last.generation, last.members) == (view.generation, view.members):
            return  # members that joined have got their blocks: the view is the same
        self._log.append(
            Change(view.generation, view.members, step, view.joined, view.lost,
                   certificate=certificate, time=time.time())
        )  # fmt: skip

    def remember(self, decision: Decision) -> None:
        """Takes note of a step that was committed; every member does."""
        loss = decision.metrics.get("loss")
        votes = {
            str(member): {"micro_batches": computed}
            for member, computed in zip(decision.members, decision.micro_batches, strict=True)
        }
        self._last = Commit(
            step=decision.step + 1,
            generation=decision.generation,
            members=tuple(decision.members),
            position=decision.step + 1,
            rng=(self._seed, decision.step),
            loss=None if loss is None else loss.hex(),
            votes=votes,
            time=time.time(),
        )

    def note_commit(self, view: View, members: Sequence[int]) -> None:
        """Writes down what was remembered last."""
        if self._last is not None and self._writes(view, members):
            assert self._log is not None
            self._log.append(self._last)

    def close(self) -> None:
        """Ends the file, if this member writes it."""
        log, self._log = self._log, None
        if log is not None:
            log.sync()
            log.close()

    def _writes(self, view: View, members: Sequence[int]) -> bool:
        if not members or members[0] != view.me:
            self.close()
            return False
        if self._log is None:
            self._log = CommitLog(self._path)
        return True
