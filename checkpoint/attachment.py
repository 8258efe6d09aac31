"""What a checkpointer has with one group of ranks, for as long as these are the job's ranks.

A live job may lose ranks and get others. Then all of this ends, at once and without anybody's
leave, and is made anew with the ranks that there are then; what is kept is what belongs to one
process alone (its pool, its policy, on rank 0 its lock and the copies to the mirror).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from planaria.checkpoint.capture.pool import BufferPool
from planaria.checkpoint.decide import Decisions
from planaria.checkpoint.failures import Failures
from planaria.checkpoint.format.manifest import Manifest
from planaria.checkpoint.memory.saving import open_memory
from planaria.checkpoint.opening import Brought, Claim, Options, claim, make_pool
from planaria.checkpoint.persist import RETRY_AFTER_S
from planaria.checkpoint.pipeline import Pipeline
from planaria.checkpoint.save_job import SaveJob
from planaria.checkpoint.steps_in_use import StepsInUse
from planaria.core.collective import Meeting, Ranks
from planaria.core.deadline import Deadline
from planaria.errors import DeadlineError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: A rank that commits nothing does not wait longer for what hangs in its storage.
_PATIENCE_S = 5.0


class Attachment:
    """The groups, the lock and the threads of one rank.

    Args:
        options: The checkpointer's arguments; None where they are wrong.
        error: What is wrong on this rank already, which the others have to learn.
        group: The job's ranks.
        decisions: Is opened with them.
        failures: Is told how snapshots end.
        steps: Which steps are in use.
        brought: Where the group follows on another: what this rank brings from there.
        pool: Memory to capture into, if there is some already.
        within_s: How long to wait for the other ranks to turn up and to agree, in seconds.
        elastic: Whether these ranks may change.
        rewound_to: See `Pipeline`.
        on_done: See `Pipeline`.

    Attributes:
        ranks: The job's ranks, for the thread that trains.
        claimed: What was found in the root.
        pool: Memory to capture into.
        memory: Takes snapshots in memory.
        pipeline: The background threads.
        given_up: Whether these are the job's ranks no more.

    Raises:
        PlanariaError: Something is wrong on some rank; nothing is left behind.
    """

    def __init__(
        self,
        options: Options | None,
        error: Exception | None,
        group: ProcessGroup | Meeting | None,
        *,
        decisions: Decisions,
        failures: Failures,
        steps: StepsInUse,
        brought: Brought | None,
        pool: BufferPool | None,
        timeout_s: float,
        within_s: float,
        elastic: bool,
        rewound_to: Callable[[Manifest], int | None],
        on_done: Callable[[SaveJob], None],
    ) -> None:
        within = Deadline(within_s)
        self.given_up = False
        self._groups: list[Ranks] = []
        claimed: Claim | None = None
        lock = None if brought is None else brought.lock
        try:
            for _ in range(3):
                left = min(timeout_s, within.remaining())
                self._groups.append(Ranks(group, timeout_s=timeout_s, within_s=left))
            self.ranks, self.capture_ranks, self.commit_ranks = self._groups
            lock = None  # now it is claim's
            with self.ranks.patience(within.remaining()):
                claimed = claim(options, error, self.ranks, decisions, brought)
            assert options is not None  # else it was told
            lock = claimed.lock
            self.pool = make_pool(options.pool_bytes, claimed, self.ranks.size, pool)
            more = None
            if options.memory is not None:
                left = min(timeout_s, within.remaining())
                more = Ranks(group, timeout_s=timeout_s, within_s=left)
                self._groups.append(more)
            url = options.root.storage.url
            self.memory = open_memory(options.memory, claimed.root_id, url, more, failures)
        except BaseException:
            for ranks in self._groups:
                ranks.abandon()
            if claimed is not None:
                decisions.release()
            if lock is not None:
                lock.release()
            raise
        self.claimed, self.lock = claimed, lock
        self.pipeline = Pipeline(
            options.root,
            lock,
            self.capture_ranks,
            self.commit_ranks,
            self.pool,
            keep=options.keep,
            dedup=options.dedup,
            retries=0 if options.on_failure == "fatal" else len(RETRY_AFTER_S),
            timeout_s=timeout_s,
            steps=steps,
            holds_back=elastic,
            memory=self.memory,
            rewound_to=rewound_to,
            on_done=on_done,
        )
        if brought is not None:
            self.pipeline.restored(claimed.base)

    def give_up(self) -> None:
        """From any thread, without waiting: nothing of what is under way is committed any more.

        Except for a commit that rank 0 has begun. Whoever waits for another rank is woken.
        """
        self.given_up = True
        for ranks in self._groups:
            ranks.abandon()
        self.pipeline.give_up()
        if self.memory is not None:
            self.memory.give_up()

    def end(self, deadline: Deadline) -> list[SaveJob]:
        """After `give_up`: ends the threads.

        Returns:
            Saves of which it is not known here how they ended.

        Raises:
            DeadlineError: This is rank 0, and its storage hangs: a commit may come yet.
        """
        commits = self.lock is not None
        patience = deadline if commits else deadline.sub(min(_PATIENCE_S, deadline.remaining() / 2))
        ended = self.pipeline.close(patience.remaining())
        if self.memory is not None:
            self.memory.close(patience.remaining(), part=False)
        if commits and not ended:
            raise DeadlineError(
                f"the storage hangs: what was being written did not end within {deadline.budget:g} "
                "s, and it may be a commit"
            )
        return self.pipeline.unknown

    def close(self, deadline: Deadline, *, part: bool) -> bool:
        """Ends everything but the lock once queued saves are through; False if it did not end.

        Args:
            deadline: How long to wait.
            part: Whether the job ends here.
        """
        ended = self.pipeline.close(deadline.remaining())
        if self.memory is not None:
            ended = self.memory.close(deadline.remaining(), part=part) and ended
        return ended

    def leave(self) -> None:
        """After `close`: the groups end, too."""
        for ranks in self._groups:
            ranks.close()
