"""The memory side of a save: captured into the node's snapshot process, sealed, described.

Captures and membership belong to the pipeline's capturing thread; a thread of its own does the
rest, so that a snapshot does not wait for the writing of an older checkpoint. The durable writer
may still be reading from an image then: it is held until it was let go.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from planaria import telemetry
from planaria.checkpoint import points
from planaria.checkpoint.failures import Failures
from planaria.checkpoint.format.checksum import checksum
from planaria.checkpoint.format.manifest import FileInfo
from planaria.checkpoint.handle import SaveHandle
from planaria.checkpoint.memory.buffers import ImageBuffers
from planaria.checkpoint.memory.client import NodeClient
from planaria.checkpoint.memory.memory import Key, Member
from planaria.checkpoint.memory.process import Options
from planaria.checkpoint.memory.save import MemorySave
from planaria.checkpoint.memory.starting import connect_or_start
from planaria.checkpoint.memory.tier import MemoryTier
from planaria.checkpoint.records import failures, make_manifest, make_record
from planaria.checkpoint.save_job import SaveJob
from planaria.core.collective import Ranks
from planaria.core.deadline import Deadline
from planaria.core.points import point
from planaria.errors import CollectiveError, PlanariaError, SaveFailedError, WireError

#: How long the snapshot process may take to show that it is there.
_PING_S = 10.0
_PAUSE_S = (0.0, 1.0, 5.0, 30.0)


def open_memory(
    tier: MemoryTier | None,
    root_id: str,
    root: str,
    ranks: Ranks | None,
    failures: Failures,
) -> MemorySink | None:
    """Makes the memory side of a checkpointer; all ranks do, or none.

    Args:
        tier: What the user asked for; None for nothing.
        root_id: Name of the checkpoint root, the same on all ranks.
        root: Its path or URL.
        ranks: A group of its own of the job's ranks.
        failures: Is told how snapshots end.

    Raises:
        ConfigError: The tier cannot be had like that.
    """
    if tier is None:
        return None
    assert ranks is not None
    sink: MemorySink

    def note(save: MemorySave) -> None:
        error = None if save.handle._reported else save.handle.error
        if error is None or not sink.given_up:
            failures.of_memory(save.handle.step, error)

    sink = MemorySink(tier, tier.options(root_id, root), ranks, note)
    return sink


class MemorySink:
    """Takes a checkpointer's snapshots in memory.

    Args:
        tier: What the user asked for.
        options: What this node's snapshot process is like.
        ranks: Group that the thread uses.
        on_done: Called with each snapshot that has ended, from the thread.

    Attributes:
        last: The newest snapshot that was begun.
        given_up: Whether the job's ranks have changed, and what was under way counts for nothing.
    """

    def __init__(
        self,
        tier: MemoryTier,
        options: Options,
        ranks: Ranks,
        on_done: Callable[[MemorySave], None],
    ) -> None:
        self._tier, self._options, self._ranks, self._on_done = tier, options, ranks, on_done
        self.last: SaveHandle | None = None
        self.given_up = False
        self._client: NodeClient | None = None
        self._members: list[Member] | None = None
        self._lost: Exception | None = None
        self._failed, self._again_at = 0, 0.0
        self._jobs: queue.SimpleQueue[SaveJob | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="planaria-memory", daemon=True)
        self._thread.start()

    @property
    def timeout_s(self) -> float:
        """Budget of each phase, in seconds."""
        return self._tier.timeout_s

    @property
    def client(self) -> NodeClient | None:
        """This node, if it could be reached last time."""
        return self._client

    def due(self, step: int) -> bool:
        """Whether a snapshot is due at a step."""
        begun = self.last is not None and self.last.step == step
        return step % self._tier.every == 0 and not begun

    # Who takes part: the capturing thread, or the main one while nothing is captured.

    def report(self) -> dict[str, Any]:
        """What this rank tells the others of its node."""
        try:
            member = self._reach().member.to_json()
            return {"member": member, "knows": self._members is not None}
        except (PlanariaError, OSError) as error:
            return {"error": str(error) or repr(error)}

    def meet(self, reports: Sequence[dict[str, Any]], ranks: Ranks) -> None:
        """Tells the nodes of each other, if that has changed. All ranks call it alike.

        Args:
            reports: Of all ranks, in their order.
            ranks: To make sure that all nodes were told.

        Raises:
            SaveFailedError: A node has no snapshot process, or could not be told.
            CollectiveError: Another rank is gone.
        """
        for rank, report in enumerate(reports):
            if "error" in report:
                raise SaveFailedError(f"rank {rank}: {report['error']}")
        members = [Member.from_json(report["member"]) for report in reports]
        if members == self._members and all(report["knows"] for report in reports):
            return
        self._members = None
        mine = members[ranks.rank]
        distinct = list({member.uuid: member for member in members}.values())
        error: Exception | None = None
        # One rank of each node tells it, and none begins before all are told.
        if members.index(mine) == ranks.rank:
            try:
                assert self._client is not None  # it is in the report
                self._client.settle(Deadline(self._tier.timeout_s))
                files = sum(member.uuid == mine.uuid for member in members)
                self._client.configure(distinct, self._tier.scheme, files)
            except PlanariaError as e:
                error = e
        outcomes = ranks.all_gather(None if error is None else str(error) or repr(error))
        failed = [(r, outcome) for r, outcome in enumerate(outcomes) if outcome is not None]
        if failed:
            raise SaveFailedError(f"rank {failed[0][0]}: {failed[0][1]}") from error
        self._members = members
        telemetry.event("memory.members", nodes=len(distinct))

    def _reach(self) -> NodeClient:
        """This node's snapshot process, which is started if need be."""
        if self._client is not None:
            try:
                self._client.status(_PING_S)
                return self._client
            except PlanariaError:
                self._drop()
        if time.monotonic() < self._again_at:
            raise WireError("the snapshot process could not be reached; it is tried again later")
        name = f"rank {self._ranks.rank}"
        try:
            within = Deadline(self._tier.timeout_s)
            self._client = connect_or_start(self._options, name, within)
        except (PlanariaError, OSError):
            # Not at each step: training goes on meanwhile.
            self._again_at = time.monotonic() + _PAUSE_S[min(self._failed, len(_PAUSE_S) - 1)]
            self._failed += 1
            raise
        self._failed = 0
        return self._client

    def _drop(self) -> None:
        client, self._client, self._members = self._client, None, None
        if client is not None:
            client.close()

    # Capturing thread

    def begin(self, job: SaveJob, save: MemorySave) -> ImageBuffers | None:
        """Finds memory for this rank's image; None, with an error in the save, if there is none."""
        assert job.own is not None
        assert self._client is not None
        save.client = self._client
        header = job.own.header.render(job.step)
        save.key = Key(job.step, job.attempt)
        save.file = f"rank-{self._ranks.rank:05d}-{job.attempt}.safetensors"
        save.header_nbytes = len(header)
        try:
            with telemetry.span("memory.begin", step=job.step):
                nbytes = len(header) + job.own.nbytes
                within = Deadline(self._tier.timeout_s)
                image = self._client.begin(save.key, save.file, nbytes, within, hold=job.durable)
            point(points.SNAPSHOT_BEGIN, step=job.step)
            image[: len(header)] = np.frombuffer(header, np.uint8)
        except (PlanariaError, OSError) as error:
            save.fail(error)
            return None
        save.image = image
        return ImageBuffers(image, len(header), job.own.chunk_nbytes)

    def submit(self, job: SaveJob) -> None:
        """Queues a snapshot whose capture begins."""
        self._jobs.put(job)

    def persists(self, job: SaveJob) -> bool:
        """Whether the nodes write the step; waits until that is known. The same on all ranks."""
        save = job.memory
        if save is None or not save.by_nodes or save.image is None:
            return False
        Deadline(5 * self._tier.timeout_s).wait(save.handle._done, f"the snapshot of {save.key}")
        return save.described

    def wait_persisted(self, save: MemorySave, deadline: Deadline) -> None:
        """Returns, on rank 0, once the nodes have written and committed the step.

        Raises:
            SaveFailedError: They have not.
        """
        assert save.client is not None
        assert save.key is not None
        save.client.persisted(save.key, deadline)

    def let_go(self, save: MemorySave) -> None:
        """The durable writer does not need the image any more."""
        if save.image is not None and save.key is not None and save.client is not None:
            with contextlib.suppress(PlanariaError):
                save.client.let_go(save.key)

    # Its own thread

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            save = job.memory
            assert save is not None
            save.captured.wait()
            try:
                with telemetry.span("memory.commit", step=job.step) as span:
                    if job.agreed and save.error is not None:
                        raise save.error
                    self._commit(job, save)
                    span.set(bytes=job.handle.nbytes)
            except Exception as error:  # reported through the handle
                save.fail(error)
                if isinstance(error, CollectiveError) and self._lost is None:
                    # Whoever waits for this rank elsewhere must not wait for the whole timeout.
                    self._lost = error
                    self._ranks.close()
                self._give_up(save, error)
            error = save.error
            if error is not None and not isinstance(error, PlanariaError):
                error = SaveFailedError(f"step {job.step} is not in memory: {error!r}")
            save.handle._finish(error, first=lambda save=save: self._on_done(save))

    def _give_up(self, save: MemorySave, error: Exception) -> None:
        if save.key is None or save.client is None:
            return
        with contextlib.suppress(PlanariaError):
            save.client.abort(save.key, str(error) or repr(error))
        with contextlib.suppress(PlanariaError):  # also where it gave up waiting for its memory
            save.client.leave(save.key, save.file)

    def _commit(self, job: SaveJob, save: MemorySave) -> None:
        """Seals this rank's image; rank 0 describes the snapshot; the nodes do the rest."""
        info: FileInfo | None = None
        try:
            if save.error is None:
                info = self._seal(job, save)
        except Exception as error:  # told to rank 0, who waits
            save.fail(error)
        if self._lost is not None:
            raise self._lost
        outcome: str | None = None
        records = self._ranks.gather(make_record(job, info, save.error))
        if records is not None:
            outcome = self._describe(job, save, records)
        outcome = self._ranks.broadcast(outcome)
        save.described = outcome is None
        if outcome is not None:
            raise SaveFailedError(f"step {job.step} is not in memory: {outcome}") from save.error
        assert save.client is not None
        assert save.key is not None
        save.client.wait(save.key, Deadline(2 * self._tier.timeout_s))
        point(points.SNAPSHOT_END, step=job.step)

    def _seal(self, job: SaveJob, save: MemorySave) -> FileInfo | None:
        assert job.own is not None
        assert save.client is not None
        assert save.key is not None
        assert save.image is not None
        chunk_nbytes = job.own.chunk_nbytes
        point(points.SNAPSHOT_CAPTURED, step=job.step)
        header = checksum(save.image[: save.header_nbytes])
        save.client.seal(save.key, save.file, save.sums, chunk_nbytes, save.header_nbytes)
        point(points.SNAPSHOT_SEALED, step=job.step)
        if not job.own.entries:  # nothing that a manifest would mention
            return None
        return FileInfo(
            save.file, save.header_nbytes, job.own.nbytes, chunk_nbytes, header, save.sums
        )

    def _describe(
        self, job: SaveJob, save: MemorySave, records: Sequence[dict[str, Any]]
    ) -> str | None:
        """Gives the snapshot its manifest; returns why not."""
        try:
            failed = failures(job, records)
            if failed:
                return f"rank {failed[0][0]}: {failed[0][1]}"
            assert save.client is not None
            assert save.key is not None
            manifest = make_manifest(job, records).to_bytes()
            point(points.SNAPSHOT_DESCRIBE, step=job.step)
            within = Deadline(self._tier.timeout_s)
            save.client.describe(save.key, manifest, within, persist=save.persist)
            point(points.SNAPSHOT_DESCRIBED, step=job.step)
        except Exception as error:  # told to all ranks
            return str(error) or repr(error)
        return None

    def give_up(self) -> None:
        """From any thread: whatever waits for ranks or for the snapshot process ends with an error.

        What this rank has begun and not completed is dropped by its process, with its session.
        """
        self.given_up = True
        self._ranks.abandon()
        if self._client is not None:
            self._client.close()

    def close(self, timeout_s: float, *, part: bool) -> bool:
        """Ends the thread once the queued snapshots are through; False if it did not end.

        Args:
            timeout_s: How long to wait.
            part: Whether the job ends: its snapshot processes do, too, then.
        """
        self._jobs.put(None)
        self._thread.join(timeout_s)
        if self._client is not None:
            self._client.close(part=part)
        ended = not self._thread.is_alive()
        if ended:
            self._ranks.close()
        return ended
