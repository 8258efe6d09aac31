"""One run from the first node's side: begin, go on or only tell; and the upkeep of its status."""

import hashlib
import json
import threading
import time
from typing import Any

from planaria.errors import ConfigError
from planaria.launch import config, versions
from planaria.launch.config import RunConf
from planaria.launch.metrics import StepRecord
from planaria.launch.run_folder import (
    DONE,
    FAILED,
    RUNNING,
    Attempt,
    RunFolder,
    Status,
    write_atomic,
)

_STATUS_EVERY_S = 1.0


class Job:
    """A run that this process has locked and may start. Made by `open`.

    Attributes:
        folder: Where it lives.
        conf: Its configuration, as frozen.
        status: What `status.json` says.
        remarks: What the user should know about how it goes on.
    """

    def __init__(self, folder: RunFolder, conf: RunConf, remarks: list[str]) -> None:
        self.folder = folder
        self.conf = conf
        self.remarks = remarks
        try:
            self.status = folder.read_status()
        except ConfigError as error:
            self.status = Status()
            remarks.append(f"{error}; its attempts so far are not counted any more")
        self._written = 0.0
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: RunFolder, conf: RunConf, *, fresh: bool) -> "Job":
        """Freezes a new run, or checks that this configuration may go on with the one there.

        Args:
            folder: The run's folder; it stays locked by this process.
            conf: The configuration that the user asks for.
            fresh: Move an old run aside and begin anew.

        Raises:
            ConfigError: Another launcher works in the folder, the folder holds something else, or
                the run there has another configuration or other data, or has lost its checkpoints.
        """
        folder.lock()
        found = versions.gather(conf)
        remarks = []
        if fresh:
            old = folder.move_aside()
            if old is not None:
                remarks.append(f"the old run is now in {old}")
        if folder.exists():
            _refuse_lost_checkpoints(folder, conf)
            frozen, notes = folder.resume(conf, found)
            remarks += notes
        else:
            frozen = folder.freeze(conf, found)
        job = cls(folder, frozen, remarks)
        job._close_lost_attempts()
        return job

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        if self.status.state != DONE:
            return False
        return self.conf.script is not None or self.status.step >= self.conf.steps

    @property
    def begun(self) -> bool:
        """Whether ranks have run before."""
        return bool(self.status.attempts)

    @property
    def attempt(self) -> int:
        """Number of the current attempt, from 0."""
        return self.status.attempts[-1].attempt

    def begin_attempt(self) -> tuple[int, str]:
        """Notes a start of the ranks; returns its number and the frozen configuration."""
        with self._lock:
            launcher = self.conf.launcher
            # Without a status there may still be logs of earlier attempts, not to be overwritten.
            number = self.attempt + 1 if self.begun else self.folder.logged_attempts()
            self.status.attempts.append(
                Attempt(number, launcher.nproc * launcher.nnodes, time.time())
            )
            self.status.state = RUNNING
            self.status.steps = self.conf.steps
            self._write()
        return number, config.dump(self.conf)

    def end_attempt(self, outcome: str, reason: str | None = None) -> None:
        """Notes how the current attempt ended: done, preempted or failed."""
        with self._lock:
            if self.begun and self.status.attempts[-1].ended is None:
                last = self.status.attempts[-1]
                last.ended, last.outcome, last.reason = time.time(), outcome, reason
            self.status.state = outcome
            if outcome == DONE and self.conf.script is None:
                self.status.step = self.conf.steps
            self._write()

    def take_step(self, record: StepRecord) -> None:
        """Notes a finished step; the file follows within a second or so."""
        with self._lock:
            self.status.step = record.step
            if time.monotonic() - self._written > _STATUS_EVERY_S:
                self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        self.folder.write_status(self.status)

    def _close_lost_attempts(self) -> None:
        """Ends what a launcher left open that died; its last word is the age of the file."""
        for attempt in self.status.attempts:
            if attempt.ended is None:
                attempt.ended = max(attempt.started, self.folder.status.stat().st_mtime)
                attempt.outcome = FAILED
                attempt.reason = "the launcher died"


def _refuse_lost_checkpoints(folder: RunFolder, conf: RunConf) -> None:
    """A run that ended well has saved its last step: without it, going on would begin anew.

    Raises:
        ConfigError: No step is there any more.
    """
    try:
        status = folder.read_status()
    except ConfigError:
        return
    extends = status.state == DONE and conf.script is None and status.step < conf.steps
    if extends and not folder.has_checkpoints():
        raise ConfigError(
            f"{folder.path} is done up to step {status.step}, but its checkpoints are gone "
            f"({folder.ckpt} holds none): all {status.step} steps would be taken again. Bring them "
            "back, or begin anew with --fresh"
        )


def common_facts(conf: RunConf) -> dict[str, Any]:
    """What must be equal on all nodes of a job: versions, data, and a digest of the rest."""
    facts = {k: v for k, v in versions.gather(conf).items() if k != "cpu"}
    digest = hashlib.sha256(json.dumps(config.computed(conf), sort_keys=True).encode()).hexdigest()
    return {**facts, "configuration": digest[:16]}


def adopt(folder: RunFolder, text: str) -> None:
    """Takes over the first node's configuration, in a folder of this node's own or a shared one.

    Args:
        folder: The run's folder on this node.
        text: The first node's frozen configuration.

    Raises:
        ConfigError: The folder holds a run with another configuration.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    if folder.exists() and folder.config.read_text() == text:
        return
    if folder.exists():
        here, there = config.load(folder.config), config.parse(text, "the first node")
        changed = config.differences(here, there)
        if changed:
            raise ConfigError(
                f"{folder.path} on this node holds a run with another configuration than the "
                f"first node's ({', '.join(changed)}); give another --run"
            )
    write_atomic(folder.config, text)
