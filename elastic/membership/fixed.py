"""Jobs whose members never change: one process, or those of a launcher without our agent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from planaria.core.deadline import Deadline
from planaria.elastic.membership.quorum import differences
from planaria.elastic.membership.view import Standing, View
from planaria.errors import CollectiveError, ConfigError

if TYPE_CHECKING:
    from torch.distributed import Store


class _Unchanging:
    """What both have in common: nobody comes, and nobody who goes is missed."""

    id = 0

    def change_wanted(self) -> str | None:
        """Nothing ever."""
        return None

    def gone(self) -> frozenset[int]:
        """Nobody: nobody could prove it."""
        return frozenset()

    def disturbed(self) -> bool:
        """Never: errors of collectives alone tell of losses."""
        return False

    def on_loss(self, call: Callable[[frozenset[int]], object]) -> None:
        """Does nothing: losses show as errors of collectives alone."""

    def progress(self, step: int, phase: str) -> None:
        """Does nothing."""

    def leave(self, reason: str, deadline: Deadline) -> None:
        """Does nothing."""

    def finish(self, deadline: Deadline, *, complete: bool = False) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class Alone(_Unchanging):
    """The membership of a job of one process."""

    def __init__(self) -> None:
        self._store: Store | None = None

    def join(self, facts: Mapping[str, Any], deadline: Deadline) -> View:
        """The first and only generation."""
        return View(1, (0,), 0)

    def regroup(self, standing: Standing, deadline: Deadline) -> View:
        """The same again: there is nobody to agree with."""
        return View(standing.generation + 1, (0,), 0, step=standing.committed)

    def store(self, view: View, name: str = "") -> Store:
        """A store in this process's memory."""
        from torch.distributed import HashStore, PrefixStore

        if self._store is None:
            self._store = HashStore()
        return PrefixStore(f"gen{view.generation}/{name}", self._store)


class FixedMembership(_Unchanging):
    """The membership of a job that torchrun, SLURM or the like has started.

    A lost rank ends it, and the launcher starts all ranks again.

    Args:
        rank: This rank, of torch's environment.
        world_size: Number of ranks.
        host: Where the launcher's store, or rank 0's, is.
        port: Its port.
        hosts_store: Whether this rank has to host it.
        attempt: How often the ranks were started before; a store that outlives them keeps keys.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        host: str,
        port: int,
        *,
        hosts_store: bool = False,
        attempt: int = 0,
    ) -> None:
        self.id = rank
        self._view = View(1, tuple(range(world_size)), rank, store=(host, port))
        self._hosts = hosts_store
        self._attempt = attempt
        self._store: Store | None = None

    def join(self, facts: Mapping[str, Any], deadline: Deadline) -> View:
        """Checks that all ranks have the same facts as rank 0.

        Raises:
            ConfigError: This rank's facts differ; it lists the differences.
            CollectiveError: The store does not answer.
            DeadlineError: Rank 0 did not turn up.
        """
        import json

        store = self.store(self._view, "facts")
        try:
            if self.id == 0:
                store.set("facts", json.dumps(dict(facts)))
            store.wait(["facts"], timedelta(seconds=max(deadline.remaining(), 0.001)))
            reference = json.loads(store.get("facts"))
        except RuntimeError as error:
            if deadline.expired:
                raise deadline.error("rank 0 to say what has to be equal on all") from error
            raise CollectiveError(f"the launcher's store failed: {error}") from error
        wrong = differences(reference, json.loads(json.dumps(dict(facts))))
        if wrong:
            raise ConfigError(f"rank {self.id} differs from rank 0: {'; '.join(wrong)}")
        return self._view

    def regroup(self, standing: Standing, deadline: Deadline) -> View:
        """Cannot be done.

        Raises:
            CollectiveError: Always.
        """
        raise CollectiveError(
            f"restart: rank {self.id} lost others ({standing.reason or 'unknown reason'}), and "
            "whatever started it cannot go on with those left; `planaria run` can"
        )

    def store(self, view: View, name: str = "") -> Store:
        """A store that all ranks share.

        Raises:
            CollectiveError: It does not answer.
        """
        from torch.distributed import DistError, PrefixStore, TCPStore

        host, port = view.store
        if self._store is None:
            try:
                self._store = TCPStore(
                    host, port, is_master=self._hosts, wait_for_workers=False,
                    timeout=timedelta(seconds=300),
                )  # fmt: skip
            except (DistError, RuntimeError) as error:
                raise CollectiveError(
                    f"the store at {host}:{port} does not answer ({str(error).splitlines()[0]})"
                ) from error
        return PrefixStore(f"planaria/{self._attempt}/gen{view.generation}/{name}", self._store)
