"""Runs of `planaria.elastic.Session` on a small model, that end with everything worth comparing."""

import math
import os
import signal
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from members import LocalMembers
from memory_jobs import PATIENCE_S, eventually, tier_of
from ranks import RankResult, run_ranks
from reductions import Net
from tricks import play

from planaria.checkpoint import LATER, Checkpointer, MemoryTier
from planaria.core import points
from planaria.core.node import NODE_ENV
from planaria.elastic import GlobalBatch, Session
from planaria.elastic.membership import Alone, connect
from planaria.elastic.membership.rules import Rules
from planaria.elastic.preemption import Notice, Notices

STEPS = 5


class Tokens:
    """Sentences by index, each with whether it takes the model's rare path."""

    def __len__(self) -> int:
        return 90

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, 13, (6,), generator=generator), index % 7 == 0


class Told(Notices):
    """Notices that a test gives."""

    told = False
    grace_s = 20.0

    def look(self) -> Notice | None:
        return Notice("a test", time.monotonic() + self.grace_s) if self.told else None


@dataclass(frozen=True)
class Kind:
    """What a run is made with."""

    dtype: torch.dtype = torch.float32
    optimizer: str = "AdamW"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 10
    steps: int = STEPS
    weighted: bool = True
    nap_s: float = 0.0
    folder: str | None = None
    every: int = 2
    stop_at: int | None = None
    record: str | None = None
    leave: dict[int, int] = field(default_factory=dict)
    #: Nodes that may be lost without losing the snapshots in memory, one of each step; 0 for none.
    snapshots: int = 0
    grace_s: float = 20.0
    memory: bool = False
    #: Steps before which all wait until a save is committed, by number, each with that of the save.
    wait_for: dict[int, int] = field(default_factory=dict)
    device: str = "cpu"
    #: Ranks of a node; 0 where they are all on one.
    node_size: int = 0


@dataclass
class Outcome:
    """What became of a run on one rank.

    Attributes:
        parameters: Bytes of all parameters, by name.
        steps: Of each committed step its number, loss, norm and logged metric, to the last bit.
        attempts: Number and attempt of every step that was yielded.
        lr: The learning rate at the end.
        counted: Objects of the user's own, changed after a step and inside of one.
        members: The members at the end.
        gap: The longest time between two committed steps, in seconds.
    """

    parameters: dict[str, bytes]
    steps: list[tuple[Any, ...]]
    attempts: list[tuple[int, int]]
    lr: float
    counted: Any
    members: tuple[int, ...]
    gap: float = 0.0

    @property
    def bits(self) -> Any:
        """What must be equal whatever happened."""
        return self.parameters, self.steps, self.lr, self.counted


def train(
    membership: Any,
    kind: Kind,
    *,
    before_step: Callable[[Session, int], None] | None = None,
) -> Outcome:
    """Trains to the end, and says how it went."""
    torch.manual_seed(membership.id)  # nothing may depend on it
    model = Net(kind.dtype).to(kind.device)
    optimizer = getattr(torch.optim, kind.optimizer)(
        [p for p in model.parameters() if p.requires_grad], lr=0.05, **kind.optimizer_options
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    data = GlobalBatch(Tokens(), 2 * kind.micro_batches, 2, seed=3)
    counted = {"steps": 0, "sum": torch.zeros(2)}
    inside = {"steps": 0, "sum": torch.zeros(2)}
    steps: list[tuple[Any, ...]] = []
    attempts: list[tuple[int, int]] = []
    ends: list[float] = []
    ckpt, notices = None, Told()
    notices.grace_s = kind.grace_s
    if kind.folder is not None:
        memory = tier_of(membership.id, nodes=8, losses=2, every=100) if kind.memory else None
        if kind.snapshots:
            node = f"node-{membership.id}"
            memory = MemoryTier(1 << 20, losses=kind.snapshots, node=node, idle_s=20)
        ckpt = Checkpointer(
            kind.folder, {"model": model}, every=kind.every, process_group=LATER, memory=memory
        )
    options = {
        "checkpointer": ckpt,
        "clip_grad_norm": 0.5,
        "seed": 11,
        "recovery_s": 30,
        "step_timeout_s": 60,
        "record": kind.record,
        "notices": notices,
    }
    with Session(model, optimizer, data, steps=kind.steps, scheduler=scheduler,
                 state={"counted": counted, "inside": inside}, membership=membership,
                 **{**options, **kind.options}) as session:  # fmt: skip
        for each in session:
            if before_step is not None:
                before_step(session, each.number)
            if each.number in kind.wait_for:
                step = Path(kind.folder or "", f"step-{kind.wait_for[each.number]:08d}")
                eventually((step / "manifest.json").exists, f"{step.name} committed")
            if each.number == kind.leave.get(membership.id):
                notices.told = True
            if each.number == kind.stop_at:
                session.request_stop()
            attempts.append((each.number, each.attempt))
            with each:
                inside["steps"] += 1
                inside["sum"] += each.number
                for tokens, rare in each.micro_batches():
                    time.sleep(kind.nap_s)
                    loss = model(tokens.reshape(-1).to(kind.device), rare=bool(rare.any()))
                    each.log(longest=float(tokens.max()))
                    each.backward(loss, float(1 + tokens[0, 0]) if kind.weighted else 1.0)
            if each.committed:
                ends.append(time.monotonic())
                counted["steps"] += 1
                counted["sum"] += each.metrics["loss"]
                with torch.no_grad():
                    model.eval()
                    model(torch.arange(6, device=kind.device), rare=False)
                    model.train()
                numbers = [each.metrics[name].hex() for name in ("loss", "grad_norm", "longest")]
                steps.append((each.number, *numbers))
        view = session.view
    gaps = [b - a for a, b in pairwise(ends)]
    return Outcome(
        {n: p.detach().float().cpu().numpy().tobytes() for n, p in model.named_parameters()},
        steps,
        attempts,
        optimizer.param_groups[0]["lr"],
        [(part["steps"], part["sum"].tolist()) for part in (counted, inside)],
        view.members,
        max(gaps, default=0.0),
    )


def member(
    me: int,
    kind: Kind,
    faults: dict[int, str] | None = None,
    late: int | None = None,
    trick: str = "",
    joiners: int = 1,
    notes: str = "",
) -> Outcome:
    """One member of a run, in a process of its own.

    Args:
        me: Its id.
        kind: The run.
        faults: Faults to arm, by id.
        late: Before this step members wait for one that wants to join.
        trick: What is done to it, see `tricks.play`.
        joiners: How many join; where it is more than one, members wait for each of them.
        notes: A folder for what members tell each other.
    """
    if faults and me in faults:
        points.arm(faults[me])
    if kind.node_size:
        os.environ[NODE_ENV] = f"node-{me // kind.node_size}"
    called = None
    if trick == "comes once it is waited for":
        called = Path(notes, "called")
        if me == 3:
            eventually(called.exists, "a run that waits for it")
    membership = connect()
    play(trick, me, Path(notes))
    if trick == "saves elsewhere" and me == 2:
        kind = replace(kind, folder=f"{kind.folder}-of-another-node")
    first, patience = None, 0.0
    seen: set[int] = set()  # of members, some may be gone again

    def before_step(session: Session, number: int) -> None:
        nonlocal first, patience
        if first is None:
            first = session.view.world_size if number == 0 else 0
        seen.update(session.view.members)
        until = time.monotonic() + PATIENCE_S
        if number == late:
            patience = until
        if called is not None and number == late:
            called.touch()
        # The others that join are waited for at later steps, but those may never come.
        again = late is not None and joiners > 1 and number > late and time.monotonic() < patience
        if again:
            until = patience
        while first and (number == late or again) and time.monotonic() < until:
            all_came = seen.issuperset(range(first, first + joiners))
            if membership.change_wanted() == "join" or all_came:
                break
            if membership.disturbed():
                break  # the others wait for this one
            time.sleep(0.002)

    return train(membership, kind, before_step=before_step)


def run(
    world: int,
    kind: Kind,
    faults: dict[int, str] | None = None,
    *,
    late: int | None = None,
    joiners: int = 0,
    rules: Rules | None = None,
    trick: str = "",
    timeout: float = 100,
) -> dict[int, RankResult]:
    """A run of so many members, and of some that join; how each ended."""
    rules = rules or Rules(world, maximum=world + joiners)
    with TemporaryDirectory(prefix="session-") as notes:
        args = (kind, faults, late, trick, max(joiners, 1), notes)
        with LocalMembers(world, member, *args, rules=rules, timeout=timeout) as job:
            if joiners:
                job.await_generation(1)
            for _ in range(joiners):
                job.add()
            return job.wait()


def alone(kind: Kind) -> Outcome:
    """The same run on one rank, in a process of its own."""
    (result,) = run_ranks(1, alone_here, kind, init_group=False)
    return result


def alone_here(rank: int, kind: Kind) -> Outcome:
    """The body of :func:`alone`."""
    return train(Alone(), kind)


def check(
    results: dict[int, RankResult],
    reference: Outcome,
    *,
    dead: Collection[int] = (),
    joined: Collection[int] = (),
) -> None:
    """Makes sure that all ended as they had to, with the bits of the reference."""
    for me in dead:
        assert results[me].exitcode == -signal.SIGKILL, (me, results[me].error)
    survived = {me: result for me, result in results.items() if me not in dead}
    errors = {me: result for me, result in survived.items() if result.error is not None}
    if errors:
        # The first one is the cause; that of the others may be the loss of it.
        first = min(errors.values(), key=lambda result: result.ended_at or math.inf)
        assert first.error is not None
        for me, result in errors.items():
            first.error.add_note(f"member {me} at {result.ended_at:.3f}: {result.error!r}")
        raise first.error
    for me, result in survived.items():
        outcome = result.value
        assert outcome.parameters == reference.parameters, me
        first = len(reference.steps) - len(outcome.steps) if me in joined else 0
        assert outcome.steps == reference.steps[first:], me
        assert (outcome.lr, outcome.counted) == (reference.lr, reference.counted), me
        assert set(outcome.members) == set(results) - set(dead)
