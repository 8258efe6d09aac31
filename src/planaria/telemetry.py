"""Spans, events and counters: one file of JSON lines per process, next to nothing when off.

Each line is one record::

    {"t": 1731234567.123456, "kind": "span", "name": "checkpoint.write", "dur": 0.034, "rank": 0,
     "pid": 4711, "thread": "MainThread", "step": 120, "bytes": 1048576}

``t`` is wall-clock seconds (at the start, for a span) and ``dur`` seconds; a span whose block
raised has the error's class under ``error``, a counter its number under ``value``; the rest are the
caller's attributes, with ``_`` added to a name that the record has itself. Each line is handed to
the system when it is made, so a reader can follow a live run and a killed process loses nothing.
Losing telemetry never costs the run: when the file cannot be written, one warning is logged and
telemetry is off from then on.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import operator
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from planaria.errors import ConfigError

ENV = "PLANARIA_TELEMETRY"

_FULL = (errno.ENOSPC, errno.EDQUOT)

_log = logging.getLogger("planaria.telemetry")


def configure(folder: str | os.PathLike[str] | None, rank: int | None = None) -> None:
    """Starts to record into a folder, or stops.

    Args:
        folder: It is made when missing; this process adds ``rank-<rank>.<pid>.jsonl`` to it. None
            turns telemetry off, whatever the environment says.
        rank: Rank of this process; by default what ``RANK`` says, 0 when unset.

    Raises:
        ConfigError: The rank is not a whole number >= 0, or the folder cannot be made or used.
    """
    global _sink
    sink = None if folder is None else _Sink(Path(folder), _rank(rank))
    if sink is not None:
        try:
            sink.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno not in _FULL:
                raise ConfigError(
                    f"cannot use {str(folder)!r} as telemetry folder: {error.strerror}; "
                    "choose one that can be made and written"
                ) from error
            sink.give_up(error)
    with _setup:
        old, _sink = _sink, sink
    if isinstance(old, _Sink):
        old.close()


def enabled() -> bool:
    """Returns whether records are kept; ask before computing something only to record it."""
    sink = _current()
    return sink is not None and not sink.off


def span(name: str, /, **attrs: Any) -> Span | _NoSpan:
    """Times a block: ``with span("checkpoint.write", step=3) as s: ...; s.set(bytes=n)``.

    Args:
        name: Dotted name that starts with its room, as ``checkpoint.write``.
        **attrs: What else to record; a value that JSON lacks is recorded as its text.

    Returns:
        A context manager. It yields an object whose ``set(**attrs)`` adds attributes.
    """
    sink = _current()
    return _NO_SPAN if sink is None else Span(sink, name, attrs)


def event(name: str, /, **attrs: Any) -> None:
    """Records that something happened now; arguments as for :func:`span`."""
    sink = _current()
    if sink is not None:
        sink.write(time.time(), {"kind": "event", "name": name}, attrs)


def count(name: str, value: float, /, **attrs: Any) -> None:
    """Records a number now: an amount to be added up, or a gauge's reading.

    Args:
        name: Dotted name, as ``checkpoint.bytes``.
        value: The number.
        **attrs: As for :func:`span`.
    """
    sink = _current()
    if sink is not None:
        sink.write(time.time(), {"kind": "count", "name": name, "value": value}, attrs)


def flush() -> None:
    """Puts what was recorded onto the disk itself, so that it survives the machine's crash."""
    sink = _current()
    if sink is not None:
        sink.sync()


def close() -> None:
    """Ends recording; records are dropped until :func:`configure` is called again."""
    configure(None)


def read(folder: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Reads the records of all ranks and attempts, in order of their ``t``.

    A last line that a killed process left unfinished is skipped; any other line that is no record
    is skipped too, with one logged warning a file.

    Args:
        folder: The folder that was given to :func:`configure`.

    Yields:
        One dictionary a record.

    Raises:
        ConfigError: The folder does not exist.
    """
    if not Path(folder).is_dir():
        raise ConfigError(f"there is no telemetry folder {str(folder)!r}")
    yield from follow(folder).poll()


def follow(folder: str | os.PathLike[str]) -> Follower:
    """Returns a reader of what is added to a folder; the folder need not exist yet."""
    return Follower(Path(folder))


class Follower:
    """Reads a telemetry folder while it grows. Made by :func:`follow`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}
        self._warned: set[Path] = set()

    def poll(self) -> list[dict[str, Any]]:
        """Returns the records added since the last call, all files merged, in order of ``t``.

        A line still being written is left for a later call.
        """
        records: list[dict[str, Any]] = []
        for path in sorted(self._folder.glob("rank-*.jsonl")):
            records += self._poll_file(path)
        records.sort(key=lambda record: record["t"])
        return records

    def _poll_file(self, path: Path) -> Iterator[dict[str, Any]]:
        start = self._read.get(path, 0)
        try:
            with path.open("rb") as file:
                file.seek(start)
                data = file.read()
        except FileNotFoundError:  # removed since it was listed
            return
        data = data[: data.rfind(b"\n") + 1]
        self._read[path] = start + len(data)
        for line in data.splitlines():
            try:
                record = json.loads(line)
                if not _is_record(record):
                    raise TypeError
            except (ValueError, TypeError, KeyError, RecursionError):
                if path not in self._warned:
                    self._warned.add(path)
                    _log.warning("skipped a line of %s that is no telemetry record", path)
                continue
            yield record


def _is_record(record: Any) -> bool:
    """Whether it is one that this module has written, as far as readers rely on it."""
    if not isinstance(record, dict) or not isinstance(record.get("name"), str):
        return False
    times = [record.get("t"), *([record.get("dur")] if record.get("kind") == "span" else [])]
    numbers = [*times, record.get("rank", 0), record.get("pid", 0), record.get("step") or 0]
    return all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)


class Span:
    """A block that is being timed; made by :func:`span`."""

    __slots__ = ("_attrs", "_name", "_sink", "_start", "_wall")

    def __init__(self, sink: _Sink, name: str, attrs: dict[str, Any]) -> None:
        self._sink = sink
        self._name = name
        self._attrs = attrs

    def set(self, **attrs: Any) -> None:
        """Adds attributes to the record, which is made when the block ends."""
        self._attrs.update(attrs)

    def __enter__(self) -> Self:
        self._wall = time.time()
        self._start = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        dur = round(time.perf_counter() - self._start, 9)
        head = {"kind": "span", "name": self._name, "dur": dur}
        if kind is not None:
            head["error"] = kind.__name__
        self._sink.write(self._wall, head, self._attrs)


class _NoSpan:
    """What :func:`span` returns while telemetry is off."""

    __slots__ = ()

    def set(self, **attrs: Any) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


class _Sink:
    """The file of this process; opened at the first record."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self.rank = rank
        self._pid = os.getpid()
        self._fd: int | None = None
        self.off = False
        self._lock = threading.Lock()

    def write(self, t: float, head: dict[str, Any], attrs: dict[str, Any]) -> None:
        if self.off:
            return
        record = {
            "t": round(t, 6),
            **head,
            "rank": self.rank,
            "pid": self._pid,
            "thread": threading.current_thread().name,
        }
        own = frozenset(record)
        for key, value in attrs.items():
            record[key + "_" if key in own else key] = value
        line = _encode(record)
        with self._lock:
            if self.off:
                return
            try:
                if self._fd is None:
                    self._fd = self._open()
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(self._fd, rest) :]
            except OSError as error:
                self.give_up(error)

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        stem = f"rank-{self.rank:05d}.{self._pid}"
        # Process ids come round, soonest in containers, where an attempt may have its forerunner's.
        for again in range(100_000):
            name = f"{stem}-{again}.jsonl" if again else f"{stem}.jsonl"
            try:
                return os.open(self.folder / name, flags, 0o644)
            except FileExistsError:
                continue
        raise FileExistsError(errno.EEXIST, "too many telemetry files of one rank and process id")

    def give_up(self, error: OSError) -> None:
        """Ends recording for good; the caller holds the lock, or the sink is not in use yet."""
        self.off = True
        self._close_fd()
        _log.warning("telemetry is off: cannot write into %s: %s", self.folder, error)

    def sync(self) -> None:
        with self._lock:
            if self._fd is not None:
                try:
                    os.fsync(self._fd)
                except OSError as error:
                    self.give_up(error)

    def close(self) -> None:
        with self._lock:
            self.off = True
            self._close_fd()

    def _close_fd(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            try:
                os.close(fd)
            except OSError as error:
                _log.warning("closing a telemetry file in %s: %s", self.folder, error)

    def forked(self) -> None:
        """Makes the sink that of the child of a fork: with a file of its own, and an open lock."""
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._close_fd()


class _Unset:
    """State before the first use: the environment has not been looked at."""


_NO_SPAN = _NoSpan()
_sink: _Sink | _Unset | None = _Unset()
_setup = threading.Lock()


def _current() -> _Sink | None:
    sink = _sink
    return _from_environment() if isinstance(sink, _Unset) else sink


def _from_environment() -> _Sink | None:
    global _sink
    with _setup:
        if isinstance(_sink, _Unset):
            _sink = None
            folder = os.environ.get(ENV)
            if folder:
                # Not a caller's mistake but the environment's, met in the midst of training: so
                # nothing here raises.
                rank = os.environ.get("RANK", "0")
                sink = _Sink(Path(folder), int(rank) if rank.isdecimal() else 0)
                try:
                    sink.folder.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    sink.give_up(error)
                _sink = sink
        return _sink


def _rank(rank: int | None) -> int:
    text = os.environ.get("RANK", "0") if rank is None else str(rank)
    if not (text.isdecimal() and text.isascii()):
        raise ConfigError(f"rank {text!r} is not a whole number >= 0")
    return int(text)


def _encode(record: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(record, default=_plain, allow_nan=False, separators=(",", ":"))
    except (ValueError, TypeError, RecursionError):
        # NaN and infinities are not JSON; keys may be no strings, or values hold themselves.
        record = {key: _simple(value) for key, value in record.items()}
        text = json.dumps(record, separators=(",", ":"))
    return text.encode() + b"\n"


def _plain(value: object) -> object:
    """A number for what converts to one (numpy and torch scalars), text for anything else."""
    for convert in (operator.index, float):
        try:
            return convert(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError, OverflowError):
            continue
    return _text(value)


def _simple(value: object) -> object:
    value = value if isinstance(value, str | int | float | None) else _plain(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception as error:  # a value's own __str__: telemetry must not raise into training
        return f"<{type(value).__name__}: {type(error).__name__}>"


def _after_fork() -> None:
    global _setup
    _setup = threading.Lock()
    if isinstance(_sink, _Sink):
        _sink.forked()


os.register_at_fork(after_in_child=_after_fork)
