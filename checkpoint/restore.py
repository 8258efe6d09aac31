"""Restoring: the newest step that verifies on all ranks, into a state of any layout."""

import contextlib
import fnmatch
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Protocol

from planaria import errors
from planaria.checkpoint.capture.pool import BufferPool
from planaria.checkpoint.layout.reading import Reader
from planaria.checkpoint.layout.transforms import Transform, sources_of
from planaria.checkpoint.memory.restoring import MemorySteps
from planaria.checkpoint.state import tree
from planaria.checkpoint.state.provider import LoadPlan
from planaria.checkpoint.state.stateset import StateSet
from planaria.checkpoint.storage.root import Root
from planaria.core.collective import Ranks
from planaria.core.garbage import no_collection
from planaria.errors import (
    CorruptError,
    MismatchError,
    PlanariaError,
    RootError,
    StateError,
    StorageError,
)


@dataclass(frozen=True)
class RestoreReport:
    """What a restore did on this rank.

    Attributes:
        step: The step that the state is at now.
        tier: Where it came from: "memory", "durable" or "mirror".
        missing: Names that the state has and the checkpoint had not (only if not strict).
        skipped: Names that were left as they were, or only replaced in spirit, with the reason.
        fell_back_from: Newer steps, or nearer copies of this one, that could not be read, with the
            reason, newest first.
        nan_names: Restored tensors in which a NaN was seen when they were saved.
        nbytes: Bytes that this rank read.
        world_size: How many ranks saved the step.
        metrics: What was passed to `Checkpointer.step`.
    """

    step: int
    tier: str = "durable"
    missing: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    fell_back_from: list[tuple[int, str]] = field(default_factory=list)
    nan_names: list[str] = field(default_factory=list)
    nbytes: int = 0
    world_size: int = 1
    metrics: dict[str, object] = field(default_factory=dict)


class MirrorSteps(Protocol):
    """A second copy of the steps; `planaria.checkpoint.mirroring` has it.

    Attributes:
        root: Where it lies, None if there is none.
    """

    root: Root | None

    def steps(self) -> list[int]:
        """Steps that may be restored from it, ascending."""
        ...

    def has(self, step: int) -> bool:
        """Whether a step may be restored from it where it is asked for by its number."""
        ...


def restore(
    root: Root,
    state: StateSet,
    ranks: Ranks,
    *,
    step: int | None,
    only: Collection[str] | str | None,
    strict: bool,
    transforms: Sequence[Transform],
    pool: BufferPool,
    mirror: MirrorSteps | None = None,
    memory: MemorySteps | None = None,
) -> RestoreReport | None:
    """See `Checkpointer.restore`."""
    roots = {"durable": root}
    if memory is not None and memory.root is not None:
        roots["memory"] = memory.root
    if mirror is not None and mirror.root is not None:
        roots["mirror"] = mirror.root
    candidates, unreachable = _candidates(root, mirror, memory, ranks, step)
    wanted = name_filter(only)
    bad: list[tuple[int, str]] = []
    for number, (candidate, tier) in enumerate(candidates, 1):
        plan, reader, error, metrics = None, None, None, {}
        here = roots[tier]
        try:
            manifest = here.manifest(candidate)
            metrics = tree.decode(manifest.metrics)
            sources = sources_of(manifest)
            for transform in transforms:
                sources = transform(sources)
            plan = LoadPlan(manifest, sources, wanted, ranks.rank, ranks.size)
            with no_collection():
                state.plan_load(plan)
        except Exception as e:
            error, plan = e, None
        unused = _used_by_none(ranks, plan)
        try:
            if plan is not None:
                if only is not None and len(unused) == len(plan.names_wanted()):
                    raise MismatchError(f"only={only!r} fits no name of both step {candidate} and "
                                        "the state")  # fmt: skip
                plan.check(strict, unused)
                with no_collection():
                    reader = Reader(here.storage, plan.manifest, plan.targets, pool)
                reader.verify()
        except Exception as e:
            error = e
        try:
            reasons = _vote(ranks, error)
        except BaseException:  # another rank is gone
            if reader is not None:
                reader.close()
            raise
        if reasons is None:
            assert plan is not None
            assert reader is not None
            return _carry_out(ranks, plan, reader, bad, metrics, tier)
        if reader is not None:
            reader.close()
        _raise_unless_damaged(error, reasons)
        rank, _, reason = reasons[0]
        bad.append((candidate, f"rank {rank}: {reason}"))
        if unreachable is not None and tier != "memory":
            raise StorageError(
                f"step {candidate} cannot be restored from {here.storage.url} ({reason}), and its "
                f"mirror cannot be asked now ({unreachable}); it may well be whole there, so "
                "nothing older was taken in its place: mend the cause and try again"
            ) from error
        if step is not None and number == len(candidates):
            raise CorruptError(f"rank {rank}: {reason}") from error
        following = candidates[number : number + 1]
        same = [_CALLED[other] for s, other in following if s == candidate]
        next_one = same[0] if same else "an older one"
        _warn(ranks, f"step {candidate} cannot be restored, {next_one} is tried: {bad[-1][1]}")
    if bad:
        listed = "; ".join(f"step {s}: {reason}" for s, reason in bad)
        raise CorruptError(f"no committed step of {root.storage.url} can be read: {listed}")
    return None


def _candidates(
    root: Root,
    mirror: MirrorSteps | None,
    memory: MemorySteps | None,
    ranks: Ranks,
    step: int | None,
) -> tuple[list[tuple[int, str]], str | None]:
    """The steps to try and where, in order, as rank 0 sees them; all ranks learn if it cannot.

    Also why the mirror cannot be asked, None if it can.
    """
    found, error, unreachable = None, None, None
    if ranks.rank == 0:
        try:
            found = [step] if step is not None else root.steps()[::-1]
            found = [(s, "durable") for s in found]
        except OSError as e:
            error = RootError(f"cannot list the steps of {root.storage.url}: {e}")
            error.__cause__ = e
        except PlanariaError as e:
            error = e
        if found is not None and mirror is not None:
            try:
                found, unreachable = _with_mirror(found, root, mirror, step)
            except RootError as e:
                _warn(ranks, f"nothing is restored from the mirror: {e}")
        if found is not None and memory is not None:
            found = _with_memory(found, root, memory, step)
    reason = None if error is None else str(error)
    found, unreachable, reason = ranks.broadcast([found, unreachable, reason])
    if reason is not None:
        raise error or RootError(f"rank 0: {reason}")
    if memory is not None and memory.why is not None:
        _warn(ranks, f"memory cannot be asked for snapshots: {memory.why}")
    if unreachable is not None:
        if not found:
            raise StorageError(
                f"{root.storage.url} holds no checkpoint, and its mirror cannot be asked now "
                f"({unreachable}): to begin anew might repeat what is there. Mend the cause, or "
                "leave out the mirror"
            )
        _warn(ranks, f"the mirror cannot be asked for steps: {unreachable}")
    return [(s, tier) for s, tier in found], unreachable


def _with_mirror(
    found: list[tuple[int, str]], root: Root, mirror: MirrorSteps, step: int | None
) -> tuple[list[tuple[int, str]], str | None]:
    """Adds the mirror's steps: the newest first, and of one step what is nearer."""
    if mirror.root is None:
        return found, None
    try:
        if step is None:
            found = found + [(s, "mirror") for s in mirror.steps()]
        elif mirror.has(step):
            found = [*(found if root.has(step) else []), (step, "mirror")]
    except RootError:  # not ours
        raise
    except (OSError, PlanariaError) as error:
        return found, str(error) or repr(error)
    return sorted(found, key=_nearest_first), None


def _with_memory(
    found: list[tuple[int, str]], root: Root, memory: MemorySteps, step: int | None
) -> list[tuple[int, str]]:
    """Adds the steps in memory."""
    wanted = [s for s in memory.steps if step is None or s == step]
    if step is not None and wanted:  # then it need not be anywhere else
        found = [f for f in found if f[1] != "durable" or root.has(step)]
    return sorted([*found, *((s, "memory") for s in wanted)], key=_nearest_first)


#: Of one step, what is nearest is tried first; and how it is called.
_CALLED = {"memory": "memory", "durable": "the durable copy", "mirror": "its mirror"}


def _nearest_first(found: tuple[int, str]) -> tuple[int, int]:
    return -found[0], list(_CALLED).index(found[1])


def _warn(ranks: Ranks, text: str) -> None:
    if ranks.rank == 0:
        with contextlib.suppress(Warning):  # warnings may be errors, here they must not
            warnings.warn(text, stacklevel=4)


def _used_by_none(ranks: Ranks, plan: LoadPlan | None) -> list[str]:
    """Wanted names of the checkpoint that find no place on any rank: each may hold a part only."""
    bits = None if plan is None else ["01"[n in plan.used] for n in plan.names_wanted()]
    # All ranks have the same names in the same order: one bit each will do.
    everyone = ranks.all_gather(None if bits is None else f"{int('1' + ''.join(bits), 2):x}")
    if plan is None:
        return []
    used = f"{reduce(or_, (int(b, 16) for b in everyone if b is not None)):b}"[1:]
    return [name for name, bit in zip(plan.names_wanted(), used, strict=True) if bit == "0"]


def _vote(ranks: Ranks, error: Exception | None) -> list[tuple[int, str, str]] | None:
    """None if no rank has an error; else who has which: (rank, class, message)."""
    mine = None if error is None else [type(error).__name__, str(error) or repr(error)]
    votes = ranks.all_gather(mine)
    failed = [(rank, vote[0], vote[1]) for rank, vote in enumerate(votes) if vote is not None]
    return failed or None


def _raise_unless_damaged(error: Exception | None, reasons: list[tuple[int, str, str]]) -> None:
    """Only damage is a reason to fall back; a mismatch or a bug is the caller's to mend."""
    others = [r for r in reasons if r[1] != "CorruptError"]
    if not others:
        return
    if error is not None and not isinstance(error, CorruptError):
        raise error
    rank, kind, message = others[0]
    known = getattr(errors, kind, PlanariaError)
    raise known(f"rank {rank}: {message}")


def _carry_out(
    ranks: Ranks,
    plan: LoadPlan,
    reader: Reader,
    bad: list[tuple[int, str]],
    metrics: dict[str, object],
    tier: str,
) -> RestoreReport:
    error: Exception | None = None
    try:
        reader.load()
        plan.finish()
    except Exception as e:
        error = e
    reasons = _vote(ranks, error)
    if reasons is not None:
        raise StateError(
            f"step {plan.manifest.step} could be read but not put in place (rank "
            f"{reasons[0][0]}: {reasons[0][2]}); the state is half restored: do not train on it"
        ) from error
    with_nan = set(plan.manifest.nan_names)
    return RestoreReport(
        step=plan.manifest.step,
        tier=tier,
        missing=plan.missing,
        skipped=plan.skipped,
        fell_back_from=bad,
        nan_names=[
            t.name
            for t in (plan.targets if with_nan else ())
            if with_nan & {p.stored for p in t.source.parts}
        ],
        nbytes=reader.nbytes,
        world_size=plan.manifest.world_size,
        metrics=metrics,
    )


def name_filter(only: Collection[str] | str | None) -> Callable[[str], bool]:
    """Whether a name is one of `only`, lies below one of them, or fits a pattern with ``*``."""
    if only is None:
        return lambda _: True
    patterns = [only] if isinstance(only, str) else list(only)

    def wanted(name: str) -> bool:
        return any(
            name == p or name.startswith(f"{p}.") or ("*" in p and fnmatch.fnmatchcase(name, p))
            for p in patterns
        )

    return wanted
