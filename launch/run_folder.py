"""The folder of a run: what was frozen into it, what state it is in, who works in it.

::

    runs/demo/
    ├── config.yaml      the configuration, frozen; written last, so that it makes the run exist
    ├── versions.json    of what runs: python, torch, data ...; for the record, as status.json is
    ├── token            secret of the job, mode 0600
    ├── status.json      running, done, preempted or failed; the step; every attempt
    ├── metrics.jsonl    one line for each step that rank 0 finished
    ├── elastic.jsonl    of elastic sessions: ranks that were lost or came, and each change
    ├── address          where nodes join an elastic session, while it runs
    ├── ckpt/            checkpoints
    ├── telemetry/       spans and counters of each rank
    └── logs/attempt-K/rank-R.log
"""

import contextlib
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from planaria.core.token import make_token
from planaria.errors import ConfigError
from planaria.launch import config
from planaria.launch.config import RunConf

RUNNING, DONE, PREEMPTED, FAILED = "running", "done", "preempted", "failed"

#: Version keys that decide the numbers so directly that a run cannot go on under another value.
_FIXED_VERSIONS = ("data",)


@dataclass
class Attempt:
    """One start of the ranks. Times are seconds since the epoch."""

    attempt: int
    ranks: int
    started: float
    ended: float | None = None
    outcome: str = RUNNING
    reason: str | None = None


@dataclass
class Status:
    """What `status.json` says."""

    state: str = RUNNING
    step: int = 0
    steps: int = 0
    attempts: list[Attempt] = field(default_factory=list)


class RunFolder:
    """Paths of a run, and the small files that the launcher keeps in it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self._lock: int | None = None

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def versions(self) -> Path:
        return self.path / "versions.json"

    @property
    def token(self) -> Path:
        return self.path / "token"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def elastic(self) -> Path:
        return self.path / "elastic.jsonl"

    @property
    def address(self) -> Path:
        return self.path / "address"

    @property
    def ckpt(self) -> Path:
        return self.path / "ckpt"

    @property
    def telemetry(self) -> Path:
        return self.path / "telemetry"

    def attempt_logs(self, attempt: int) -> Path:
        """Where the ranks of one attempt write what they print."""
        return self.path / "logs" / f"attempt-{attempt}"

    def exists(self) -> bool:
        """Whether a run was frozen here."""
        return self.config.is_file()

    # The lock -------------------------------------------------------------------------------

    def lock(self) -> None:
        """Makes this process the only launcher of the run, until it ends.

        The lock is the kernel's, so it cannot outlive the process.

        Raises:
            ConfigError: The folder cannot be made or written, holds something that is not a run,
                or another launcher works in it.
        """
        try:
            self._refuse_foreign()
            self.path.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be used as a run folder ({error.strerror}); "
                "give another one with --run"
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(fd, 200).decode(errors="replace").strip() or "another process"
            os.close(fd)
            raise ConfigError(
                f"{self.path} is in use by {owner}; wait for it, or give another --run"
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        self._lock = fd

    def unlock(self) -> None:
        """Lets other launchers in."""
        fd, self._lock = self._lock, None
        if fd is not None:
            os.close(fd)

    # Freezing -------------------------------------------------------------------------------

    def move_aside(self) -> Path | None:
        """Renames the folder of an old run, so that a fresh one can begin; nothing is deleted.

        The caller holds the lock before and after.
        """
        if not self.exists():
            return None
        stamp = time.strftime("%Y%m%d-%H%M%S")
        target = self.path.with_name(f"{self.path.name}.old-{stamp}")
        count = 0
        while target.exists():
            count += 1
            target = self.path.with_name(f"{self.path.name}.old-{stamp}-{count}")
        self.path.rename(target)
        self.unlock()
        self.lock()
        return target

    def freeze(self, conf: RunConf, versions: Mapping[str, Any]) -> RunConf:
        """Starts a run here: writes token, versions and, last, the configuration.

        Returns:
            The configuration as frozen: open choices, such as the length of the decay, are made.

        Raises:
            ConfigError: The folder already holds something that is not a run.
        """
        self._refuse_foreign()
        frozen = settle(conf, None)
        make_token(self.token)
        write_atomic(self.versions, json.dumps(dict(versions), indent=2) + "\n")
        write_atomic(self.config, config.dump(frozen))
        return frozen

    def _refuse_foreign(self) -> None:
        if self.exists() or not self.path.is_dir():
            return
        # What a start that was cut short may have left.
        ours = re.compile(r"\.lock|token|versions\.json|\.(versions\.json|config\.yaml)\.\d+")
        others = sorted(p.name for p in self.path.iterdir() if not ours.fullmatch(p.name))
        if others:
            raise ConfigError(
                f"{self.path} holds {', '.join(others[:3])} and no run; give an empty or a new "
                "folder with --run"
            )

    def resume(self, conf: RunConf, versions: Mapping[str, Any]) -> tuple[RunConf, list[str]]:
        """Checks that a configuration may go on with this run, and freezes what may change.

        Returns:
            The configuration as frozen, and remarks for the user on what changed.

        Raises:
            ConfigError: The configuration or the data differs from what the run began with.
        """
        old = config.load(self.config)
        new = settle(conf, old)
        changed = config.differences(old, new)
        if changed:
            rows = [f"  {key}: {was!r} -> {now!r}" for key, (was, now) in changed.items()]
            if "steps" in changed:
                rows.append("  (a run can be extended, not shortened)")
            raise ConfigError(
                f"{self.path} is a run with another configuration:\n"
                + "\n".join(rows)
                + "\nGive the configuration it began with, another --run, or --fresh, which moves "
                "the old folder aside."
            )
        remarks = self._check_versions(versions)
        if new.steps > old.steps:
            remarks.append(f"extended from {old.steps} to {new.steps} steps")
        if new.launcher.nproc * new.launcher.nnodes != old.launcher.nproc * old.launcher.nnodes:
            remarks.append(
                f"now {new.launcher.nproc * new.launcher.nnodes} ranks instead of "
                f"{old.launcher.nproc * old.launcher.nnodes}: the same batches and the same state, "
                "but gradients are summed in another order, so losses agree to rounding only"
            )
        if new != old:
            write_atomic(self.config, config.dump(new))
        return new, remarks

    def _check_versions(self, versions: Mapping[str, Any]) -> list[str]:
        try:
            old = read_json(self.versions)
        except ConfigError:
            old = None
        if old is None:
            write_atomic(self.versions, json.dumps(dict(versions), indent=2) + "\n")
            return [
                f"{self.versions.name} could not be read: what versions and data the run had so "
                "far is not known; those of now were noted"
            ]
        earlier = old.pop("earlier", [])
        changed = {k: v for k, v in versions.items() if old.get(k) != v}
        for key in _FIXED_VERSIONS:
            if key in changed and old.get(key) is not None:
                raise ConfigError(
                    f"{self.path} was trained on other data: fingerprint {old[key]!r}, now "
                    f"{changed[key]!r}. Bring the data back, or start again with --fresh."
                )
        if not changed:
            return []
        record = {**versions, "earlier": [*earlier, old]}
        write_atomic(self.versions, json.dumps(record, indent=2) + "\n")
        return [
            f"{key} is now {now!r}, was {old.get(key)!r}: losses may differ in the last bits"
            for key, now in changed.items()
        ]

    # The status -----------------------------------------------------------------------------

    def read_status(self) -> Status:
        """The status; that of a run which has not started where there is none.

        Raises:
            ConfigError: It cannot be read. Nothing depends on it but what people are told.
        """
        data = read_json(self.status)
        if data is None:
            return Status()
        try:
            attempts = [Attempt(**a) for a in data.pop("attempts", [])]
            status = Status(**data, attempts=attempts)
            kinds = [(status.state, str), (status.step, int), (status.steps, int)]
            for attempt in attempts:
                kinds += [(attempt.attempt, int), (attempt.started, int | float),
                          (attempt.ended, int | float | None)]  # fmt: skip
            if not all(isinstance(value, kind) for value, kind in kinds):
                raise TypeError("a field of another kind")
            return status
        except TypeError as error:
            raise ConfigError(f"{self.status} is not a status of this version: {error}") from error

    def write_status(self, status: Status) -> None:
        """Replaces `status.json` at once, so that no reader sees half of it."""
        write_atomic(self.status, json.dumps(asdict(status), indent=2) + "\n")

    def logged_attempts(self) -> int:
        """How many attempts have logs here, going by the highest number."""
        found = (re.fullmatch(r"attempt-(\d+)", p.name) for p in self.path.glob("logs/*"))
        return max((int(m[1]) + 1 for m in found if m), default=0)

    def has_checkpoints(self) -> bool:
        """Whether a step is committed in the folder."""
        return any(self.ckpt.glob("step-*/manifest.json"))

    def is_active(self) -> bool:
        """Whether a launcher works in the folder right now."""
        if self._lock is not None:
            return True
        try:
            fd = os.open(self.path / ".lock", os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(fd)
        return False


def settle(conf: RunConf, old: RunConf | None) -> RunConf:
    """Makes the choices that a configuration leaves open, as the run made them before.

    The learning rate decays over the steps that were first asked for. Extending a run goes on at
    the floor: a curve that stretched would make the steps already taken wrong in hindsight.
    """
    import copy

    settled = copy.deepcopy(conf)
    if settled.optim.decay_steps is None:
        settled.optim.decay_steps = old.optim.decay_steps if old is not None else conf.steps
    return settled


def read_json(path: Path) -> dict[str, Any] | None:
    """A small JSON file's object, or None where there is no such file.

    Raises:
        ConfigError: The file cannot be read or holds something else.
    """
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return data


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, text: str) -> None:
    """Writes a small file so that readers see all of it or what was there before.

    That holds after a loss of power, too.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
