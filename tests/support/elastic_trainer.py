"""A rank of an elastic job, run as a program: counts steps through every change of members.

Arguments: the most steps (a file `enough` in the folder ends it earlier), the folder for its
journal, and options as JSON: `group` (have a gloo group and add ones up each step; without it torch
is not loaded), `pause` (seconds a step), `facts`, `stubborn` (goes on for so many seconds after
being told to stop), `crash_at` (step at which member `crash_member` raises), `late_member` (one
that never gets as far as joining).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from planaria.core.deadline import Deadline
from planaria.elastic.membership import Standing, View, connect
from planaria.elastic.membership.view import Membership
from planaria.errors import CollectiveError, ConfigError, DeadlineError, StoppedError

BUDGET_S = 60.0
_asked: list[str] = []  # by SIGUSR1: to regroup
PREEMPTED = 75


class Journal:
    """What happened when, a line of JSON each."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)

    def note(self, kind: str, **content: Any) -> None:
        """Writes a line."""
        self._file.write(json.dumps({"kind": kind, "at": time.time(), **content}) + "\n")


def run(membership: Membership, steps: int, journal: Journal, options: dict[str, Any]) -> int:
    """Trains; returns the exit code."""
    view = membership.join(options.get("facts", {}), Deadline(BUDGET_S))
    transport: Any = None
    step = view.step or 0
    losses: list[float] = []

    def hear_of_loss(ids: frozenset[int]) -> None:
        losses.append(time.time())
        if transport is not None and membership.disturbed():
            transport.close()

    membership.on_loss(hear_of_loss)
    noted, enough = 0, Path(sys.argv[2]) / "enough"
    while step < steps and not view.last:
        wanted = membership.change_wanted() or (_asked.pop() if _asked else None)
        if wanted is None and enough.exists():
            wanted = "finish"
        try:
            if noted < view.generation:
                journal.note("view", **view.to_json())
                if options.get("group"):
                    transport = _transport(membership, view)
                journal.note("rebuilt", generation=view.generation)
            membership.progress(step, "compute")
            if options.get("crash_at") == step and options.get("crash_member") == membership.id:
                raise RuntimeError("crashed on purpose")
            time.sleep(options.get("pause", 0.01))
            membership.progress(step, "reduce")
            wanted = _agreed(transport, wanted) if transport is not None else wanted
            if membership.disturbed():
                raise CollectiveError("others regroup")
            step += 1
            if noted < view.generation:
                noted = view.generation
                journal.note("first", generation=view.generation, step=step)
        except (CollectiveError, DeadlineError) as error:
            journal.note("failed", why=str(error), told=losses[-1] if losses else None)
            wanted = "regroup"
        if wanted == "stop":
            journal.note("stops", step=step)
            return PREEMPTED
        if wanted == "finish":
            break
        if wanted == "leave" and transport is None:
            membership.leave("told to", Deadline(BUDGET_S))
            return PREEMPTED
        if wanted is not None:
            if transport is not None:
                transport.close()
                transport = None
            view = membership.regroup(Standing(view.generation, step, wanted), Deadline(BUDGET_S))
            journal.note("agreed", generation=view.generation)
            step = view.step or 0
    membership.finish(Deadline(BUDGET_S))
    journal.note("finished", step=step)
    if view.last:
        journal.note("last", members=view.members, why=view.last)
        return PREEMPTED
    return 0


def _transport(membership: Membership, view: View) -> Any:
    from planaria.elastic.generation import connect_ranks

    return connect_ranks(membership, view, Deadline(BUDGET_S))


def _agreed(transport: Any, wanted: str | None) -> str | None:
    """What any member wants, by a sum over all, which also counts them."""
    import torch

    kinds = ("finish", "join", "leave", "stop")
    flags = torch.tensor([float(wanted == kind) for kind in kinds] + [1.0])
    if transport.size > 1:
        transport.all_reduce(flags)(Deadline(BUDGET_S))
    assert flags[-1].item() == transport.size, "another generation's member has added to the sum"
    return next(
        (k for k, flag in reversed(list(zip(kinds, flags[:-1], strict=True))) if flag > 0), None
    )


def main() -> int:
    """Runs as a member of the job that the environment tells of."""
    steps, folder, options = int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    if options.get("group"):
        import torch

        torch.set_num_threads(1)
    signal.signal(signal.SIGUSR1, lambda *_: _asked.append("asked to"))
    if os.environ["RANK"] == str(options.get("late_member")):
        time.sleep(600)
    membership = connect()
    journal = Journal(folder / f"journal-{membership.id}.jsonl")
    try:
        return run(membership, steps, journal, options)
    except StoppedError as error:
        journal.note("stopped", why=str(error))
        time.sleep(options.get("stubborn", 0))
        return PREEMPTED
    except ConfigError as error:
        journal.note("refused", why=str(error))
        return 2
    finally:
        membership.close()


if __name__ == "__main__":
    sys.exit(main())
