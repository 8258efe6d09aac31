"""Starts the ranks of a node through torch's elastic agent, watches them, ends them.

What torch's agent does not do by itself is here: ranks that are asked to stop finish their step
and save (exit code 75); after a failure the others are ended soon, not in half a minute; one rank's
failure ends the job on all nodes; each rank has one log file; no rank outlives the launcher, even
one that is killed. What ranks have started is ended when they are, but for what leads a session of
its own, and for all of it where the launcher itself is killed.
"""

import contextlib
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch.distributed import Store
from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.api import Worker
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from planaria.core.deadline import Deadline
from planaria.core.procs import end_sessions
from planaria.elastic.agent.environment import LAUNCHER_PID
from planaria.elastic.agent.ranks import (
    RankFailure,
    RankLogs,
    StopRequest,
    describe,
    listens,
)
from planaria.errors import CollectiveError, DeadlineError
from planaria.launch.exit_codes import DONE, PREEMPTED
from planaria.launch.rendezvous import Assignment, FixedRendezvous

_MONITOR_S = 0.1
_KILL_WAIT_S = 10


class StoppedError(Exception):
    """A request to stop ended the ranks before they could save and stop by themselves."""


class Agent(LocalElasticAgent):
    """The elastic agent of one node.

    Args:
        rendezvous: Where the nodes meet.
        command: Arguments of the Python interpreter that each rank runs.
        logs: Where ranks write, and their environment.
        stop: Set by the launcher's signal handlers.
        max_restarts: How often a failed attempt is repeated.
        grace_s: Seconds for the ranks to save after a request to stop.
        fence_s: Seconds from one rank's failure to the SIGKILL of the others.
        on_failure: Called with the failures of an attempt, the probable cause first, and whether
            another attempt follows.
    """

    def __init__(
        self,
        *,
        rendezvous: FixedRendezvous,
        command: Sequence[str],
        logs: RankLogs,
        stop: StopRequest,
        max_restarts: int,
        grace_s: float,
        fence_s: float,
        on_failure: Callable[[list[RankFailure], bool], None],
    ) -> None:
        spec = WorkerSpec(
            role="rank",
            local_world_size=rendezvous.node.nproc,
            rdzv_handler=rendezvous,
            entrypoint=sys.executable,
            args=tuple(command),
            max_restarts=max_restarts,
            monitor_interval=_MONITOR_S,
        )
        super().__init__(spec, logs, shutdown_timeout=_KILL_WAIT_S)
        self.preempted = False
        self._rendezvous_handler = rendezvous
        self._rank_logs = logs
        self._stop = stop
        self._forwarded = False
        self._grace_s = grace_s
        self._fence_s = fence_s
        self._on_failure = on_failure

    def run_job(self) -> RunResult:
        """Runs the job to its end.

        Returns:
            Torch's result; `preempted` tells whether ranks stopped early, as asked.

        Raises:
            StoppedError: The ranks were ended before they could stop by themselves.
            PlanariaError: The nodes did not come together, or lost each other.
        """
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.ERROR)
        # SIGINT, SIGTERM and SIGHUP are the launcher's: torch's handlers would raise in the midst
        # of whatever runs.
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
        try:
            return cast(RunResult, self.run())
        finally:
            self._end_what_ranks_started()

    def _assign_worker_ranks(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, store: Store, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        assignment = self._rendezvous_handler.assignment
        assert isinstance(assignment, Assignment)
        first, world = assignment.first_rank(group_rank), assignment.world_size
        return [
            Worker(local_rank=i, global_rank=first + i, role_rank=first + i, world_size=world,
                   role_world_size=world)
            for i in range(spec.local_world_size)
        ]  # fmt: skip

    def _monitor_workers(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, worker_group: WorkerGroup
    ) -> RunResult:
        codes = {local: handler.proc.poll() for local, handler in self._handlers().items()}
        ended = {local: code for local, code in codes.items() if code is not None}
        if self._forwarded and -signal.SIGTERM in ended.values():
            # The request came before this rank could listen; the others cannot go on without it.
            self._end_ranks(signal.SIGKILL, 0)
            raise StoppedError
        failed = [local for local, code in ended.items() if code not in (DONE, PREEMPTED)]
        if failed:
            return self._failed(worker_group, failed)
        if len(ended) == len(codes):
            self.preempted = self._stop.requested or PREEMPTED in ended.values()
            self._end_ranks(signal.SIGKILL, 0)
            ranks = [worker.global_rank for worker in worker_group.workers]
            return RunResult(WorkerState.SUCCEEDED, return_values=dict.fromkeys(ranks))
        reason = self._rendezvous_handler.closing_reason()
        if reason is not None:
            self._end_ranks(signal.SIGTERM, self._fence_s)
            raise CollectiveError(f"another node gave the job up: {reason}")
        self._obey()
        return RunResult(WorkerState.HEALTHY)

    def _obey(self) -> None:
        """Carries a request to stop to the ranks; ends them when their time is over."""
        stop = self._stop
        number, stop.to_pass_on = stop.to_pass_on, None
        for handler in self._handlers().values() if number is not None else ():
            # One that does not listen yet, or any more, would be ended by it.
            if number is not None and listens(handler.proc.pid, number):
                handler.proc.send_signal(number)
        if stop.since is None:
            return
        if not self._forwarded:
            self._forwarded = True
            self._remaining_restarts = 0
            for handler in self._handlers().values():
                handler.proc.send_signal(signal.SIGTERM)
        if stop.at_once or time.monotonic() - stop.since > self._grace_s:
            self._end_ranks(signal.SIGKILL, 0)
            raise StoppedError

    def _failed(self, worker_group: WorkerGroup, local_ranks: Sequence[int]) -> RunResult:
        handlers = self._handlers()
        ranks = {worker.local_rank: worker.global_rank for worker in worker_group.workers}
        failures = [
            describe(ranks[i], handlers[i].proc.pid, handlers[i].proc.returncode, self._rank_logs)
            for i in local_ranks
        ]
        # A rank that waits for the dead one would sit out its group's timeout: fence it.
        self._end_ranks(signal.SIGTERM, self._fence_s)
        for local, handler in handlers.items():
            code = handler.proc.returncode
            if local in local_ranks or code in (None, DONE, PREEMPTED):
                continue
            failure = describe(ranks[local], handler.proc.pid, max(code, 1), self._rank_logs)
            # What ended by itself meanwhile may be the cause, and so may what was about to end with
            # an error of its own; what was merely ended here is not.
            if code > 0 or failure.error is not None:
                failures.append(failure)
        failures.sort(key=RankFailure.order)
        self._on_failure(failures, self._remaining_restarts > 0)
        result = {
            f.rank: ProcessFailure(
                f.rank - worker_group.workers[0].global_rank, f.pid, f.exit_code, ""
            )
            for f in failures
        }
        return RunResult(WorkerState.FAILED, failures=result)

    def _exit_barrier(self) -> None:
        self._rendezvous_handler.wait_for_all()

    def _handlers(self) -> dict[int, Any]:
        context = self._pcontext
        assert isinstance(context, SubprocessContext)
        return context.subprocess_handlers

    def _end_ranks(self, sig: signal.Signals, wait_s: float) -> None:
        if self._pcontext is not None:
            self._pcontext.close(sig, math.ceil(max(wait_s, 1)))
            self._end_what_ranks_started()

    def _end_what_ranks_started(self) -> None:
        """Each rank leads a session: when all have ended, what is left in there has no purpose."""
        if self._pcontext is None or sys.platform != "linux":
            return
        leaders = {handler.proc.pid for handler in self._handlers().values()}
        with contextlib.suppress(DeadlineError):  # in the kernel's hands, as a rank may be
            end_sessions(leaders, f"{LAUNCHER_PID}={os.getpid()}", Deadline(_KILL_WAIT_S))
