"""Named fault points: places in the code where a test or a drill can make something go wrong.

Code marks a place once it has declared it, and pays one global load for it::

    WRITE_CHUNK = points.declare("checkpoint.write.chunk", "before each chunk is written")
    ...
    points.point(WRITE_CHUNK, step=step)

Somebody else decides what happens there, through ``PLANARIA_FAULTS`` or :func:`arm`::

    PLANARIA_FAULTS="kill@checkpoint.write.*:rank=1,hit=3;sleep=0.5@checkpoint.fsync:times=inf"

A spec is clauses separated by ``;``, each ``action@point-glob[:key=value,...]``.

Actions: ``kill`` (SIGKILL to this process), ``stop`` (SIGSTOP), ``exit=CODE`` (at once, without
clean-up), ``enospc`` and ``eio`` (an ``OSError``), ``raise=Message`` (a
:class:`~planaria.errors.FaultError`), ``sleep=SECONDS``.

Conditions: ``rank=N`` (``RANK``, 0 when unset), ``attempt=N`` (``TORCHELASTIC_RESTART_COUNT``, 0
when unset), ``step=N`` (what the point was passed), ``hit=N`` (from the N-th time on that all other
conditions held in this process; default 1), ``times=N|inf`` (how often it fires; default 1).

With ``PLANARIA_FAULTS_LOG`` set to a folder, each firing leaves a file there, made before the fault
acts, and a clause fires ``times`` times in all processes of one rank together: one that is started
again in the place of a killed one is not killed again.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
import math
import os
import re
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from planaria.errors import ConfigError, FaultError

ENV = "PLANARIA_FAULTS"
LOG_ENV = "PLANARIA_FAULTS_LOG"

GRAMMAR = (
    "action@point-glob[:key=value,...], clauses separated by ';'; "
    "actions: kill, stop, exit=CODE, enospc, eio, raise=MESSAGE, sleep=SECONDS; "
    "keys: rank, hit, times (a number or inf), attempt, step"
)

Callback = Callable[[str, int | None], object]
"""Called as ``fn(point name, step)``; what it raises, the point raises."""

_NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")
_GLOB = re.compile(r"[a-z0-9_.*?\[\]!-]+")


@dataclass(eq=False)
class _Fault:
    """One armed clause and how often it was reached and has fired."""

    text: str
    glob: str
    act: Callback
    rank: int | None = None
    attempt: int | None = None
    step: int | None = None
    hit: int = 1
    times: float = 1
    reached: int = field(default=0, init=False)
    fired: int = field(default=0, init=False)

    def matches(self, name: str, step: int | None) -> bool:
        return (
            fnmatch.fnmatchcase(name, self.glob)
            and (self.step is None or self.step == step)
            and (self.rank is None or os.environ.get("RANK", "0") == str(self.rank))
            and (
                self.attempt is None
                or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == str(self.attempt)
            )
        )

    def due(self) -> bool:
        """Counts one visit; the caller holds the lock."""
        self.reached += 1
        if self.reached < self.hit or self.fired >= self.times:
            return False
        self.fired += 1
        return True


# None while nothing is armed; otherwise replaced as a whole, so that point() reads it unlocked.
_armed: tuple[_Fault, ...] | None = None
_declared: dict[str, str] = {}
_lock = threading.Lock()


def point(name: str, *, step: int | None = None) -> None:
    """Marks a place where faults can be injected; does nothing unless one is armed for it.

    Args:
        name: A name that was given to :func:`declare`.
        step: The training step that is being worked on, for faults with a ``step`` condition.

    Raises:
        FaultError: A ``raise`` fault fired.
        OSError: An ``enospc`` or ``eio`` fault fired.
        ConfigError: Faults are armed, a pytest test is running, and the name is not declared.
    """
    faults = _armed
    if faults is not None:
        _reach(faults, name, step)


def _reach(faults: tuple[_Fault, ...], name: str, step: int | None) -> None:
    if name not in _declared and "PYTEST_CURRENT_TEST" in os.environ:
        raise ConfigError(f"fault point {name!r} is not declared: call points.declare() for it")
    with _lock:
        due = [fault for fault in faults if fault.matches(name, step) and fault.due()]
    folder = os.environ.get(LOG_ENV)
    for fault in due:
        if not folder or _log_firing(folder, fault, name, step):
            fault.act(name, step)


def _log_firing(folder: str, fault: _Fault, name: str, step: int | None) -> bool:
    """Notes that a fault is about to act; False if one of its rank's processes has used it up."""
    rank, pid = os.environ.get("RANK", "0"), os.getpid()
    place = f"{zlib.crc32(fault.text.encode()):08x}-{rank}"
    place += f"-{fault.fired}" + (f"-{pid}" if fault.times == math.inf else "")
    fired = {"t": time.time(), "clause": fault.text, "point": name, "step": step,
             "rank": rank, "pid": pid}  # fmt: skip
    # Made under another name: a reader never sees half of it, and link() fails where it exists.
    scratch = os.path.join(folder, f".{place}.{pid}.{threading.get_ident()}")
    try:
        with open(scratch, "x") as file:
            json.dump(fired, file)
        os.link(scratch, os.path.join(folder, f"{place}.json"))
    except FileExistsError:
        return False
    except OSError as error:
        raise ConfigError(f"cannot write into {LOG_ENV}={folder}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
    return True


def declare(name: str, meaning: str) -> str:
    """Registers a fault point; called where the module that has the point is loaded.

    Args:
        name: Dotted lower-case name that starts with its room, as ``checkpoint.write.chunk``.
        meaning: One line for people: what is happening when this point is reached.

    Returns:
        The name.

    Raises:
        ConfigError: The name is malformed, or declared already with another meaning.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"fault point name {name!r} is not lower-case words joined by dots (a.b_c.d)"
        )
    if _declared.setdefault(name, meaning) != meaning:
        raise ConfigError(
            f"fault point {name!r} is declared twice: as {_declared[name]!r} and as {meaning!r}"
        )
    return name


def declared() -> dict[str, str]:
    """Returns name and meaning of every point that the modules loaded so far declare."""
    return dict(sorted(_declared.items()))


def arm(spec: str) -> None:
    """Adds the faults of a spec to those that are armed.

    Args:
        spec: See the module's text for its grammar.

    Raises:
        ConfigError: The spec is malformed; nothing is armed then.
    """
    _add(parse(spec))


def arm_callback(point_glob: str, fn: Callback) -> None:
    """Calls ``fn(name, step)`` each time that a point which matches the glob is reached.

    Args:
        point_glob: Shell-style pattern over point names.
        fn: It runs in the thread that reached the point; the point raises what it raises.
    """
    if not _GLOB.fullmatch(point_glob):
        raise ConfigError(f"{point_glob!r} is not a pattern over fault point names")
    _add([_Fault(f"callback@{point_glob}", point_glob, fn, times=math.inf)])


def disarm() -> None:
    """Removes every armed fault and callback."""
    global _armed
    with _lock:
        _armed = None


@contextmanager
def armed(spec: str = "", callbacks: Mapping[str, Callback] | None = None) -> Iterator[None]:
    """Arms more faults for a block; after it, what was armed before is armed again.

    Args:
        spec: Faults, see :func:`arm`.
        callbacks: Pattern over point names to function, see :func:`arm_callback`.

    Yields:
        Nothing; what is armed inside the block by other calls ends with it, too.

    Raises:
        ConfigError: The spec or a pattern is malformed.
    """
    global _armed
    before = _armed
    try:
        arm(spec)
        for glob, fn in (callbacks or {}).items():
            arm_callback(glob, fn)
        yield
    finally:
        with _lock:
            _armed = before


def fired() -> dict[str, int]:
    """Returns for every armed clause how often it has fired in this process.

    A drill looks here for clauses at 0, which tested nothing: a pattern that matches no point, or a
    condition that never held.
    """
    faults = _armed or ()
    counts: dict[str, int] = {}
    with _lock:
        for fault in faults:
            counts[fault.text] = counts.get(fault.text, 0) + fault.fired
    return counts


def parse(spec: str) -> list[_Fault]:
    """Reads a spec without arming it, so that a command line can check it early.

    Args:
        spec: See the module's text for its grammar.

    Returns:
        One fault a clause, in order; none for an empty spec.

    Raises:
        ConfigError: Names the first bad clause, what is wrong with it, and the grammar.
    """
    clauses = (clause.strip() for clause in spec.split(";"))
    return [_parse_clause(clause) for clause in clauses if clause]


def _add(faults: list[_Fault]) -> None:
    global _armed
    if faults:
        with _lock:
            _armed = (_armed or ()) + tuple(faults)


def _parse_clause(clause: str) -> _Fault:
    def bad(why: str) -> ConfigError:
        return ConfigError(f"bad fault clause {clause!r}: {why}. Grammar: {GRAMMAR}")

    action, at, rest = clause.partition("@")
    if not at:
        raise bad("it has no '@'")
    glob, _, conditions = rest.partition(":")
    glob = glob.strip()
    if not _GLOB.fullmatch(glob):
        raise bad(f"{glob!r} is not a pattern over fault point names")

    verb, has_argument, argument = (part.strip() for part in action.partition("="))
    if verb not in _ACTIONS:
        raise bad(f"there is no action {verb!r}")
    make, wants_argument = _ACTIONS[verb]
    if wants_argument != bool(has_argument):
        raise bad(f"action {verb!r} {'needs' if wants_argument else 'takes no'} '=value'")
    try:
        fault = _Fault(clause, glob, make(argument))
    except ValueError as error:
        raise bad(str(error)) from None

    seen: set[str] = set()
    for condition in filter(None, (c.strip() for c in conditions.split(","))):
        key, _, value = (part.strip() for part in condition.partition("="))
        least = _CONDITIONS.get(key)
        if least is None:
            raise bad(f"there is no condition {key!r}")
        if key in seen:
            raise bad(f"condition {key!r} is given twice")
        seen.add(key)
        if key == "times" and value == "inf":
            fault.times = math.inf
            continue
        if not re.fullmatch(r"[0-9]{1,18}", value) or int(value) < least:
            raise bad(f"{key}={value!r} is not a whole number >= {least}")
        setattr(fault, key, int(value))
    return fault


def _kill(argument: str) -> Callback:
    return lambda name, step: os.kill(os.getpid(), signal.SIGKILL)


def _stop(argument: str) -> Callback:
    # Aimed at this thread: a signal to the process may be taken by another one, and this one would
    # run on past the point.
    return lambda name, step: signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def _exit(argument: str) -> Callback:
    if not re.fullmatch(r"[0-9]{1,3}", argument) or int(argument) > 255:
        raise ValueError(f"exit code {argument!r} is not a whole number from 0 to 255")
    code = int(argument)
    return lambda name, step: os._exit(code)


def _os_error(number: int) -> Callable[[str], Callback]:
    def make(argument: str) -> Callback:
        def act(name: str, step: int | None) -> None:
            raise OSError(number, f"{os.strerror(number)} (injected at {name})")

        return act

    return make


def _raise(argument: str) -> Callback:
    if not argument:
        raise ValueError("the message is empty")

    def act(name: str, step: int | None) -> None:
        raise FaultError(f"{argument} (injected at {name})")

    return act


def _sleep(argument: str) -> Callback:
    try:
        seconds = float(argument)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86400:
        raise ValueError(f"{argument!r} is not a number of seconds from 0 to 86400")
    return lambda name, step: time.sleep(seconds)


# Action -> (maker of what it does, whether it takes "=value").
_ACTIONS: dict[str, tuple[Callable[[str], Callback], bool]] = {
    "kill": (_kill, False),
    "stop": (_stop, False),
    "exit": (_exit, True),
    "enospc": (_os_error(errno.ENOSPC), False),
    "eio": (_os_error(errno.EIO), False),
    "raise": (_raise, True),
    "sleep": (_sleep, True),
}

# Condition -> its least value.
_CONDITIONS = {"rank": 0, "attempt": 0, "step": 0, "hit": 1, "times": 1}


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


# Another thread may have held the lock at the moment of a fork; in the child nobody would free it.
os.register_at_fork(after_in_child=_new_lock)

if os.environ.get(ENV):
    try:
        arm(os.environ[ENV])
    except ConfigError as error:
        raise ConfigError(f"environment variable {ENV}: {error}") from None
