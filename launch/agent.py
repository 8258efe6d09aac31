"""Starts the ranks of a node through torch's elastic agent, watches them, ends them.

What torch's agent does not do by itself is here: ranks that are asked to stop finish their step
and save (exit code 75); after a failure the others are ended soon, not in half a minute; one rank's
failure ends the job on all nodes; each rank has one log file; no rank outlives the launcher, even
one that is killed. What ranks have started is ended when they are, but for what leads a session of
its own, and for all of it where the launcher itself is killed.
"""

import contextlib
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch.distributed import Store
from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.api import Worker
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from planaria.core.deadline import Deadline
from planaria.core.procs import end_sessions
from planaria.errors import CollectiveError, DeadlineError
from planaria.launch.exit_codes import DONE, PREEMPTED
from planaria.launch.rendezvous import Assignment, FixedRendezvous
from planaria.launch.worker import ATTEMPT, LAUNCHER_PID

_MONITOR_S = 0.1
_KILL_WAIT_S = 10

# Errors of a rank that lost a peer: the peer's own failure is the one to tell first.
_CONSEQUENCES = ("CollectiveError", "DistNetworkError", "DistBackendError", "DistStoreError")
_CONSEQUENCE_TEXTS = ("closed by peer", "reset by peer", "gloo", "NCCL", "Broken pipe")


class StopRequest:
    """What signals have asked of the launcher; set in their handlers, read by the agent."""

    def __init__(self) -> None:
        self.since: float | None = None
        self.at_once = False
        self.to_pass_on: int | None = None  # a signal that ranks save on, and train on

    @property
    def requested(self) -> bool:
        return self.since is not None

    def request(self, *, at_once: bool = False) -> None:
        """Asks the ranks to save and stop, or ends them `at_once`."""
        if self.since is None:
            self.since = time.monotonic()
        self.at_once = self.at_once or at_once


def _listens(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


class StoppedError(Exception):
    """A request to stop ended the ranks before they could save and stop by themselves."""


@dataclass(frozen=True)
class RankFailure:
    """How one rank failed."""

    rank: int
    pid: int
    exit_code: int
    log: Path
    error: str | None = None
    traceback: str | None = None
    when: float = field(default_factory=time.time)

    @property
    def how(self) -> str:
        """Signal, exception or exit code, as a phrase that follows the rank."""
        if self.exit_code < 0:
            try:
                name = signal.Signals(-self.exit_code).name
            except ValueError:
                name = f"signal {-self.exit_code}"
            return f"was killed by {name}"
        if self.error is not None:
            first = self.error.partition("\n")[0]
            return f"failed with {first if len(first) <= 200 else first[:197] + '...'}"
        return f"exited with code {self.exit_code}"

    @property
    def is_consequence(self) -> bool:
        """Whether it looks as if the rank failed because another one had."""
        text = self.error or ""
        if self.exit_code == -signal.SIGABRT and not text:
            return True  # NCCL's watchdog
        return text.startswith(_CONSEQUENCES) or any(t in text for t in _CONSEQUENCE_TEXTS)

    def order(self) -> tuple[bool, bool, float, int]:
        """Sorts the probable cause first: no consequences, signals before errors, by time."""
        return (self.is_consequence, self.exit_code >= 0, self.when, self.rank)


class RankLogs(LogsSpecs):
    """Log files of the ranks, and what else their environment needs, for each attempt.

    Args:
        folder: Returns the log folder of an attempt.
        env: Added to the environment of every rank.
        attempt: Returns the number of the attempt that is starting.
    """

    def __init__(
        self,
        folder: Callable[[int], Path],
        env: Mapping[str, str],
        attempt: Callable[[], int],
    ) -> None:
        super().__init__()
        self._folder = folder
        self._env = dict(env)
        self._attempt = attempt

    @property
    def root_log_dir(self) -> str:
        return str(self._folder(self._attempt()).parent)

    def log_of(self, rank: int) -> Path:
        """The log file of a global rank in the current attempt."""
        return self._folder(self._attempt()) / f"rank-{rank}.log"

    def error_of(self, rank: int) -> Path:
        """Where torch's `record` leaves the traceback of a global rank."""
        return self._folder(self._attempt()) / f"rank-{rank}.error.json"

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        self._folder(self._attempt()).mkdir(parents=True, exist_ok=True)
        logs, errors = {}, {}
        for local_rank, env in envs.items():
            rank = int(env["RANK"])
            logs[local_rank] = str(self.log_of(rank))
            errors[local_rank] = str(self.error_of(rank))
            env.update(self._env)
            env[ATTEMPT] = str(self._attempt())
            env[LAUNCHER_PID] = str(os.getpid())
            env["TORCHELASTIC_ERROR_FILE"] = errors[local_rank]
        # Both streams start at the same file; each rank joins them before it prints.
        return LogsDest(stdouts=logs, stderrs=dict(logs), error_files=errors)


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
            if number is not None and _listens(handler.proc.pid, number):
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
            self._describe(ranks[i], handlers[i].proc.pid, handlers[i].proc.returncode)
            for i in local_ranks
        ]
        # A rank that waits for the dead one would sit out its group's timeout: fence it.
        self._end_ranks(signal.SIGTERM, self._fence_s)
        for local, handler in handlers.items():
            code = handler.proc.returncode
            if local in local_ranks or code in (None, DONE, PREEMPTED):
                continue
            failure = self._describe(ranks[local], handler.proc.pid, max(code, 1))
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

    def _describe(self, rank: int, pid: int, exit_code: int) -> RankFailure:
        log = self._rank_logs.log_of(rank)
        path = self._rank_logs.error_of(rank)
        try:
            message: Any = json.loads(path.read_text())["message"]
            return RankFailure(
                rank, pid, exit_code, log,
                error=str(message["message"]),
                traceback=str(message["extraInfo"]["py_callstack"]),
                when=path.stat().st_mtime,
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError):
            return RankFailure(rank, pid, exit_code, log)

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
