"""The background of a save: agree, capture, write, commit. One thread captures, one writes.

A capture of the next step may run while the last one is still being written; each thread works in
the order of the calls and uses a process group of its own, so ranks always meet in the same order.
"""

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from planaria import telemetry
from planaria.checkpoint import points
from planaria.checkpoint.agree import Agreement
from planaria.checkpoint.capture.copying import ChunkCopier
from planaria.checkpoint.capture.packing import Packer
from planaria.checkpoint.capture.pool import BufferPool
from planaria.checkpoint.format.manifest import FileInfo, Manifest
from planaria.checkpoint.persist import Persister
from planaria.checkpoint.policies import KeepPolicy
from planaria.checkpoint.records import failures, make_manifest, make_record
from planaria.checkpoint.retention import Retention, remove_old
from planaria.checkpoint.save_job import SaveJob
from planaria.checkpoint.steps_in_use import StepsInUse
from planaria.checkpoint.storage.lock import RootLock
from planaria.checkpoint.storage.root import Root, step_folder
from planaria.checkpoint.unchanged import Unchanged, check_referenced, wasteful
from planaria.core.collective import Ranks
from planaria.core.deadline import Deadline
from planaria.core.points import point
from planaria.errors import CollectiveError, PlanariaError, SaveFailedError, StorageError

if TYPE_CHECKING:
    from planaria.checkpoint.memory.saving import MemorySink


class Pipeline:
    """Background threads of one checkpointer.

    Args:
        root: Where steps are committed.
        lock: Held by rank 0, None elsewhere.
        capture_ranks: Group that the capturing thread uses.
        commit_ranks: Group that the writing thread uses.
        pool: Memory to capture into.
        keep: What to keep, None for everything.
        dedup: Whether what has not changed is referred to.
        retries: How often a failed write is tried again.
        timeout_s: Longest wait for a buffer.
        steps: Which steps are in use.
        holds_back: Whether a save that ends because a rank is gone is not told of: it stays in
            `unknown`, until those that are left have found out how it ended.
        memory: Takes snapshots in memory.
        rewound_to: Given what is about to be committed, on rank 0, returns the step that was
            restored since the last commit, if any.
        on_done: Called with each job that has ended, from the writing thread.

    Attributes:
        unknown: Saves that were held back.
    """

    def __init__(
        self,
        root: Root,
        lock: RootLock | None,
        capture_ranks: Ranks,
        commit_ranks: Ranks,
        pool: BufferPool,
        *,
        keep: KeepPolicy | None,
        dedup: bool,
        retries: int,
        timeout_s: float,
        steps: StepsInUse,
        holds_back: bool,
        memory: "MemorySink | None",
        rewound_to: Callable[[Manifest], int | None],
        on_done: Callable[[SaveJob], None],
    ) -> None:
        self._root, self._lock, self._pool = root, lock, pool
        self._capture_ranks, self._commit_ranks = capture_ranks, commit_ranks
        self._keep, self._timeout_s = None if keep is None else Retention(root, keep), timeout_s
        self._persister = Persister(root, commit_ranks.rank, retries)
        self._memory = memory
        self._rewound_to, self._on_done = rewound_to, on_done
        self._to_capture: queue.SimpleQueue[SaveJob | None] = queue.SimpleQueue()
        self._to_write: queue.SimpleQueue[SaveJob | None] = queue.SimpleQueue()
        self._lost: Exception | None = None
        self._given_up = False
        self._holds_back = holds_back
        self.unknown: list[SaveJob] = []
        self.steps = steps
        self.unchanged = Unchanged(self.steps) if dedup else None
        self._agree = Agreement(capture_ranks, pool, self.steps, self.unchanged, memory, self._meet)
        self._threads = [
            threading.Thread(target=self._run, args=args, name=f"planaria-{name}", daemon=True)
            for name, args in (
                ("capture", (self._to_capture, self._capture)),
                ("write", (self._to_write, self._write)),
            )
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: SaveJob) -> None:
        """Queues a save."""
        if job.durable:
            self.steps.begin(job.step)
        self._to_capture.put(job)

    def restored(self, step: int | None) -> None:
        """The run goes on from a step of the root, which saves may refer to; None for elsewhere."""
        if self.unchanged is not None:
            self.unchanged.forget()
            if step is not None:
                with contextlib.suppress(StorageError, OSError):  # gone or damaged since
                    self.unchanged.restored(self._root.manifest(step))

    def give_up(self) -> None:
        """From any thread, once both groups were abandoned: nothing more is captured or committed.

        A commit that rank 0 has begun, knowing that all data is durable, is carried through.
        """
        self._lost = self._lost or CollectiveError(
            "it was given up, because the job's ranks change"
        )
        self._given_up = True

    def close(self, timeout_s: float) -> bool:
        """Ends the threads once the queued saves are through; False if they did not end."""
        self._to_capture.put(None)
        deadline = Deadline(timeout_s)
        for thread in self._threads:
            thread.join(deadline.timeout())
        return not any(thread.is_alive() for thread in self._threads)

    def _run(
        self, jobs: "queue.SimpleQueue[SaveJob | None]", work: Callable[[SaveJob], None]
    ) -> None:
        while (job := jobs.get()) is not None:
            work(job)
        if jobs is self._to_capture:
            self._to_write.put(None)

    # Capturing thread

    def _capture(self, job: SaveJob) -> None:
        job.settle()
        if job.durable:
            self._to_write.put(job)
        if self._memory is not None and job.memory is not None:
            self._memory.submit(job)
        job.buffers = self._pool
        error: Exception | None = None
        try:
            if self._lost is not None:
                job.agreed = True
                raise self._lost
            base = self._agree(job, Deadline(self._timeout_s))
            if self.unchanged is not None:
                assert job.own is not None
                job.packer = Packer(
                    job.own.entries,
                    job.entries,
                    self.unchanged.places(base),
                    self._pool,
                    job.ready,
                    self._timeout_s,
                    job.audit,
                )
            wanted = job.durable
            if self._memory is not None and job.memory is not None and job.memory.error is None:
                job.buffers = self._memory.begin(job, job.memory) or self._pool
                wanted = wanted or job.memory.error is None
            job.planned.set()
            if wanted:
                with telemetry.span("checkpoint.capture", step=job.step):
                    self._copy(job)
        except Exception as e:  # reported through the handle
            error, job.error = e, job.error or e
        finally:
            job.planned.set()
            job.chunks.end()
            if job.memory is not None:
                if error is not None:
                    job.memory.fail(error)
                job.memory.captured.set()
            job.let_go()
            job.handle._captured.set()

    def _meet(self, job: SaveJob, collective: Callable[[Any], Any], value: Any) -> Any:
        try:
            return collective(value)
        except CollectiveError as error:
            # Whoever waits for this rank elsewhere must not wait for the whole timeout.
            self._lost = error
            job.agreed = True
            raise

    def _copy(self, job: SaveJob) -> None:
        point(points.CAPTURE_BEGIN, step=job.step)
        assert job.own is not None
        assert job.buffers is not None
        copier = job.packer or ChunkCopier(
            job.own.sources(job.entries),
            job.own.chunks,
            job.buffers,
            job.ready,
            self._timeout_s,
            job.audit,
        )

        def before_each() -> None:
            if self._given_up:
                assert self._lost is not None
                raise self._lost
            point(points.CAPTURE_CHUNK, step=job.step)

        for chunk in copier.chunks(before_each):
            if job.memory is not None:
                job.memory.sums.append(chunk.checksum)
            if job.durable:
                job.chunks.put(chunk)
        job.handle.nan_names = sorted(copier.nan_names)
        if job.packer is not None:
            job.handle.nbytes = job.packer.nbytes
            job.handle.referenced_nbytes = job.packer.referenced_nbytes
        point(points.CAPTURE_AUDIT, step=job.step)
        if job.audit is not None:
            job.audit.check()
            job.audit.prepare_next()
        point(points.CAPTURE_END, step=job.step)

    # Writing thread

    def _write(self, job: SaveJob) -> None:
        with telemetry.span("checkpoint.persist", step=job.step) as span:
            file: FileInfo | None = None
            by_nodes = False
            try:
                job.planned.wait()
                by_nodes = self._written_by_nodes(job)
                if job.error is None and not by_nodes:
                    assert job.own is not None
                    assert job.buffers is not None
                    file = self._persister.write(
                        job.step,
                        job.attempt,
                        job.own,
                        job.chunks,
                        job.buffers,
                        lambda: job.error or (self._lost if self._given_up else None),
                        job.packer,
                    )
            except Exception as error:  # reported through the handle
                job.error = job.error or error
            finally:
                self._drain(job)
            try:
                if job.agreed and job.error is not None:
                    raise job.error
                if by_nodes:
                    self.steps.committed(job.step)
                else:
                    self._commit(job, file)
            except Exception as error:  # reported through the handle
                job.error = error
                if self._lost is not None:
                    self._commit_ranks.close()
            span.set(bytes=job.handle.nbytes, ok=job.error is None)
        if self._memory is not None and job.memory is not None:
            self._memory.let_go(job.memory)
        error = job.error
        if error is not None and not isinstance(error, PlanariaError):
            error = SaveFailedError(f"step {job.step} was not committed: {error!r}")
        if error is None:
            telemetry.count("checkpoint.bytes", job.handle.nbytes, step=job.step)
            if (saved := job.handle.referenced_nbytes) > 0:
                telemetry.count("checkpoint.referenced_bytes", saved, step=job.step)
        if job.base is not None:
            self.steps.let_go(job.base.step)
        if error is not None:
            self.steps.end(job.step)
        holds_back = self._holds_back or self._given_up
        if error is not None and self._lost is not None and holds_back:
            self.unknown.append(job)
        else:
            job.handle._finish(error, first=lambda: self._on_done(job))
        if error is not None:
            return
        if self._lock is not None:
            remove_old(self._root, self._lock, self.steps, self._keep, job.step)
        self.steps.cleared(job.step)

    def _drain(self, job: SaveJob) -> None:
        """Gives back the buffers of a save that is written, or will not be."""
        while taken := job.chunks.take():
            assert job.buffers is not None
            job.buffers.release(taken[0].buffer, taken[0].generation)

    def _commit(self, job: SaveJob, file: FileInfo | None) -> None:
        """Rank 0 learns that all data is durable and commits; all ranks learn the outcome."""
        try:
            point(points.RECORD, step=job.step)
        except Exception as error:  # told to the others, who wait
            job.error = job.error or error
        record = make_record(job, file, job.error)
        outcome: str | None = None
        # Whether no manifest can refer to the files; one that failed late may be in place.
        in_vain = False
        # Files that later saves do not refer to; None for all.
        retired: list[str] | None = []
        records = self._meet(job, self._commit_ranks.gather, record)
        if records is not None:
            failed = failures(job, records)
            in_vain = bool(failed)
            try:
                if failed:
                    raise SaveFailedError(f"rank {failed[0][0]}: {failed[0][1]}")
                manifest = make_manifest(job, records)
                if self.unchanged is not None:
                    in_vain, retired = True, None
                    check_referenced(self._root, manifest)
                    in_vain, retired = False, wasteful(manifest)
                self._commit_manifest(job, manifest)
            except Exception as error:  # told to all ranks
                outcome = str(error) or repr(error)
        outcome, in_vain, retired = self._meet(
            job, self._commit_ranks.broadcast, [outcome, in_vain, retired]
        )
        if outcome is None:  # before anybody can learn of it who would refer to the step
            self.steps.committed(job.step)
        if self.unchanged is not None:
            if outcome is None and job.packer is not None:
                self.unchanged.committed(job.step, job.attempt, file, job.packer.packed)
            self.unchanged.retire(retired)
        if in_vain and file is not None:
            # Not left to the next commit, which a full disk may never see.
            with contextlib.suppress(OSError):
                self._root.storage.remove(f"{step_folder(job.step)}/{file.name}")
        if outcome is not None:
            raise SaveFailedError(f"step {job.step} was not committed: {outcome}") from job.error

    def _written_by_nodes(self, job: SaveJob) -> bool:
        """Whether the nodes have written and committed the step; rank 0 asks, all learn it.

        Raises:
            SaveFailedError: It is not known whether they have, or will.
        """
        if self._memory is None or job.memory is None or not self._memory.persists(job):
            return False
        refused, unknown = None, None
        if self._commit_ranks.rank == 0:
            try:
                self._memory.wait_persisted(job.memory, Deadline(self._timeout_s))
            except SaveFailedError as error:  # then the ranks do it themselves
                refused = str(error)
            except Exception as error:  # told to all ranks
                unknown = str(error) or repr(error)
        refused, unknown = self._meet(job, self._commit_ranks.broadcast, [refused, unknown])
        if unknown is not None:
            job.agreed = True
            raise SaveFailedError(f"step {job.step} was not committed: {unknown}")
        if refused is not None:
            telemetry.event("memory.not_persisted", step=job.step, error=refused)
        return refused is None

    def _commit_manifest(self, job: SaveJob, manifest: Manifest) -> None:
        if self._lock is not None:
            self._persister.on_disk(job.step, self._lock.check)
        self._persister.on_disk(job.step, lambda: self._root.prepare(job.step))
        rewound_to = self._persister.on_disk(job.step, lambda: self._rewound_to(manifest))
        self._persister.on_disk(
            job.step, lambda: self._root.commit(manifest, rewound_to=rewound_to)
        )
