"""Opening a root for one job: everything that can be wrong is found before anything runs.

What is wrong on one rank is raised on all of them: none may be left waiting for one that is gone.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from planaria import errors
from planaria.checkpoint.capture.pool import BufferPool, fair_limit
from planaria.checkpoint.decide import Decisions
from planaria.checkpoint.memory.tier import MemoryTier
from planaria.checkpoint.mirroring import Mirroring
from planaria.checkpoint.policies import KeepPolicy, SavePolicy, keep_policy, save_policy
from planaria.checkpoint.state.stateset import StateSet
from planaria.checkpoint.storage.base import Storage, open_storage
from planaria.checkpoint.storage.lock import RootLock
from planaria.checkpoint.storage.mirror import Mirror
from planaria.checkpoint.storage.root import Root
from planaria.core.collective import Ranks
from planaria.errors import ConfigError, NotSupportedError, RootError

CHUNK_NBYTES = 4 << 20


@dataclass
class Options:
    """A checkpointer's arguments, checked.

    Attributes:
        root: Where steps are committed.
        state: What is saved.
        mirror: The second copy.
        memory: Snapshots in memory, None for none.
        due: When to save.
        keep: What to keep.
    """

    root: Root
    state: StateSet
    mirror: Mirroring
    memory: MemoryTier | None
    due: SavePolicy | None
    keep: KeepPolicy | None

    @classmethod
    def check(
        cls,
        path: "str | os.PathLike[str] | Storage",
        state: Mapping[str, Any],
        *,
        every: int | SavePolicy | None,
        keep: int | KeepPolicy | None,
        on_failure: str,
        mirror: str | Mirror | None,
        memory: MemoryTier | None,
        writer: str,
        pool_bytes: int | None,
        dedup: bool,
        timeout_s: float,
    ) -> "Options":
        """See `Checkpointer`.

        Raises:
            ConfigError: One of them makes no sense.
        """
        if on_failure not in ("fatal", "retry", "degrade"):
            raise ConfigError(f"on_failure={on_failure!r}: use 'fatal', 'retry' or 'degrade'")
        if pool_bytes is not None and (
            not isinstance(pool_bytes, int) or pool_bytes < CHUNK_NBYTES
        ):
            raise ConfigError(
                f"pool_bytes={pool_bytes!r}: give at least {CHUNK_NBYTES} (one chunk)"
            )
        if not is_positive(timeout_s):
            raise ConfigError(f"timeout_s={timeout_s!r}: give a number of seconds above 0")
        due, kept = save_policy(every), keep_policy(keep)
        root = Root(open_storage(path))
        if dedup and root.storage.local is None:
            raise ConfigError(
                f"dedup=True, but {root.storage.url} is not a local folder; save to one, and give "
                "the URL as mirror="
            )
        if memory is not None and not isinstance(memory, MemoryTier):
            raise ConfigError(f"memory={memory!r}: give a MemoryTier")
        if memory is not None and dedup:
            raise NotSupportedError(
                "dedup=True with memory=: what is in memory is all of the state; leave one out"
            )
        if writer not in ("trainer", "snapshot"):
            raise ConfigError(f"writer={writer!r}: use 'trainer' or 'snapshot'")
        if writer == "snapshot" and (memory is None or root.storage.local is None):
            raise ConfigError("writer='snapshot' needs memory= and a local folder to write to")
        return cls(root, StateSet(state), Mirroring(mirror, root), memory, due, kept)


@dataclass
class Claim:
    """A root that is this job's.

    Attributes:
        lock: Held by rank 0, None elsewhere.
        newest: The newest committed step.
        root_id: What tells the root from any other, the same on all ranks.
        held: Bytes of state on this rank.
        pinned: Whether any of it lies on a GPU.
    """

    lock: RootLock | None
    newest: int | None
    root_id: str
    held: int
    pinned: bool


def claim(
    options: Options | None,
    error: Exception | None,
    ranks: Sequence[Ranks],
    decisions: Decisions,
) -> Claim:
    """Checks the state on all ranks, and the root on rank 0, which locks it.

    Args:
        options: What was asked for; None where that was wrong.
        error: What is wrong on this rank already.
        ranks: The groups of this job; the first is used, all are closed if it cannot go on.
        decisions: Opened here, and released if it cannot go on.

    Raises:
        PlanariaError: Something is wrong on some rank.
    """
    here = Claim(None, None, "", 0, False)
    try:
        if error is not None:
            raise error
        assert options is not None
        entries = options.state.collect().tensors.values()
        here.held = sum(e.nbytes for e in entries if e.alias_of is None)
        here.pinned = any(e.local.is_cuda for e in entries)
        decisions.open()
        if ranks[0].rank == 0:
            options.root.claim()
            here.lock = RootLock(options.root.storage)
            here.newest = max(options.root.steps(), default=None)
            here.root_id = options.root.id or options.root.storage.url
    except OSError as e:
        where = "the root" if options is None else options.root.storage.url
        error = RootError(
            f"cannot use {where}: {e}; give a folder that can be read and written, on a disk "
            "with room"
        )
        error.__cause__ = e
    except Exception as e:
        error = e
    said = None if error is None else [type(error).__name__, str(error) or repr(error)]
    told = {"error": said, "newest": here.newest, "root": here.root_id,
            "memory": options is not None and options.memory is not None}  # fmt: skip
    outcomes = ranks[0].all_gather(told)
    failed = [(r, *o["error"]) for r, o in enumerate(outcomes) if o["error"] is not None]
    if not failed and len({o["memory"] for o in outcomes}) > 1:
        failed = [(0, "ConfigError", "memory= is not the same on all ranks")]
    if failed:
        decisions.release()
        if here.lock is not None:
            here.lock.release()
        for group in ranks:
            group.close()
        rank, kind, message = failed[0]
        raise error or getattr(errors, kind, RootError)(f"rank {rank}: {message}")
    here.newest, here.root_id = outcomes[0]["newest"], outcomes[0]["root"]
    return here


def make_pool(limit: int | None, claimed: Claim, ranks: int) -> BufferPool:
    """The memory that captures use, touched as far as they will need it.

    Args:
        limit: Upper bound in bytes; None for what is fair.
        claimed: Says how much state there is.
        ranks: How many ranks share the writing.
    """
    held = claimed.held
    optimizers_to_come = held * 2  # two slots a parameter is what the usual ones will add
    expected = (held + optimizers_to_come) // ranks + CHUNK_NBYTES
    if limit is None:
        limit = fair_limit(3 * held + CHUNK_NBYTES)
    pool = BufferPool(limit, CHUNK_NBYTES, pinned=claimed.pinned)
    pool.reserve(min(expected, limit))
    return pool


def is_positive(value: object) -> bool:
    """Whether it is a number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
