"""What members of a session are made to do in tests: mostly sabotage, in their own process."""

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nccl_double
import pytest
import torch
from memory_jobs import eventually

from planaria.checkpoint import Checkpointer
from planaria.core import points
from planaria.elastic import engine, generations, step, way_out
from planaria.elastic.grace import WAYS, Meter
from planaria.elastic.partition import transfer
from planaria.elastic.partition.optimizer import ShardedOptimizer
from planaria.elastic.record import CommitLog
from planaria.elastic.reduction import exchange, staged
from planaria.elastic.rng import micro_batch_rng
from planaria.elastic.saving import Saving
from planaria.elastic.user_state import UserState
from planaria.errors import CollectiveError, StorageError


class Drowsy:
    """A transport on which others have long been heard before this rank looks.

    Args:
        transport: The one that it looks at.
        wakes: Returns when it looks.
    """

    def __init__(self, transport: Any, wakes: Callable[[], object]) -> None:
        self._transport, self._wakes = transport, wakes
        self.rank, self.size = transport.rank, transport.size

    def exchange(self, tag: int, outgoing: Any, incoming: Any) -> Any:
        wait = self._transport.exchange(tag, outgoing, incoming)

        def late(deadline: Any) -> None:
            self._wakes()
            wait(deadline)

        return late


def play(trick: str, me: int, notes: Path) -> None:
    """Changes how a member behaves, in its own process. All but the first are sabotage.

    Args:
        trick: Which one.
        me: The member.
        notes: A folder for what members tell each other.
    """
    monkey = pytest.MonkeyPatch()
    if trick.startswith("deaf"):
        # It sends its vote on step 2, and does not hear the others', which have heard them all.
        heard = [notes / f"heard-{member}" for member in (0, 1)]
        hear = engine.exchange_ballots

        def deaf(transport: Any, mine: Any, owners: Any, deadline: Any) -> Any:
            found = hear(transport, mine, owners, deadline)
            deaf_at.append(0)
            if len(deaf_at) == 3:
                for each in heard:  # this ends their waits, too
                    eventually(each.exists, f"{each.name}, the votes")
                raise CollectiveError("did not hear the votes")
            return found

        deaf_at: list[int] = []
        if me == 2:
            monkey.setattr(engine, "exchange_ballots", deaf)
        else:
            said = heard[me].touch
            points.arm_callback(engine.COMMITTED, lambda _, number: number == 2 and said())
    if trick == "deaf, vote ignored":
        # Who has not heard of the step goes on as if it had nothing to apply.
        def ignore(self: Any, roll: Any, deadline: Any) -> None:
            self._engine.step = roll.committed

        monkey.setattr(generations.Generations, "_catch_up", ignore)
    if trick == "dies as it attaches" and me == 2:
        # The others are waiting for it, and nothing between ranks tells them.
        attach = Saving.attach

        def die(self: Any, membership: Any, view: Any, deadline: Any) -> None:
            if view.generation == 2:
                time.sleep(0.5)  # until they do
                os.kill(os.getpid(), signal.SIGKILL)
            attach(self, membership, view, deadline)

        monkey.setattr(Saving, "attach", die)
    if trick == "dies once step 4 is in memory" and me == 1:
        save = Saving.step

        def die_then(self: Any, n: int, metrics: Any) -> None:
            save(self, n, metrics)
            if n == 4:
                self._checkpointer.last_snapshot.wait_in_memory(60)
                os.kill(os.getpid(), signal.SIGKILL)

        monkey.setattr(Saving, "step", die_then)
    if trick == "dies with the last save" and me == 2:
        last = Saving.last

        def die_saving(self: Any, *args: Any, **kwargs: Any) -> None:
            self._checkpointer._job.attached.pipeline.submit = lambda job: None
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
            last(self, *args, **kwargs)

        monkey.setattr(Saving, "last", die_saving)
    if trick.startswith("only "):
        # Of all ways out this one alone is fast.
        way = trick.removeprefix("only ")
        speeds = {each: 1e12 if each == way else 1.0 for each in WAYS}
        monkey.setattr(Meter, "bandwidths", lambda self: speeds)
        restore = Checkpointer.restore

        def look(self: Any, *args: Any, **kwargs: Any) -> Any:
            report = restore(self, *args, **kwargs)
            assert report is None or report.tier == ("memory" if way == "parity" else "durable")
            return report

        monkey.setattr(Checkpointer, "restore", look)
    if trick == "little by little":
        # What joins is sent a fifth of it in each step.
        monkey.setattr(transfer, "LEAST_BYTES", 1)
        monkey.setattr(transfer, "LEAST_SHARE", 0.2)
        monkey.setattr(Meter, "bandwidths", lambda self: dict.fromkeys(WAYS, 1.0))
    if trick == "ahead, not updated" and me == 3:
        # It has got blocks while it looked on, and does not make their owners' update.
        bring = ShardedOptimizer.apply

        def look_on(self: Any, *args: Any) -> None:
            if self.owned:
                bring(self, *args)

        monkey.setattr(ShardedOptimizer, "apply", look_on)
    if trick == "ahead, not waited for" and me == 3:
        monkey.setattr(transfer.Transfer, "take", _take_at_once)
    if trick == "disk full":
        write = CommitLog._write

        def fill(self: Any, line: bytes) -> None:
            if b'"kind":"commit","step":3' in line:
                raise StorageError("no space is left")
            write(self, line)

        monkey.setattr(CommitLog, "_write", fill)
    if trick == "staged":
        # As if all tensors of floats were a device's.
        here = generations.connect_ranks
        monkey.setattr(generations, "connect_ranks", lambda *args: staged.Staged(here(*args)))
        monkey.setattr(staged, "_on_host", lambda tensor: not tensor.is_floating_point())
    if trick.startswith("nccl"):
        nccl_double.play(monkey, in_order=trick == "nccl" or me == 0)
    if trick.startswith("slow to hear"):
        share = way_out.share_json

        def hear_late(transport: Any, value: Any, deadline: Any, *, tag: int) -> Any:
            if value == "heard" and trick == "slow to hear, not told":
                return []
            if value == "out" and me == 1:
                transport = Drowsy(transport, partial(sleep_in, transport))
            return share(transport, value, deadline, tag=tag)

        def sleep_in(transport: Any) -> None:
            if trick == "slow to hear":
                time.sleep(0.4)  # nobody goes meanwhile
            else:
                eventually(lambda: transport._group is None, "the end of it, as another one goes")

        monkey.setattr(way_out, "share_json", hear_late)
    if trick == "state not put back":
        monkey.setattr(UserState, "put_back", lambda self: {})
    if trick == "rng by rank":

        def by_rank(seed: int, number: int, index: int) -> Any:
            return micro_batch_rng(seed + me, number, index)

        monkey.setattr(step, "micro_batch_rng", by_rank)
    if trick == "tree reordered":

        def combine(self: Any, there: dict[Any, torch.Tensor], out: torch.Tensor) -> None:
            nodes = sorted(there, key=lambda node: node not in self._own)
            total = there[nodes[0]].clone()
            for node in nodes[1:]:
                total += there[node]
            out.copy_(total)

        monkey.setattr(exchange.Exchange, "_combine", combine)
    if trick == "shadows not updated":
        apply = ShardedOptimizer.apply

        def own_alone(self: Any, gradient: Any, touched: Any, factor: float = 1.0) -> None:
            own = set(self.owned)
            others = {i: {k: v.clone() if isinstance(v, torch.Tensor) else v
                          for k, v in self.export(i).items()}
                      for i in self.held if i not in own}  # fmt: skip
            apply(self, gradient, touched, factor)
            for i, state in others.items():
                self.load(i, state)

        monkey.setattr(ShardedOptimizer, "apply", own_alone)


def _take_at_once(self: Any, deadline: Any) -> None:
    """Takes blocks that were sent ahead for what their memory has in it."""
    coming, self._coming, wait = self._coming, {}, self._wait
    for index, state in coming.items():
        state = {k: torch.zeros_like(v) if torch.is_tensor(v) else v for k, v in state.items()}
        self._optimizer.load(index, state)
    if wait is not None:
        wait(deadline)
    self._wait = None
