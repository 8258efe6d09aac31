"""Notices that this process is about to be taken away, from wherever they come.

A notice only sets a flag. The session tells the others of it in the vote at the step boundary, all
:func:`agree` on who leaves and how long there is, and `planaria.elastic.grace` says what fits.
"""

import contextlib
import json
import logging
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, Self

from planaria.errors import ConfigError

_log = logging.getLogger("planaria.elastic")

#: What is read of a file: more is no number of seconds.
_FILE_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class Notice:
    """That this process will be ended.

    Attributes:
        source: Where it comes from, for people.
        until: When, by `time.monotonic`.
    """

    source: str
    until: float

    @property
    def grace_s(self) -> float:
        """Seconds that are left, never below 0."""
        return max(0.0, self.until - time.monotonic())


class Source(Protocol):
    """Somewhere that a notice may come from."""

    def open(self) -> None:
        """Begins to listen."""
        ...

    def look(self) -> Notice | None:
        """The notice, None as long as there is none; quick, called at each step boundary."""
        ...

    def close(self) -> None:
        """Ends listening."""
        ...


class OnSignal:
    """A signal: SIGTERM, or what ``#SBATCH --signal=USR1@120`` sends.

    Who had a handler before is called, too. The second one of its kind has its usual effect.

    Args:
        number: The signal.
        grace_s: Seconds from it to the end.
    """

    def __init__(self, number: int = signal.SIGTERM, grace_s: float = 30.0) -> None:
        self._number = signal.Signals(number)
        self._grace_s = _seconds(grace_s)
        self._notice: Notice | None = None
        self._previous: Any = None
        self._pid = 0

    def open(self) -> None:
        """See `Source`.

        Raises:
            ConfigError: This is not the main thread, where alone Python lets handlers be set.
        """
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError(f"a notice by {self._number.name} has to be opened in main thread")
        if self._pid:
            return  # it would be the handler before itself, and pass on for ever
        self._pid = os.getpid()
        self._previous = signal.signal(self._number, self._handle)

    def look(self) -> Notice | None:
        """See `Source`."""
        return self._notice

    def close(self) -> None:
        """See `Source`."""
        # Where another handler was installed since, this one stays behind it and only passes on.
        if self._pid and signal.getsignal(self._number) == self._handle:
            with contextlib.suppress(ValueError):  # not in the main thread any more
                # None stands for a handler that was not installed from Python.
                before = signal.SIG_DFL if self._previous is None else self._previous
                signal.signal(self._number, before)
        self._pid = 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = self._notice is None and os.getpid() == self._pid
        if first:
            self._notice = Notice(self._number.name, time.monotonic() + self._grace_s)
        if callable(self._previous):
            self._previous(number, frame)
        elif not first and self._previous in (signal.SIG_DFL, None):
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


class OnFile:
    """A file that appears; it may hold the seconds that are left, or ``{"grace_s": seconds}``.

    Args:
        path: The file.
        grace_s: Seconds from its modification to the end, where it does not say so itself.
    """

    def __init__(self, path: str | os.PathLike[str], grace_s: float = 30.0) -> None:
        self._path = Path(path)
        self._grace_s = _seconds(grace_s)
        self._notice: Notice | None = None

    def open(self) -> None:
        """See `Source`."""

    def look(self) -> Notice | None:
        """See `Source`."""
        if self._notice is None:
            try:
                written = self._path.stat().st_mtime
            except OSError:
                return None
            try:
                with self._path.open(errors="replace") as file:
                    text = file.read(_FILE_CHARACTERS)
            except OSError:
                text = ""  # whoever left it may be another user: it is there, which is enough
            age = max(0.0, time.time() - written)
            grace = _grace_in(text, self._grace_s)
            self._notice = Notice(f"file {self._path}", time.monotonic() + grace - age)
        return self._notice

    def close(self) -> None:
        """See `Source`."""


class OnPoll:
    """Something that is asked every few seconds, in a thread.

    Args:
        call: Returns the seconds that are left, True for `grace_s`, None or False for no notice.
            One that raises is logged once, and asked again.
        every_s: Seconds between two calls.
        grace_s: Seconds that are left when it says True.
        name: For people.
    """

    def __init__(
        self,
        call: Callable[[], float | bool | None],
        every_s: float = 5.0,
        grace_s: float = 30.0,
        name: str = "a poll",
    ) -> None:
        self._call, self._every_s, self._grace_s, self._name = call, every_s, grace_s, name
        self._notice: Notice | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """See `Source`."""
        self._over = threading.Event()
        # A daemon: a call may hang, and must not keep the process.
        self._thread = threading.Thread(
            target=self._work, args=(self._over,), name="planaria-notice", daemon=True
        )
        self._thread.start()

    def look(self) -> Notice | None:
        """See `Source`."""
        return self._notice

    def close(self) -> None:
        """See `Source`."""
        self._over.set()

    def _work(self, over: threading.Event) -> None:
        told = False
        while self._notice is None:
            try:
                found = self._call()
                if found is not None and found is not False:
                    grace = self._grace_s if found is True else _seconds(found)
                    self._notice = Notice(self._name, time.monotonic() + grace)
            except Exception as error:  # whatever a caller's function raises must not end notices
                if not told:
                    _log.warning("asking %s for a notice failed: %s", self._name, error)
                told = True
            if over.wait(self._every_s):
                return


def url_notice(
    url: str, headers: Mapping[str, str] | None = None, *, timeout_s: float = 2.0
) -> Callable[[], float | bool | None]:
    """Makes a function for `OnPoll` that asks a metadata service.

    404 and the texts ``FALSE``, ``NONE`` and nothing mean no notice. JSON with ``time`` (ISO 8601,
    as EC2's ``spot/instance-action``) or ``grace_s`` says how long there is; any other answer, as
    GCE's ``TRUE``, is a notice.

    Args:
        url: The address, http or https.
        headers: Of the request, such as ``{"Metadata-Flavor": "Google"}``.
        timeout_s: Of the request.

    Raises:
        ConfigError: It is not an http address.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is no http address")

    def ask() -> float | bool | None:
        request = urllib.request.Request(url, headers=dict(headers or {}))
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as reply:
                text = reply.read(65536).decode(errors="replace").strip()
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 404:
                return None
            raise
        if text.upper() in ("", "FALSE", "NONE"):
            return None
        left = _grace_in(text, -1.0)
        return True if left < 0 else left

    return ask


def slurm(signal_number: int = signal.SIGUSR1, grace_s: float = 60.0) -> "list[Source]":
    """The sources that fit a SLURM job: its signal, its SIGTERM, and the end of its time.

    Submit with ``#SBATCH --signal=USR1@60`` and ``--requeue``; leave with exit code 75, and requeue
    where the script sees it (``scontrol requeue $SLURM_JOB_ID``).

    Args:
        signal_number: What ``--signal`` names.
        grace_s: Seconds before the end that it names.
    """
    sources: list[Source] = [OnSignal(signal_number, grace_s), OnSignal(signal.SIGTERM)]
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    if end.isdecimal():

        def left() -> float | None:
            seconds = int(end) - time.time()
            return max(0.0, seconds) if seconds <= grace_s else None

        sources.append(OnPoll(left, every_s=1.0, name="the end of the SLURM job's time"))
    return sources


class Notices:
    """Listens to several sources; a context manager, opened in the main thread.

    Args:
        *sources: Where notices may come from; by default SIGTERM.
    """

    def __init__(self, *sources: Source) -> None:
        self._sources = sources or (OnSignal(),)

    def look(self) -> Notice | None:
        """The notice that leaves least time, None without one."""
        found = [notice for s in self._sources if (notice := s.look()) is not None]
        return min(found, key=lambda notice: notice.until, default=None)

    def __enter__(self) -> Self:
        opened: list[Source] = []
        try:
            for source in self._sources:
                source.open()
                opened.append(source)
        except BaseException:
            for source in reversed(opened):
                source.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for source in reversed(self._sources):
            source.close()


@dataclass(frozen=True)
class Leaving:
    """What all members have agreed on at a step boundary.

    Attributes:
        members: Who leaves, in ascending order.
        staying: Who does not.
        grace_s: Seconds that the one with the least has.
    """

    members: tuple[int, ...]
    staying: tuple[int, ...]
    grace_s: float


def agree(graces: Mapping[int, float | None]) -> Leaving | None:
    """Who leaves, from what all members voted: a pure function of the votes.

    Args:
        graces: Member -> seconds that it has left, None for a member without a notice.

    Returns:
        None if nobody has to leave.
    """
    going = {member: grace for member, grace in graces.items() if grace is not None}
    if not going:
        return None
    staying = tuple(sorted(set(graces) - set(going)))
    return Leaving(tuple(sorted(going)), staying, max(0.0, min(going.values())))


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f"a grace of {value!r} s: give a number of seconds >= 0")
    return seconds


def _grace_in(text: str, otherwise: float) -> float:
    """The seconds that a text of some form says, or the other value."""
    try:
        found = json.loads(text)
        if isinstance(found, dict):
            if "time" in found:
                when = datetime.fromisoformat(str(found["time"]))
                when = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
                return max(0.0, when.timestamp() - time.time())
            found = found.get("grace_s")
        if isinstance(found, int | float) and not isinstance(found, bool):
            return _seconds(found)
    except (ValueError, TypeError, OverflowError, RecursionError):
        pass  # whatever it is, it is no reason for training to end
    return otherwise
