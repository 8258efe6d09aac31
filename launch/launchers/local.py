"""The `local` launcher: this node's ranks, through the elastic agent."""

from pathlib import Path

from rich.console import Console

from planaria.elastic.agent.ranks import RankFailure, RankLogs, StopRequest
from planaria.errors import PlanariaError
from planaria.launch import policies, warm, worker
from planaria.launch.agent import Agent, StoppedError
from planaria.launch.config import RunConf, parse_endpoint
from planaria.launch.job import Job, adopt, common_facts
from planaria.launch.launchers import common
from planaria.launch.progress import Progress
from planaria.launch.rendezvous import FixedRendezvous
from planaria.launch.run_folder import DONE, FAILED, PREEMPTED, RunFolder


class LocalLauncher:
    """Starts the ranks of this node and stays until they have ended.

    Args:
        folder: The run's folder.
        conf: What the user asks for.
        job: The run, where it is open already; else the first of several nodes opens it.
        fresh: Move an old run aside, on opening it.
        console: Where progress is shown.
    """

    def __init__(
        self,
        folder: RunFolder,
        conf: RunConf,
        *,
        job: Job | None = None,
        fresh: bool = False,
        console: Console,
    ) -> None:
        self._folder = folder
        self._conf = conf
        self._console = console
        self._stop = StopRequest()
        self._failures: list[RankFailure] = []
        self._progress: Progress | None = None
        self._job = job
        self._rendezvous = self._make_rendezvous()
        if self._job is None and self._rendezvous.is_first:
            try:
                self._job = Job.open(folder, conf, fresh=fresh)
            except PlanariaError as error:
                self._rendezvous.dismiss(str(error))
                self._rendezvous.shutdown()
                raise

    @property
    def job(self) -> Job | None:
        """The run, on the first node."""
        return self._job

    def close(self) -> None:
        """Lets other launchers into the folder, other nodes know."""
        if self._job is not None and self._job.finished:
            self._rendezvous.dismiss("the run is finished")
        self._rendezvous.shutdown()
        self._folder.unlock()

    def run(self) -> common.Outcome:
        """Starts the ranks, and again after a failure as often as configured.

        Raises:
            PlanariaError: The nodes of the job did not come together, or lost each other.
        """
        conf = self._job.conf if self._job is not None else self._conf
        launcher = conf.launcher
        env = common.environment(self._folder, conf, local=self._rendezvous.is_local)
        logs = RankLogs(self._folder.attempt_logs, env, self._attempt)
        agent = Agent(
            rendezvous=self._rendezvous,
            command=["-P", "-m", worker.__name__, *(conf.script or [worker.DEFAULT_JOB])],
            logs=logs,
            stop=self._stop,
            max_restarts=max(
                launcher.max_restarts, conf.elastic.max_restarts if self._is_warm(conf) else 0
            ),
            grace_s=launcher.grace_s,
            fence_s=launcher.fence_s,
            on_failure=self._note_failure,
        )
        self._progress = Progress(
            self._console,
            metrics=self._folder.metrics,
            telemetry_folder=self._folder.telemetry,
            output=self._first_log if conf.script is not None else None,
            steps=conf.steps,
            log_every=conf.log_every,
            on_step=self._job.take_step if self._job is not None else lambda record: None,
        )
        on_signal = policies.signal_number(conf.checkpoint)
        nodes = warm.Nodes(conf, self._folder) if self._is_warm(conf) else None
        outcome: common.Outcome | None = None
        with self._progress, common.signals(self._stop, self._progress, on_signal):
            try:
                outcome = self._run(agent)
            except PlanariaError as error:
                self._end(FAILED, str(error))
                raise
            finally:
                if nodes is not None:
                    nodes.close(over=outcome is not None and outcome.state != FAILED)
        assert outcome is not None
        return outcome

    @staticmethod
    def _is_warm(conf: RunConf) -> bool:
        return conf.elastic.mode == "warm"

    def _run(self, agent: Agent) -> common.Outcome:
        try:
            result = agent.run_job()
        except StoppedError:
            self._rendezvous.set_closed("it was told to stop")
            self._end(PREEMPTED, "ended before its ranks had saved")
            return common.Outcome(PREEMPTED)
        if result.is_failed():
            cause = self._failures[0]
            reason = f"rank {cause.rank} {cause.how}"
            self._rendezvous.set_closed(reason)
            self._end(FAILED, reason)
            return common.Outcome(FAILED, self._failures)
        # A script that was asked to stop ends well whether or not it had come to its end.
        asked = self._conf.script is not None and self._stop.requested
        state = PREEMPTED if agent.preempted or asked else DONE
        self._end(state)
        return common.Outcome(state)

    def _end(self, outcome: str, reason: str | None = None) -> None:
        if self._job is not None:
            self._job.end_attempt(outcome, reason)

    def _note_failure(self, failures: list[RankFailure], will_restart: bool) -> None:
        self._failures = failures
        cause = failures[0]
        reason = f"rank {cause.rank} {cause.how}"
        self._end(FAILED, reason)
        if will_restart and self._progress is not None:
            self._progress.note(f"{reason}; starting the ranks again")

    def _attempt(self) -> int:
        assignment = self._rendezvous.assignment
        return 0 if assignment is None else assignment.attempt

    def _first_log(self) -> Path:
        return self._folder.attempt_logs(self._attempt()) / "rank-0.log"

    def _make_rendezvous(self) -> FixedRendezvous:
        launcher = self._conf.launcher
        return FixedRendezvous(
            nproc=launcher.nproc,
            nnodes=launcher.nnodes,
            endpoint=parse_endpoint(launcher.rdzv) if launcher.rdzv is not None else None,
            timeout_s=launcher.join_timeout_s,
            facts=common_facts(self._conf) if launcher.nnodes > 1 else {},
            load_token=lambda: common.token_of(self._folder),
            begin=self._begin,
            joined=lambda assignment: (
                None if self._job is not None else adopt(self._folder, assignment.config)
            ),
            check=self._check,
        )

    def _begin(self) -> tuple[int, str]:
        assert self._job is not None
        return self._job.begin_attempt()

    def _check(self) -> None:
        if self._stop.requested:
            raise StoppedError
