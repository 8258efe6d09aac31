"""What ways to start ranks have in common: how a launch ends, signals, environment, token."""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field

from planaria import telemetry
from planaria.core.token import TOKEN_ENV, load_token
from planaria.elastic.agent.ranks import RankFailure, StopRequest
from planaria.errors import ConfigError
from planaria.launch import exit_codes, warm, worker
from planaria.launch.config import RunConf
from planaria.launch.progress import Progress
from planaria.launch.run_folder import DONE, FAILED, RunFolder


@dataclass(frozen=True)
class Outcome:
    """How a launch ended: done, preempted or failed, and which ranks failed, the cause first."""

    state: str
    failures: list[RankFailure] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """What the launcher exits with, see `planaria.launch.exit_codes`."""
        if self.state != FAILED:
            return exit_codes.DONE if self.state == DONE else exit_codes.PREEMPTED
        codes = (exit_codes.CONFIG, exit_codes.CORRUPT)
        cause = self.failures[0] if self.failures else None
        # The same number without an error is a script's own, and means what it likes.
        if cause is None or cause.error is None or cause.exit_code not in codes:
            return exit_codes.FAILED
        return cause.exit_code


@contextlib.contextmanager
def signals(stop: StopRequest, progress: Progress, on_signal: int | None = None) -> Iterator[None]:
    """Turns Ctrl-C, SIGTERM and a closed terminal into a request to stop.

    The signal that ranks save on is passed on to them.
    """

    def ask(number: int, _frame: object) -> None:
        again = stop.requested and number == signal.SIGINT
        if not stop.requested:
            progress.note(
                "stopping: the ranks finish their step and save; Ctrl-C (again) ends them at once"
            )
        stop.request(at_once=again)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in numbers}
    if on_signal is not None:

        def pass_on(number: int, _frame: object) -> None:
            stop.to_pass_on = number

        replaced = signal.signal(on_signal, pass_on)
        before.setdefault(signal.Signals(on_signal), replaced)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def environment(folder: RunFolder, conf: RunConf, *, local: bool) -> dict[str, str]:
    """What every rank's environment has beside torch's variables.

    Args:
        folder: The run's folder.
        conf: Its configuration.
        local: Whether all ranks are on this machine.
    """
    env = {
        worker.RUN_DIR: str(folder.path),
        telemetry.ENV: str(folder.telemetry),
        "OMP_NUM_THREADS": str(conf.threads),
        "PYTHONUNBUFFERED": "1",
        **warm.environment(folder),
    }
    if local and os.path.exists("/sys/class/net/lo"):
        env["GLOO_SOCKET_IFNAME"] = "lo"
    return env


def token_of(folder: RunFolder) -> bytes:
    """The job's token, on a node that needs it.

    Raises:
        ConfigError: It has none.
    """
    token = load_token(folder.path)
    if token is None:
        raise ConfigError(
            f"this node has no token of the job: set {TOKEN_ENV} to the same text on all "
            f"nodes, or share the first node's run folder ({folder.path})"
        )
    return token
