"""Opening a root for one job: everything that can be wrong is found before anything runs.

What is wrong on one rank is raised on all of them: none may be left waiting for one that is gone.
"""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from planaria import errors
from planaria.checkpoint.capture.pool import BufferPool, fair_limit
from planaria.checkpoint.decide import Decisions
from planaria.checkpoint.memory.tier import MemoryTier
from planaria.checkpoint.mirroring import Mirroring
from planaria.checkpoint.past import Past, merged
from planaria.checkpoint.policies import (
    FailurePolicy,
    KeepPolicy,
    SavePolicy,
    keep_policy,
    save_policy,
)
from planaria.checkpoint.state.stateset import StateSet
from planaria.checkpoint.storage.base import Storage, open_storage
from planaria.checkpoint.storage.lock import RootLock
from planaria.checkpoint.storage.mirror import Mirror
from planaria.checkpoint.storage.root import Root
from planaria.core.collective import Ranks
from planaria.errors import ConfigError, NotSupportedError, PlanariaError, RootError

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
        on_failure: What a failed save does.
        by_nodes: Whether snapshot processes write to storage.
        pool_bytes: Upper bound of the memory that captures use, None for what is fair.
        dedup: Whether what has not changed is referred to.
        audit: Whether every captured byte is checked.
        timeout_s: Longest wait for anything, in seconds.
    """

    root: Root
    state: StateSet
    mirror: Mirroring
    memory: MemoryTier | None
    due: SavePolicy | None
    keep: KeepPolicy | None
    on_failure: FailurePolicy
    by_nodes: bool
    pool_bytes: int | None
    dedup: bool
    audit: bool
    timeout_s: float

    @classmethod
    def check(
        cls,
        path: "str | os.PathLike[str] | Storage",
        state: Mapping[str, Any],
        *,
        every: int | SavePolicy | None,
        keep: int | KeepPolicy | None,
        on_failure: FailurePolicy,
        mirror: str | Mirror | None,
        memory: MemoryTier | None,
        writer: str,
        pool_bytes: int | None,
        dedup: bool,
        audit: bool,
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
                "dedup=True with memory=: an image in memory is the file that is stored, byte for "
                "byte, and with dedup what that holds is not known before all is captured; leave "
                "one out"
            )
        if writer not in ("trainer", "snapshot"):
            raise ConfigError(f"writer={writer!r}: use 'trainer' or 'snapshot'")
        if writer == "snapshot" and (memory is None or root.storage.local is None):
            raise ConfigError("writer='snapshot' needs memory= and a local folder to write to")
        return cls(
            root,
            StateSet(state, watch_small=audit),
            Mirroring(mirror, root),
            memory,
            due,
            kept,
            on_failure,
            writer == "snapshot",
            pool_bytes,
            dedup,
            audit,
            float(timeout_s),
        )


@dataclass
class Claim:
    """A root that is this job's.

    Attributes:
        lock: Held by rank 0, None elsewhere.
        past: What all ranks know of the run's past.
        committed: Saves that ranks had given up and that are committed all the same.
        base: The step that the run goes on from, if it is in the root and is known.
        root_id: What tells the root from any other, the same on all ranks.
        held: Bytes of state on this rank.
        pinned: Whether any of it lies on a GPU.
    """

    lock: RootLock | None = None
    past: Past = field(default_factory=Past)
    committed: list[tuple[int, str]] = field(default_factory=list)
    base: int | None = None
    root_id: str = ""
    held: int = 0
    pinned: bool = False


@dataclass
class Brought:
    """What a rank brings to a group that follows on another one.

    Attributes:
        past: What it knows; None where it was part of none before.
        saves: Step and attempt of saves of which it does not know how they ended.
        lock: Its lock on the root, if it has one.
    """

    past: Past | None
    saves: list[tuple[int, str]]
    lock: RootLock | None


def claim(
    options: Options | None,
    error: Exception | None,
    ranks: Ranks,
    decisions: Decisions,
    brought: Brought | None = None,
) -> Claim:
    """Checks the state on all ranks, and the root on rank 0, which locks it.

    Args:
        options: What was asked for; None where that was wrong.
        error: What is wrong on this rank already.
        ranks: All of the job's.
        decisions: Opened here, and released if it cannot go on.
        brought: Given on all ranks where the group follows on another one. The ranks of that one
            that are not here must be dead: what they held is taken over.

    Raises:
        PlanariaError: Something is wrong on some rank.
    """
    here = Claim(lock=None if brought is None else brought.lock)
    try:
        saves: set[tuple[int, str]] = set()
        follows = False
        if brought is not None:
            told = ranks.all_gather(
                [None if brought.past is None else brought.past.to_json(), brought.saves]
            )
            pasts = [Past.from_json(past) for past, _ in told if past is not None]
            here.past, follows = merged(pasts), bool(pasts)
            saves = {(step, attempt) for _, unknown in told for step, attempt in unknown}
        try:
            if error is not None:
                raise error
            assert options is not None
            entries = options.state.collect().tensors.values()
            here.held = sum(e.nbytes for e in entries if e.alias_of is None)
            here.pinned = any(e.local.is_cuda for e in entries)
            decisions.open(ranks)
            if ranks.rank == 0:
                _claim_root(options.root, here, saves, follows=follows)
        except OSError as e:
            where = "the root" if options is None else options.root.storage.url
            error = RootError(
                f"cannot use {where}: {e}; give a folder that can be read and written, on a disk "
                "with room"
            )
            error.__cause__ = e
        except Exception as e:
            error = e
        _agree(options, error, ranks, here)
        if brought is None or brought.past is None:
            assert options is not None
            _check_shared(options.root, ranks, here.root_id, together=not follows)
    except BaseException:
        decisions.release()
        if here.lock is not None:
            here.lock.release()
        raise
    return here


def _claim_root(root: Root, here: Claim, saves: set[tuple[int, str]], *, follows: bool) -> None:
    """On rank 0: locks the root and looks at what it holds."""
    root.claim()
    if here.lock is None:
        here.lock = RootLock(root.storage, heir_of=here.past.locks)
    past, newest = here.past, max(root.steps(), default=None)
    for step, attempt in sorted(saves):
        with contextlib.suppress(PlanariaError):
            if attempt and root.manifest(step).attempt == attempt:
                here.committed.append((step, attempt))
    if not follows:
        past.newest_at_open = newest
    elif here.committed:
        past.restored = None
    # A save that was given up is made up for as soon as can be.
    past.owes = past.owes or len(here.committed) < len(saves)
    if past.goes_on or newest != past.newest_at_open:
        here.base = newest if past.restored is None else past.restored
    here.root_id = root.id or root.storage.url


def _agree(options: Options | None, error: Exception | None, ranks: Ranks, here: Claim) -> None:
    """All ranks learn what rank 0 has found, or what is wrong on any of them."""
    said = None if error is None else [type(error).__name__, str(error) or repr(error)]
    told = {
        "error": said,
        "memory": options is not None and options.memory is not None,
        "lock": None if here.lock is None else here.lock.mark,
        "past": here.past.to_json(),
        "committed": here.committed,
        "base": here.base,
        "root": here.root_id,
    }
    outcomes = ranks.all_gather(told)
    failed = [(r, *o["error"]) for r, o in enumerate(outcomes) if o["error"] is not None]
    if not failed and len({o["memory"] for o in outcomes}) > 1:
        failed = [(0, "ConfigError", "memory= is not the same on all ranks")]
    if failed:
        rank, kind, message = failed[0]
        raise error or getattr(errors, kind, RootError)(f"rank {rank}: {message}")
    first = outcomes[0]
    here.past = Past.from_json(first["past"])
    here.past.locks = [*here.past.locks, first["lock"]]
    here.committed = [(step, attempt) for step, attempt in first["committed"]]
    here.base, here.root_id = first["base"], first["root"]


def _check_shared(root: Root, ranks: Ranks, root_id: str, *, together: bool) -> None:
    """Makes sure that this rank, which is new, writes to the folder that rank 0 commits.

    Else steps would be committed whose files lie in several places.

    Args:
        root: This rank's.
        ranks: All of the job's.
        root_id: What tells rank 0's from any other.
        together: Whether all are new, and all fail; else only one that differs: a job that was
            there before goes on without it.
    """
    wrong = None
    try:
        if ranks.rank and (root.id or root.storage.url) != root_id:
            wrong = root.storage.url
    except (OSError, PlanariaError) as error:  # most often it has no mark
        wrong = f"{root.storage.url} ({error})"
    said = ranks.all_gather(wrong) if together else [wrong]
    rank = next((r for r, url in enumerate(said) if url is not None), None)
    if rank is not None:
        where = f"rank {rank if together else ranks.rank}: {said[rank]}"
        raise RootError(
            f"{where} is not the folder that rank 0 saves to: give all ranks one that they share"
        )


def make_pool(limit: int | None, claimed: Claim, ranks: int, old: BufferPool | None) -> BufferPool:
    """The memory that captures use, touched as far as they will need it.

    Args:
        limit: Upper bound in bytes; None for what is fair.
        claimed: Says how much state there is.
        ranks: How many ranks share the writing.
        old: What there is already; taken where nobody uses it any more.
    """
    held = claimed.held
    optimizers_to_come = held * 2  # two slots a parameter is what the usual ones will add
    expected = (held + optimizers_to_come) // ranks + CHUNK_NBYTES
    if limit is None:
        limit = fair_limit(3 * held + CHUNK_NBYTES)
    pool = old
    if pool is None or not pool.idle or pool.pinned != claimed.pinned:
        pool = BufferPool(limit, CHUNK_NBYTES, pinned=claimed.pinned)
    pool.raise_limit(limit)
    pool.reserve(min(expected, limit))
    return pool


def is_positive(value: object) -> bool:
    """Whether it is a number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
