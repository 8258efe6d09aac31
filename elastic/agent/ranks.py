"""Processes of ranks as their starter sees them: requests to stop, failures, log files."""

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

from planaria.elastic.agent.environment import ATTEMPT, LAUNCHER_PID

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


def listens(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


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


def describe(rank: int, pid: int, exit_code: int, logs: "RankLogs") -> RankFailure:
    """How a rank failed, with the error that it recorded, if it has."""
    log, path = logs.log_of(rank), logs.error_of(rank)
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
