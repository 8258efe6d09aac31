"""The processes of one agent: each started by itself, its end seen at once, killed with proof."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch.distributed.elastic.multiprocessing import (
    LogsSpecs,
    SubprocessContext,
    start_processes,
)

from planaria.core.deadline import Deadline
from planaria.core.exits import FirstEnd, exit_code, is_stilled
from planaria.core.procs import UNKNOWN_STATUS, end_sessions
from planaria.elastic.agent.environment import LAUNCHER_PID
from planaria.errors import DeadlineError

_END_S = 10.0
# So long after a SIGKILL a process has ended, if nothing in the kernel keeps it.
_STILLED_S, _LOOK_UP_S = 2.0, 0.1
_LEAST_PAUSE_S, _MOST_PAUSE_S = 0.0002, 0.01


@dataclass
class Trainer:
    """One process, running or ended."""

    member: int
    slot: int
    pid: int
    context: SubprocessContext
    exit_code: int | None = None
    ended: threading.Event = field(default_factory=threading.Event)


class Trainers:
    """Starts and ends the processes of an agent.

    Start them from a thread that outlives them: the kernel ends them with it.

    Args:
        command: Arguments of the Python interpreter that each runs.
        logs: Where they write, and more of their environment.
        on_end: Called with the member and its exit code as soon as a process has ended, in a thread
            of its own. The process is a zombie then: its id is not anybody else's yet.
        on_exit: Called likewise as soon as it runs no code of its own any more, some time before,
            where that can be seen (see `watch`).
        on_stilled: Called with a member that was fenced, that the kernel does not end, and that
            runs no code of its own any more all the same.
    """

    def __init__(
        self,
        command: Sequence[str],
        logs: LogsSpecs,
        on_end: Callable[[int, int], object],
        on_exit: Callable[[int, int], object] = lambda member, code: None,
        on_stilled: Callable[[int], object] = lambda member: None,
    ) -> None:
        self._command = tuple(command)
        self._logs = logs
        self._on_end, self._on_exit, self._on_stilled = on_end, on_exit, on_stilled
        self._all: dict[int, Trainer] = {}

    def start(self, member: int, slot: int, env: Mapping[str, str]) -> Trainer:
        """Starts a process.

        Args:
            member: The id that it has in the job.
            slot: Its place on this node, which it may have after another one.
            env: Its environment, on top of this process's.
        """
        context = cast(
            SubprocessContext,
            start_processes(
                name=f"member-{member}",
                entrypoint=sys.executable,
                args={0: self._command},
                envs={0: dict(env)},
                logs_specs=self._logs,
            ),
        )
        trainer = Trainer(member, slot, context.pids()[0], context)
        self._all[member] = trainer
        threading.Thread(
            target=self._await_end, args=(trainer,), name=f"planaria-end-{member}", daemon=True
        ).start()
        return trainer

    def watch(self, member: int, threads: Collection[int]) -> None:
        """Sees the end of a process as early as that of the first of some of its threads."""
        trainer = self._all.get(member)
        if trainer is None or trainer.ended.is_set():
            return
        try:
            first = FirstEnd(trainer.pid, threads)
        except OSError:
            return  # an older kernel: `_await_end` sees it, later
        threading.Thread(
            target=self._await_exit, args=(trainer, first), name=f"planaria-exit-{member}",
            daemon=True,
        ).start()  # fmt: skip

    def __getitem__(self, member: int) -> Trainer:
        return self._all[member]

    def __contains__(self, member: int) -> bool:
        return member in self._all

    def running(self) -> list[Trainer]:
        """Those that have not ended."""
        return [each for each in list(self._all.values()) if not each.ended.is_set()]

    def all(self) -> list[Trainer]:
        """Those that were ever started."""
        return list(self._all.values())

    def signal(self, member: int, number: int) -> None:
        """Sends a signal to a process; does nothing once it has ended."""
        trainer = self._all.get(member)
        # It is not reaped before `ended` is set, so the id is its own.
        if trainer is not None and not trainer.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(trainer.pid, number)

    def fence(self, member: int) -> None:
        """Kills a process; whatever becomes of that is told."""
        self.signal(member, signal.SIGKILL)
        trainer = self._all.get(member)
        if trainer is not None and not trainer.ended.is_set():
            threading.Thread(
                target=self._await_stillness, args=(trainer,), name=f"planaria-fence-{member}",
                daemon=True,
            ).start()  # fmt: skip

    def reap(self, trainer: Trainer) -> None:
        """Ends what an ended process has left in its session, and gives its id back."""
        with contextlib.suppress(DeadlineError):
            end_sessions({trainer.pid}, f"{LAUNCHER_PID}={os.getpid()}", Deadline(_END_S))
        handler: Any = trainer.context.subprocess_handlers[0]
        handler.proc.poll()

    def end(self, number: signal.Signals, wait_s: float) -> None:
        """Ends all that run: by a signal first, by SIGKILL after `wait_s` seconds."""
        for trainer in self.running():
            self.signal(trainer.member, number)
            self.signal(trainer.member, signal.SIGCONT)
        until = Deadline(wait_s)
        for trainer in self.running():
            trainer.ended.wait(until.timeout())
        for trainer in self.running():
            self.signal(trainer.member, signal.SIGKILL)
        until = Deadline(_END_S)
        for trainer in self.running():
            trainer.ended.wait(until.timeout())
        for trainer in self.all():
            if trainer.ended.is_set():
                self.reap(trainer)

    def _await_stillness(self, trainer: Trainer) -> None:
        if trainer.ended.wait(_STILLED_S):
            return
        while not is_stilled(trainer.pid):
            if trainer.ended.wait(_LOOK_UP_S):
                return
        if not trainer.ended.is_set():
            self._on_stilled(trainer.member)

    def _await_exit(self, trainer: Trainer, first: FirstEnd) -> None:
        first.wait()
        pause, until = _LEAST_PAUSE_S, Deadline(_END_S)
        # The others end about now, unless this one ended for a reason of its own.
        while not (trainer.ended.is_set() or until.expired):
            code = exit_code(trainer.pid)
            if code is not None:
                self._on_exit(trainer.member, code)
                return
            trainer.ended.wait(pause)
            pause = min(2 * pause, _MOST_PAUSE_S)

    def _await_end(self, trainer: Trainer) -> None:
        try:
            # Leaves the zombie: until it is reaped its id cannot be given to another process.
            ended = os.waitid(os.P_PID, trainer.pid, os.WEXITED | os.WNOWAIT)
            assert ended is not None
            code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        except ChildProcessError:
            code = UNKNOWN_STATUS
        trainer.exit_code = code
        trainer.ended.set()
        self._on_end(trainer.member, code)
