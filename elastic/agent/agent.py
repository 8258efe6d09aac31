"""Torch's elastic agent, made to keep the other ranks alive when one dies.

Torch's own restarts all ranks of a node when one fails, and all nodes when one comes or goes. The
methods that do so are private, and overridden here: `_invoke_run`, `_start_workers`,
`_monitor_workers`, `_shutdown`, `_exit_barrier`. Each rank has a process context of its own, a
thread waits for its end, and who takes part is decided by `planaria.elastic.membership`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.api import Worker
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo

from planaria.elastic.agent.job import Job
from planaria.elastic.agent.ranks import RankFailure, RankLogs, StopRequest, describe, listens
from planaria.elastic.agent.trainers import Trainers
from planaria.elastic.membership.connecting import AGENT_ENV, MEMBER_ENV
from planaria.elastic.membership.rules import Rules
from planaria.errors import NotSupportedError

_LOOK_UP_S = 0.1
_KILL_WAIT_S = 10
_EXIT_S = 30.0

DONE, PREEMPTED, STOPPED = "done", "preempted", "stopped"


@dataclass(frozen=True)
class JobEnd:
    """How a job ended on this node.

    Attributes:
        state: "done", "preempted" (as asked; it can be resumed) or "stopped" (it could not go on).
        reason: Why, if it is not done.
        failures: Ranks of this node that failed in the whole run, in the order in which they did;
            a job that is done may have lost some.
    """

    state: str
    reason: str | None = None
    failures: list[RankFailure] = field(default_factory=list)


class ElasticAgent(LocalElasticAgent):
    """The agent of one node of an elastic job.

    The first agent of a job listens and hosts the coordinator and the store; further ones join it.
    Run it in the main thread: its ranks do not outlive the thread that started them.

    Args:
        command: Arguments of the Python interpreter that each rank runs.
        nproc: Ranks to start on this node.
        rules: Sizes, policy and budgets of the job. An agent that joins gets those of the first.
        logs: Where ranks write, and more of their environment. A rank's number there is its
            member id, which no other has in the whole run.
        stop: Set by the launcher's signal handlers.
        token: The job's token; needed for any address but loopback.
        listen: Address to listen on, port 0 for a free one; on the first agent the store is on the
            same host.
        join: Address of an agent of the job to join, None on the first agent.
        facts: What has to be equal on all agents, by name.
        offer: On the first agent, what agents that join are given, of what JSON holds.
        adopt: On those, called with the offer before ranks start; it may raise.
        grace_s: Seconds for the ranks to save after a request to stop.
        leave_on_stop: Whether a request to stop is for this node alone: its ranks go, others go on.
        preempted_code: Exit code of a rank that has saved and can be resumed.
        on_failure: Called with each rank that fails.
        on_event: Called with what happens, for a timeline: its kind, its content with `at` (seconds
            since 1970). It must be quick, and may be called in any thread.
    """

    def __init__(
        self,
        *,
        command: Sequence[str],
        nproc: int,
        rules: Rules,
        logs: RankLogs,
        stop: StopRequest,
        token: bytes | None = None,
        listen: tuple[str, int] = ("127.0.0.1", 0),
        join: tuple[str, int] | None = None,
        facts: Mapping[str, Any] | None = None,
        offer: Mapping[str, Any] | None = None,
        adopt: Callable[[Mapping[str, Any]], object] = lambda offer: None,
        grace_s: float = 60.0,
        leave_on_stop: bool = False,
        preempted_code: int = 75,
        on_failure: Callable[[RankFailure], object] = lambda failure: None,
        on_event: Callable[[str, Mapping[str, Any]], object] = lambda kind, content: None,
    ) -> None:
        spec = WorkerSpec(
            role="rank",
            local_world_size=nproc,
            rdzv_handler=_Nowhere(),
            entrypoint=sys.executable,
            args=tuple(command),
            max_restarts=0,
            monitor_interval=_LOOK_UP_S,
        )
        super().__init__(spec, logs, shutdown_timeout=_KILL_WAIT_S)
        self.failures: list[RankFailure] = []
        self._rank_logs = logs
        self._stop_request = stop
        self._asked = False
        self._leave_asked = False
        self._grace_s = grace_s
        self._preempted_code = preempted_code
        self._leave_on_stop = leave_on_stop
        self._on_failure = on_failure
        self._on_event = on_event
        self._todo: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._trainers = Trainers(command, logs, self._ended, self._exits, self._stilled)
        self._held: list[tuple[Any, ...]] = []  # what is not to be done yet
        self._dismissed: set[int] = set()
        self._told_to_end: float | None = None
        name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._job = Job(
            name, self, rules, token=token, listen=listen, join=join, facts=facts or {},
            offer=offer or {}, adopt=adopt, on_event=self._event,
        )  # fmt: skip

    @property
    def address(self) -> tuple[str, int]:
        """Where further agents can join."""
        return self._job.address

    def run_job(self) -> JobEnd:
        """Runs this node's ranks to the end of the job.

        Raises:
            ConfigError: An agent to join refuses this one: its facts differ.
            PlanariaError: It could not be joined.
        """
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.ERROR)
        # SIGINT, SIGTERM and SIGHUP are the launcher's: torch's handlers would raise in the midst
        # of whatever runs.
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
        try:
            self.run()
        finally:
            self._job.close()
        return self._end()

    def leave(self) -> None:
        """Has the ranks of this node hand over and go at the next boundary, and the agent after.

        It may be called in a signal handler.
        """
        self._leave_asked = True

    # What the coordinator wants of this machine; called in any thread ----------------------------

    def start(self, member: int, instead_of: int | None) -> None:
        """Has the main thread start a rank."""
        # Python's start takes seconds of a core: those that go on meanwhile recover first.
        rules, now = self._job.rules, time.monotonic()
        rest_s = 0.0 if rules.waits or instead_of is None else rules.rest_s
        self._todo.put(("start", member, instead_of, now + rest_s))

    def fence(self, member: int, reason: str) -> None:
        """Kills a rank that hangs; its end is the proof."""
        self._trainers.fence(member)

    def watch(self, member: int, threads: Collection[int]) -> None:
        """Has the end of a rank seen by that of its threads."""
        self._trainers.watch(member, threads)

    def stop(self, reason: str) -> None:
        """Hears that the job cannot go on: the ranks were told, and have time to end."""
        self._todo.put(("stop", reason))

    # Torch's interface ---------------------------------------------------------------------------

    def _invoke_run(self, role: str = "default") -> RunResult:
        group = self._worker_group
        ids = self._job.open(group.spec.local_world_size)
        world = max(self._job.rules.world, len(ids))
        group.workers = [
            Worker(local_rank=slot, global_rank=member, role_rank=member, world_size=world,
                   role_world_size=world)
            for slot, member in enumerate(ids)
        ]  # fmt: skip
        pids = self._start_workers(group)
        for worker in group.workers:
            worker.id = pids[worker.local_rank]
        group.state = WorkerState.HEALTHY
        while True:
            result = self._monitor_workers(group)
            group.state = result.state
            if result.state != WorkerState.HEALTHY:
                self._exit_barrier()
                return result

    def _start_workers(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, worker_group: WorkerGroup
    ) -> dict[int, Any]:
        return {
            worker.local_rank: self._start_one(worker.global_rank, worker.local_rank)
            for worker in worker_group.workers
        }

    def _monitor_workers(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, worker_group: WorkerGroup
    ) -> RunResult:
        """Waits for something to do, and does it."""
        with contextlib.suppress(queue.Empty):
            self._do(self._todo.get(timeout=_LOOK_UP_S))
        held, self._held = self._held, []
        for task in held:
            self._do(task)
        self._obey()
        if self._job.over:
            self._dismiss_late()
        running = self._trainers.running()
        if running and (self._told_to_end is None or time.monotonic() < self._told_to_end):
            if not self._job.over:
                return RunResult(WorkerState.HEALTHY)
            if self._told_to_end is None:
                self._told_to_end = time.monotonic() + max(self._grace_s, _EXIT_S)
            return RunResult(WorkerState.HEALTHY)
        if running:
            self._trainers.end(signal.SIGKILL, 0)
        elif not (self._job.over or self._job.leaves) or self._held or not self._todo.empty():
            return RunResult(WorkerState.HEALTHY)
        return self._result()

    def _shutdown(
        self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = _KILL_WAIT_S
    ) -> None:
        self._trainers.end(death_sig, timeout)

    def _stop_workers(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, worker_group: WorkerGroup
    ) -> None:
        self._shutdown()

    def _exit_barrier(self) -> None:
        """Nothing: this agent has stayed until the job was over, or was not needed any more."""

    # ---------------------------------------------------------------------------------------------

    def _start_one(self, member: int, slot: int) -> int:
        host, port = self._job.address
        store_host, store_port = self._job.store_address
        spec = self._worker_group.spec
        env = {
            "RANK": str(member),
            "LOCAL_RANK": str(slot),
            "WORLD_SIZE": str(self._job.rules.world),
            "LOCAL_WORLD_SIZE": str(spec.local_world_size),
            "MASTER_ADDR": store_host,
            "MASTER_PORT": str(store_port),
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            AGENT_ENV: f"{host}:{port}",
            MEMBER_ENV: str(member),
        }
        self._set_local_rank_env(cast(Any, env), slot, spec)
        trainer = self._trainers.start(member, slot, env)
        self._event("started", {"member": member, "pid": trainer.pid})
        self._job.started(member, trainer.pid)
        return trainer.pid

    def _exits(self, member: int, code: int) -> None:
        """In the thread that watched it: it runs no more, though the kernel has not ended it."""
        self._event("exits", {"member": member, "exit_code": code})
        self._job.node.ended(member, _how(code))

    def _stilled(self, member: int) -> None:
        """It was killed, and the kernel keeps it in a call, which it does not return from."""
        self._job.node.ended(member, "SIGKILL, and held by the kernel")
        self._event("stilled", {"member": member})

    def _ended(self, member: int, code: int) -> None:
        """In the thread that waited for it, at once."""
        self._job.node.ended(member, _how(code))
        self._event("ended", {"member": member, "exit_code": code})
        self._todo.put(("ended", member))

    def _do(self, task: tuple[Any, ...]) -> None:
        match task:
            case ("start", member, instead_of, not_before):
                if self._told_to_end is not None or self._job.over:
                    self._job.node.ended(member, "it was not started: the job ends")
                elif time.monotonic() < not_before or self._is_ending(instead_of):
                    self._held.append(task)
                else:
                    self._start_one(member, self._slot(instead_of))
            case ("ended", member):
                self._note_end(member)
            case ("stop", _):
                self._told_to_end = self._told_to_end or time.monotonic() + self._grace_s
            case _:
                raise AssertionError(task)

    def _note_end(self, member: int) -> None:
        trainer = self._trainers[member]
        self._trainers.reap(trainer)
        code = trainer.exit_code
        if code is None or code in (0, self._preempted_code):
            return
        if self._job.over and self._job.stopped is None and self._never_took_part(member):
            return  # it came too late
        failure = describe(member, trainer.pid, code, self._rank_logs)
        self.failures.append(failure)
        self._on_failure(failure)

    def _is_ending(self, member: int | None) -> bool:
        """Whether a rank still holds its place, its memory and its device."""
        mine = member is not None and member in self._trainers
        return mine and not self._trainers[cast(int, member)].ended.is_set()

    def _never_took_part(self, member: int) -> bool:
        return member not in self._job.node.admitted

    def _dismiss_late(self) -> None:
        """Ends ranks that have not joined yet: there is nothing left to join."""
        for trainer in self._trainers.running():
            if self._never_took_part(trainer.member) and trainer.member not in self._dismissed:
                self._dismissed.add(trainer.member)
                self._trainers.signal(trainer.member, signal.SIGKILL)

    def _slot(self, instead_of: int | None) -> int:
        taken = {each.slot for each in self._trainers.running()}
        if instead_of is not None and instead_of in self._trainers:
            slot = self._trainers[instead_of].slot
            if slot not in taken:
                return slot
        return next(slot for slot in range(len(taken) + 1) if slot not in taken)

    def _obey(self) -> None:
        """Carries requests of the launcher's to the ranks."""
        stop = self._stop_request
        number, stop.to_pass_on = stop.to_pass_on, None
        for trainer in self._trainers.running() if number is not None else ():
            # One that does not listen yet, or any more, would be ended by it.
            if number is not None and listens(trainer.pid, number):
                self._trainers.signal(trainer.member, number)
        if self._leave_asked and not self._job.leaves:
            self._job.leave()
        if stop.since is None:
            return
        if not self._asked:
            self._asked = True
            if self._leave_on_stop:
                self._job.leave()
            else:
                self._job.node.want_stop()
        over = stop.since + self._grace_s
        self._told_to_end = 0.0 if stop.at_once else min(self._told_to_end or over, over)

    def _result(self) -> RunResult:
        started = self._trainers.all()
        # Torch reports on the workers of its group: all that there ever were.
        self._worker_group.workers = [
            _reported(each.member, each.slot, each.pid) for each in started
        ]
        if self._end().state in (DONE, PREEMPTED):
            values = dict.fromkeys((each.member for each in started), None)
            return RunResult(WorkerState.SUCCEEDED, return_values=cast(Any, values))
        failures = {f.rank: ProcessFailure(0, f.pid, f.exit_code, "") for f in self.failures}
        return RunResult(WorkerState.FAILED, failures=failures)

    def _end(self) -> JobEnd:
        codes = [each.exit_code for each in self._trainers.all()]
        if self._asked or self._job.leaves:
            return JobEnd(PREEMPTED, "it was told to stop", self.failures)
        if self._job.stopped is not None:
            return JobEnd(STOPPED, self._job.stopped, self.failures)
        if self._preempted_code in codes:
            return JobEnd(PREEMPTED, "its ranks stopped early", self.failures)
        return JobEnd(DONE, None, self.failures)

    def _event(self, kind: str, content: Mapping[str, Any]) -> None:
        self._on_event(kind, {**content, "at": time.time()})


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _reported(member: int, slot: int, pid: int) -> Worker:
    worker = Worker(local_rank=slot, global_rank=member, role_rank=member)
    worker.id = pid
    return worker


class _Nowhere(RendezvousHandler):
    """Torch wants to know where agents meet; ours do so in the job itself."""

    def get_backend(self) -> str:
        return "planaria-elastic"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        raise NotSupportedError("members of an elastic job do not meet by torch's rendezvous")

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return "planaria"

    def shutdown(self) -> bool:
        return True
