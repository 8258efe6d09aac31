"""The launcher of elastic sessions: this node's ranks, which live on when others are lost."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from planaria.core.token import load_token
from planaria.elastic.agent import ElasticAgent, JobEnd, RankFailure, RankLogs, StopRequest
from planaria.elastic.membership.rules import Rules
from planaria.errors import ConfigError, PlanariaError
from planaria.launch import config, policies, versions, worker
from planaria.launch.config import RunConf, parse_endpoint
from planaria.launch.elastic_events import FENCED, GENERATION, LOST, EventsWriter
from planaria.launch.exit_codes import PREEMPTED as PREEMPTED_CODE
from planaria.launch.job import Job, adopt
from planaria.launch.launchers import common
from planaria.launch.launchers.common import Outcome
from planaria.launch.progress import Progress
from planaria.launch.run_folder import DONE, FAILED, PREEMPTED, RunFolder, write_atomic

_LOOPBACK = "127.0.0.1"
_STATES = {"done": DONE, "preempted": PREEMPTED, "stopped": FAILED}


class SessionLauncher:
    """Starts the ranks of this node as members of an elastic session.

    Args:
        folder: The run's folder.
        conf: What the user asks for.
        job: The run, on the first node.
        join: Where an agent of the session listens, HOST:PORT, on a node that joins it.
        console: Where progress is shown.

    Raises:
        ConfigError: The configuration cannot be carried out.
    """

    def __init__(
        self,
        folder: RunFolder,
        conf: RunConf,
        *,
        job: Job | None = None,
        join: str | None = None,
        console: Console,
    ) -> None:
        if conf.launcher.nnodes > 1:
            raise ConfigError(
                "elastic=session starts on one node; others come with: planaria run --join ADDRESS"
            )
        self.job = job
        self._folder, self._conf, self._console = folder, conf, console
        self._join = None if join is None else parse_endpoint(join)
        self._stop = StopRequest()
        self._progress: Progress | None = None
        self._events: EventsWriter | None = None
        self._number = 0

    def close(self) -> None:
        """Lets other launchers into the folder."""
        if self._events is not None:
            self._events.close()
        if self.job is not None:
            self._folder.address.unlink(missing_ok=True)
            self._folder.unlock()

    def run(self) -> Outcome:
        """Runs this node's ranks to the end of the session.

        Raises:
            PlanariaError: The session to join refuses this node, or is not there.
        """
        if self.job is not None:
            self._number, _ = self.job.begin_attempt()
            self._events = EventsWriter(self._folder.elastic)
        conf = self.job.conf if self.job is not None else self._conf
        host = conf.elastic.host or _LOOPBACK
        agent = ElasticAgent(
            command=["-P", "-m", worker.__name__, *(conf.script or [worker.DEFAULT_JOB])],
            nproc=conf.launcher.nproc,
            rules=_rules(conf),
            logs=RankLogs(
                self._folder.attempt_logs,
                common.environment(self._folder, conf, local=host == _LOOPBACK),
                lambda: self._number,
            ),
            stop=self._stop,
            token=load_token(self._folder.path),
            listen=(host, conf.elastic.port if self._join is None else 0),
            join=self._join,
            facts=_facts(conf),
            offer={
                "config": config.dump(conf),
                "attempt": self._number,
                "ckpt": str(self._folder.ckpt.resolve()),
            },
            adopt=self._adopt,
            grace_s=conf.launcher.grace_s,
            leave_on_stop=self._join is not None,
            preempted_code=PREEMPTED_CODE,
            on_failure=self._note_failure,
            on_event=self._note_event,
        )
        self._progress = Progress(
            self._console,
            metrics=self._folder.metrics,
            telemetry_folder=self._folder.telemetry,
            output=self._first_log if conf.script is not None else None,
            steps=conf.steps,
            log_every=conf.log_every,
            on_step=self.job.take_step if self.job is not None else lambda record: None,
            first=None,
        )
        if self._join is None:
            address = _text(agent.address)
            write_atomic(self._folder.address, address + "\n")
            self._progress.note(f"more ranks join with: planaria run --join {address}")
        on_signal = policies.signal_number(conf.checkpoint)
        with self._progress, common.signals(self._stop, self._progress, on_signal):
            try:
                end = agent.run_job()
            except PlanariaError as error:
                self._end(FAILED, str(error))
                raise
        return self._outcome(end)

    def _outcome(self, end: JobEnd) -> Outcome:
        state = _STATES[end.state]
        # A script ends well whether or not it had come to its end.
        if state == DONE and self._conf.script is not None and self._stop.requested:
            state = PREEMPTED
        failures = end.failures if state == FAILED else []
        self._end(state, end.reason)
        return Outcome(state, sorted(failures, key=RankFailure.order))

    def _end(self, outcome: str, reason: str | None = None) -> None:
        if self.job is not None:
            self.job.end_attempt(outcome, reason)

    def _adopt(self, offer: Mapping[str, Any]) -> None:
        """Takes over what the first node says of the run, before ranks start here."""
        text = str(offer["config"])
        adopt(self._folder, text)
        if self._progress is not None:
            conf = config.parse(text, "the first node")
            self._progress.expect(conf.steps, conf.log_every)
        self._number = int(offer["attempt"])
        # All ranks save to one folder; where it is not to be seen here they are refused.
        here, there = self._folder.ckpt, Path(offer["ckpt"])
        if there.parent.is_dir() and not here.exists() and not here.is_symlink():
            here.symlink_to(there)

    def _note_failure(self, failure: RankFailure) -> None:
        if self._progress is not None:
            self._progress.note(f"rank {failure.rank} {failure.how}; its output: {failure.log}")

    def _note_event(self, kind: str, content: Mapping[str, Any]) -> None:
        if self._events is not None:
            self._events.write(kind, content)
        if self._progress is None:
            return
        if kind == GENERATION and content["generation"] > 1:
            self._progress.note(_tell_generation(content))
        elif kind == FENCED:
            self._progress.note(f"rank {content['member']} is ended: {content['reason']}")
        elif kind == LOST and content.get("joining"):
            self._progress.note(f"rank {content['member']} was lost while it joined")
        elif kind in ("refused", "slow", "stopped"):
            more = content.get("reason") or f"{content.get('step_s', 0):.2f} s a step"
            self._progress.note(f"rank {content.get('member', '')} {kind}: {more}")

    def _first_log(self) -> Path:
        logs = self._folder.attempt_logs(self._number)
        with contextlib.suppress(OSError, ValueError):
            found = [int(p.stem.removeprefix("rank-")) for p in logs.glob("rank-*.log")]
            return logs / f"rank-{min(found)}.log"
        return logs / "rank-0.log"


def _facts(conf: RunConf) -> dict[str, Any]:
    """What has to be equal on all nodes before ranks start: what computes, but not with what.

    A node that joins takes over the configuration; data, model and the rest are compared by ranks.
    """
    return {k: v for k, v in versions.gather(conf).items() if k not in ("cpu", "data", "threads")}


def _rules(conf: RunConf) -> Rules:
    elastic, nproc = conf.elastic, conf.launcher.nproc
    return Rules(
        world=nproc,
        policy=elastic.policy,
        minimum=min(elastic.min_world, nproc),
        maximum=elastic.max_world or conf.data.batch_size // conf.data.micro_batch_size,
        hang_s=elastic.hang_s,
        recovery_s=elastic.recovery_s,
        join_s=conf.launcher.join_timeout_s,
    )


def _tell_generation(view: Mapping[str, Any]) -> str:
    parts = []
    if view["lost"]:
        parts.append(f"without {', '.join(map(str, view['lost']))}")
    if view["joined"]:
        parts.append(f"with {', '.join(map(str, view['joined']))}")
    noun = "rank" if len(view["members"]) == 1 else "ranks"
    where = "" if view["step"] is None else f" from step {view['step']}"
    return f"going on{where} on {len(view['members'])} {noun}, {' and '.join(parts)}"


def _text(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
