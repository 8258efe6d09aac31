"""What of a job's snapshots in memory can be restored: the same on all ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from planaria.checkpoint.memory.memory import Key
from planaria.checkpoint.memory.meta import Snapshot
from planaria.checkpoint.memory.saving import MemorySink
from planaria.checkpoint.memory.storage import MemoryStorage, steps_of
from planaria.checkpoint.storage.root import Root
from planaria.core.collective import Ranks
from planaria.core.deadline import Deadline
from planaria.errors import PlanariaError, SaveFailedError

if TYPE_CHECKING:
    from planaria.checkpoint.restore import RestoreReport


@dataclass(frozen=True)
class MemorySteps:
    """The steps in memory.

    Attributes:
        root: They, as a checkpoint root; None where the memory tier is out of reach.
        steps: Their numbers, newest first, as rank 0 sees them.
        why: Why it is out of reach.
        exposed: Those of them of which a node was lost, so that they bear fewer further losses.
    """

    root: Root | None
    steps: list[int] = field(default_factory=list)
    why: str | None = None
    exposed: list[int] = field(default_factory=list)

    def close(self) -> None:
        """Ends the reading: nothing of the snapshots is used any more."""
        if self.root is not None and isinstance(self.root.storage, MemoryStorage):
            self.root.storage.close()

    def exposes(self, report: RestoreReport) -> bool:
        """Whether what was restored bears fewer losses than it was made for."""
        return report.tier == "memory" and report.step in self.exposed


def find_steps(sink: MemorySink, ranks: Ranks) -> MemorySteps:
    """Looks for snapshots; all ranks call it.

    Args:
        sink: This rank's memory tier; nothing is being captured.
        ranks: All of the job's.

    Raises:
        CollectiveError: Another rank is gone.
    """
    reports = ranks.all_gather(sink.report())
    try:
        sink.meet(reports, ranks)
    except SaveFailedError as error:  # on all ranks
        return MemorySteps(None, why=str(error))
    found: list[Snapshot] = []
    why: str | None = None
    client = sink.client
    assert client is not None  # it is in the report
    try:
        found = client.recoverable(Deadline(sink.timeout_s))
    except PlanariaError as error:
        why = str(error)
    listed, exposed, why = ranks.broadcast([
        [s.key.to_json() for s in steps_of(found)],
        [s.key.step for s in steps_of(found) if s.lost],
        why,
    ])  # fmt: skip
    # A rank that does not find what rank 0 has found says so when it is asked to read it.
    # Meanwhile the nodes may have made a copy of it, whole again: that is the same snapshot.
    mine = {s.key.original: s for s in reversed(found)}
    wanted = [Key.from_json(key).original for key in listed]
    snapshots = [mine[key] for key in wanted if key in mine]
    storage = MemoryStorage(client, snapshots, sink.timeout_s)
    return MemorySteps(Root(storage), [step for step, _ in listed], why, exposed)
