"""Removing old steps by hand: what goes is shown first, and never what a restore would need.

While steps are removed the root is locked, so that no job saves or prunes there. It may be killed
at any point: a step loses its manifest before anything else, so it is either whole or does not
exist; what is left of it is swept by the next save or prune.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from planaria.checkpoint import points
from planaria.checkpoint.policies.keeping import KeepAny, KeepBest, KeepPolicy, kept
from planaria.checkpoint.reader import Checkpoint
from planaria.checkpoint.retention import Retention
from planaria.checkpoint.storage.lock import RootLock
from planaria.checkpoint.storage.root import Root, step_folder
from planaria.core.points import point
from planaria.errors import (
    ConfigError,
    CorruptError,
    NotCommittedError,
    PlanariaError,
    RootError,
)


@dataclass(frozen=True)
class Verdict:
    """What becomes of one step.

    Attributes:
        step: Its number.
        state: "committed", "abandoned", "referenced" or "uncommitted", as `StepFolder.state`.
        keep: Whether it stays.
        why: The policies that want it, or another reason.
        nbytes: Bytes of its data files; 0 where they are not known.
        shared: Bytes of these that stay in any case, for steps that are kept refer to them.
        created: When it was written, in seconds since the epoch; None where it is not known.
        metrics: What was saved with it.
    """

    step: int
    state: str
    keep: bool
    why: str
    nbytes: int = 0
    shared: int = 0
    created: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


def choose(root: Root, policy: KeepPolicy, *, abandoned: bool = False) -> list[Verdict]:
    """Says what of a root would go; changes nothing.

    Args:
        root: The root.
        policy: What to keep.
        abandoned: Whether steps of a rewound past go, too.

    Raises:
        ConfigError: A policy is about a metric that no step has.
        CorruptError: Something would go, but nothing that stays verifies.
    """
    retention = Retention(root, policy, lambda step: verifies(root, step))
    folders = root.folders()
    steps = [f.step for f in folders if f.state == "committed"]
    _check_metrics(policy, steps, retention)
    reasons = dict(_reasons(policy, steps, retention))
    going = set(steps) - set(reasons)
    newest_good = retention.newest_good(steps) if going else None
    if going and newest_good is None:
        raise CorruptError(
            f"no committed step of {root.storage.url} verifies, so nothing may be removed; "
            "planaria verify says what is wrong with them"
        )
    if newest_good is not None:
        reasons[newest_good] = ", ".join(filter(None, [reasons.get(newest_good), "newest good"]))
    verdicts = []
    for found in folders:
        if found.state in ("committed", "abandoned"):
            why = reasons.get(found.step)
            if found.state == "abandoned":
                why = None if abandoned else "of a rewound past"
            with contextlib.suppress(NotCommittedError):  # removed since it was seen, by a job
                verdicts.append(_verdict(root, found.step, found.state, why))
        elif found.state == "uncommitted":
            verdicts.append(Verdict(found.step, found.state, keep=False, why="never committed"))
        else:
            verdicts.append(Verdict(found.step, found.state, keep=False, why="used by none"))
    return _with_shares(root, verdicts)


def _with_shares(root: Root, verdicts: list[Verdict]) -> list[Verdict]:
    """What stays of each step's files for the sake of others that are kept."""
    users: dict[str, list[int]] = {}
    for verdict in verdicts:
        if verdict.keep:
            for name in root.mentioned(verdict.step):
                users.setdefault(name, []).append(verdict.step)
    result = []
    for verdict in verdicts:
        folder = step_folder(verdict.step)
        names = [] if verdict.state == "uncommitted" else root.storage.list(folder)
        kept_for = {n: [s for s in users.get(n, ()) if s != verdict.step] for n in names}
        kept_for = {name: steps for name, steps in kept_for.items() if steps}
        found = replace(
            verdict, shared=sum(root.storage.size(f"{folder}/{name}") or 0 for name in kept_for)
        )
        if found.state == "referenced":
            found = replace(found, nbytes=files_nbytes(root, found.step), keep=bool(kept_for))
        if kept_for and (not verdict.keep or found.state == "referenced"):
            wanted_by = sorted({step for steps in kept_for.values() for step in steps})
            listed = ", ".join(map(str, wanted_by[:3])) + (", ..." if len(wanted_by) > 3 else "")
            why = f"files kept for step {listed}"
            found = replace(found, why=why)
        result.append(found)
    return result


def files_nbytes(root: Root, step: int) -> int:
    """Bytes of the files in a step's folder."""
    folder = step_folder(step)
    return sum(root.storage.size(f"{folder}/{name}") or 0 for name in root.storage.list(folder))


def prune(root: Root, policy: KeepPolicy, *, abandoned: bool = False) -> list[Verdict]:
    """Removes what `choose` says, under the root's lock; returns what it said.

    Raises:
        RootLockedError: A live job uses the root.
        RootError: It cannot be written.
        ConfigError: As `choose`.
        CorruptError: As `choose`.
    """
    with locked(root) as lock:
        point(points.PRUNE_LOCKED)
        verdicts = choose(root, policy, abandoned=abandoned)
        point(points.PRUNE_CHOSEN)
        for verdict in verdicts:
            if verdict.keep or verdict.state in ("uncommitted", "referenced"):
                continue
            lock.check()
            point(points.PRUNE_NEXT, step=verdict.step)
            root.remove(verdict.step)
            point(points.PRUNE_REMOVED, step=verdict.step)
        lock.check()
        root.sweep(lambda step: contextlib.nullcontext(True))
        point(points.PRUNE_SWEPT)
    return verdicts


@contextlib.contextmanager
def locked(root: Root) -> Iterator[RootLock]:
    """Holds a root's lock; no job can be writing there meanwhile.

    Raises:
        RootLockedError: A live job holds it.
        RootError: The root cannot be written.
    """
    lock = None
    try:
        lock = RootLock(root.storage)
        yield lock
    except OSError as error:
        raise RootError(f"cannot write to {root.storage.url}: {error}") from error
    finally:
        if lock is not None:
            lock.release()


def verifies(root: Root, step: int) -> bool:
    """Whether every byte of a step is what was written."""
    try:
        return not Checkpoint(root, root.manifest(step)).verify()
    except (PlanariaError, OSError):
        return False


def _parts(policy: KeepPolicy) -> tuple[KeepPolicy, ...]:
    return policy.policies if isinstance(policy, KeepAny) else (policy,)


def _reasons(
    policy: KeepPolicy, steps: list[int], retention: Retention
) -> Iterator[tuple[int, str]]:
    """The steps that are wanted, and by which policies."""
    wanted = {part: kept(part, steps, retention.metrics) for part in _parts(policy)}
    for step in steps:
        why = [_short(part) for part, these in wanted.items() if step in these]
        if step == steps[-1]:
            why.append("newest")
        if why:
            yield step, ", ".join(why)


def _short(policy: KeepPolicy) -> str:
    """A policy in few words."""
    if isinstance(policy, KeepBest):
        return f"best {policy.metric}"
    return {"KeepLast": "last", "KeepEvery": "every"}.get(type(policy).__name__, repr(policy))


def _check_metrics(policy: KeepPolicy, steps: list[int], retention: Retention) -> None:
    known = {name for step in steps for name in (retention.metrics(step) or {})}
    for part in _parts(policy):
        if steps and isinstance(part, KeepBest) and part.metric not in known:
            there = f"there are {', '.join(sorted(known))}" if known else "no step has any"
            raise ConfigError(f"no committed step has the metric {part.metric!r}; {there}")


def _verdict(root: Root, step: int, state: str, why: str | None) -> Verdict:
    keep = why is not None
    try:
        manifest = root.manifest(step)
    except NotCommittedError:
        raise
    except PlanariaError:
        return Verdict(step, "damaged", keep, why or "", files_nbytes(root, step))
    return Verdict(
        step,
        state,
        keep,
        why or "",
        manifest.nbytes,
        created=manifest.created,
        metrics=manifest.metrics,
    )
