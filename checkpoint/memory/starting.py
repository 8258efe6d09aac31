"""Finding the snapshot process of a node, or starting one; whoever comes first does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

from planaria import errors
from planaria.checkpoint.memory.client import NodeClient
from planaria.checkpoint.memory.process import Options
from planaria.checkpoint.memory.runtime import Place
from planaria.core.deadline import Deadline
from planaria.core.points import ENV as FAULTS_ENV
from planaria.core.procs import is_alive
from planaria.core.token import TOKEN_ENV, load_token, make_token
from planaria.errors import ConfigError, DeadlineError, PlanariaError, WireError

#: Faults of the snapshot process itself; those of the job's ranks are not for it.
SNAPSHOT_FAULTS_ENV = "PLANARIA_SNAPSHOT_FAULTS"
#: How long one that lives may be out of reach before it is taken for hung: it binds its socket
#: anew within a second, and answers at once.
_UNREACHABLE_S = 5.0
_ANSWER_S = 10.0


def connect_or_start(
    options: Options, name: str, deadline: Deadline, *, token: bytes | None = None
) -> NodeClient:
    """Connects to the node's snapshot process; starts one if there is none, or it hangs.

    Args:
        options: How it is to be, if it must be started.
        name: How this rank is called in messages.
        deadline: When to give up.
        token: The job's token, where the environment does not say it.

    Raises:
        ConfigError: It cannot be started here.
        WireError: The one that is there is of another job: it holds another token.
        DeadlineError: Not in time.
    """
    place = Place.of(options.job, options.node)
    with place.locked(deadline):
        token = token or job_token(place)
        client = _connect(place, token, name, deadline)
        if client is None:
            _start(place, options, token, deadline)
            try:
                client = NodeClient(place, token, name, deadline)
            except OSError as error:
                raise WireError(f"the snapshot process ended at once: see {place.log}") from error
        return client


def job_token(place: Place) -> bytes:
    """The token of the environment, of the run's folder, or else one made for this machine."""
    token = load_token(os.environ.get("PLANARIA_RUN_DIR"))
    return make_token(place.token) if token is None else token


def _connect(place: Place, token: bytes, name: str, deadline: Deadline) -> NodeClient | None:
    """A connection to the process that is there. One that is dead or hung is cleared away."""
    within = deadline.sub(_UNREACHABLE_S)
    while True:
        try:
            return NodeClient(place, token, name, deadline.sub(_ANSWER_S))
        except DeadlineError:  # it takes connections, and does not answer
            deadline.check(f"the snapshot process of {place.path}")
        except (OSError, WireError) as error:
            reset = isinstance(error, WireError)
            if reset and not isinstance(error.__cause__, OSError):
                raise  # it is alive, and will not have us
            info = place.info()
            if info is None or not info.alive:
                return None
            if not within.expired:  # it binds its socket again if somebody removed it, or is dying
                time.sleep(0.1)
                continue
            if reset:
                raise
        # It is stopped, or hangs: what it holds is out of reach in any case.
        _fence(place, deadline)
        return None


def _fence(place: Place, deadline: Deadline) -> None:
    """Kills the process of a place, and waits until it is dead."""
    info = place.info()
    if info is None:
        return
    with contextlib.suppress(ConfigError):
        while is_alive(info.process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(info.process.pid, signal.SIGKILL)
            deadline.check(f"the end of snapshot process {info.process.pid}")
            time.sleep(0.01)


def _start(place: Place, options: Options, token: bytes, deadline: Deadline) -> None:
    environment = {**os.environ, TOKEN_ENV: token.decode(errors="surrogateescape")}
    # It is no rank, and what is to befall ranks is not for it.
    for key in (FAULTS_ENV, "RANK", "LOCAL_RANK", "PLANARIA_LAUNCHER_PID"):
        environment.pop(key, None)
    if SNAPSHOT_FAULTS_ENV in os.environ:
        environment[FAULTS_ENV] = os.environ[SNAPSHOT_FAULTS_ENV]
    read, write = os.pipe()
    try:
        with open(place.log, "ab") as log:
            subprocess.run(
                [sys.executable, "-P", "-m", "planaria.checkpoint.memory.process",
                 str(place.path), options.to_json(), str(write)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=(write,),
                start_new_session=True,
                check=True,
                timeout=deadline.timeout(),
            )  # fmt: skip
        os.close(write)
        write = -1
        word = _word(read, deadline)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"cannot start a snapshot process for {place.path}: {error}; see {place.log}"
        ) from error
    finally:
        os.close(read)
        if write >= 0:
            os.close(write)
    if word != "serves":
        kind, _, message = word.partition(": ")
        known = getattr(errors, kind, ConfigError)
        is_ours = isinstance(known, type) and issubclass(known, PlanariaError)
        raise (known if is_ours else ConfigError)(
            message or f"the snapshot process ended before it served: see {place.log}"
        )


def _word(fd: int, deadline: Deadline) -> str:
    """What the process says of its start."""
    import select

    said = b""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while not said.endswith(b"\n"):
        if not poll.poll(deadline.timeout() * 1e3):
            raise deadline.error("the start of a snapshot process")
        more = os.read(fd, 4096)
        if not more:
            break
        said += more
    return said.decode(errors="replace").strip()
