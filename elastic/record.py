"""The record of a run: every committed step and every change of members, in one small file.

One line an entry, JSON, with a checksum of its bytes::

    {"crc":"8f3a11c0","entry":{"kind":"commit","step":12,"generation":2,"loss":"0x1.8p+1",...}}

Each line is handed to the system in one write, so a killed process leaves at most one torn line,
at the end, which the next writer removes. Whoever writes is for the members to agree on; the others
only read.
"""

import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import crc32c

from planaria.errors import CorruptError, StateError, StorageError

_HEAD = b'{"crc":"%08x","entry":'
_HEAD_NBYTES = len(_HEAD % 0)


@dataclass(frozen=True)
class Commit:
    """One committed step.

    Attributes:
        step: Steps committed with it; the first one is 1.
        generation: The view that took it.
        members: Its members.
        position: Data position after it: samples, or whatever the data counts.
        rng: What its random numbers came from: seed, and the step's own number.
        loss: Its loss, as :meth:`float.hex`, None if it had none.
        attempt: How often it had been tried before.
        votes: Of each member what it voted.
        digests: Digests of blocks, where they were taken.
        time: When, in seconds since the epoch.
    """

    kind: ClassVar[str] = "commit"
    step: int
    generation: int
    members: tuple[int, ...]
    position: int
    rng: tuple[int, int]
    loss: str | None = None
    attempt: int = 0
    votes: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    time: float = 0.0

    def same_numbers(self, other: "Commit") -> bool:
        """Whether both say the same of what was computed, whoever computed it."""
        return (self.step, self.position, self.rng, self.loss) == (
            other.step, other.position, other.rng, other.loss
        ) and all(other.digests.get(k, d) == d for k, d in self.digests.items())  # fmt: skip


@dataclass(frozen=True)
class Change:
    """A change of members; steps after the one that it goes on from count no more.

    Attributes:
        generation: The new view.
        members: Its members.
        step: Steps committed that it goes on from.
        joined: Members that are new.
        lost: Members that are gone.
        reason: For people.
        certificate: The digest of its certificate.
        time: When, in seconds since the epoch.
    """

    kind: ClassVar[str] = "change"
    generation: int
    members: tuple[int, ...]
    step: int
    joined: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()
    reason: str = ""
    certificate: str | None = None
    time: float = 0.0


Entry = Commit | Change
_KINDS: dict[str, type[Commit] | type[Change]] = {"commit": Commit, "change": Change}


class CommitLog:
    """Appends to a record. One process at a time; others may read meanwhile.

    Args:
        path: The file; it is made when missing, and what a killed writer left torn is cut off.

    Raises:
        CorruptError: A line other than the last is damaged.
        StorageError: The file cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}") from error
        try:
            entries, good = _parse(self.path, self.path.read_bytes())
            os.ftruncate(self._fd, good)
        except OSError as error:
            self.close()
            raise StorageError(f"{path} cannot be read: {error.strerror}") from error
        except CorruptError:
            self.close()
            raise
        self._state = _State(entries)

    @property
    def last(self) -> Commit | None:
        """The last commit that counts, None before the first."""
        commits = self._state.commits
        return commits[max(commits)] if commits else None

    @property
    def change(self) -> Change | None:
        """The last change of members, None before the first."""
        return self._state.change

    def append(self, entry: Entry) -> bool:
        """Adds an entry; once this returns, this process's death cannot take it away.

        What is there already is left: a new writer does not know whether the one before, that was
        lost, had come to it.

        Returns:
            Whether it was added.

        Raises:
            StateError: A step or a generation is left out or comes late, or a step that is there
                was computed otherwise.
            StorageError: It cannot be written; nothing of it is left.
        """
        if self._state.has(entry):
            return False
        wrong = self._state.check(entry)
        if wrong:
            raise StateError(f"{self.path}: {wrong}")
        self._write(_encode(entry))
        self._state.apply(entry)
        return True

    def sync(self) -> None:
        """Puts what was appended onto the disk itself.

        Raises:
            StorageError: The disk failed.
        """
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be synced: {error.strerror}") from error

    def close(self) -> None:
        """Ends writing; may be called again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, line: bytes) -> None:
        before = os.fstat(self._fd).st_size
        try:
            written = os.write(self._fd, line)
            if written < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self._fd, before)
            raise StorageError(
                f"{self.path} cannot be written: {error.strerror}; make room, or move the run"
            ) from error


def read(path: str | os.PathLike[str]) -> list[Entry]:
    """Reads a record, also while it is being written; a torn last line is left out.

    Raises:
        CorruptError: A line other than the last is damaged.
        StorageError: The file cannot be read.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    return _parse(Path(path), data)[0]


def kept(entries: Sequence[Entry]) -> dict[int, Commit]:
    """The commit of each step that counts: those after a step that a change went back to do not."""
    return dict(sorted(_State(entries).commits.items()))


def audit(entries: Sequence[Entry]) -> list[str]:
    """Looks for what should not be in a record.

    Returns:
        One line each: steps left out, generations that go back, steps that were taken again, after
        a change went back, with other numbers. Empty for a record of a run that kept its promise.
    """
    state, seen, found = _State([]), dict[int, Commit](), list[str]()
    for entry in entries:
        wrong = state.check(entry)
        if wrong:
            found.append(wrong)
        if isinstance(entry, Commit):
            before = seen.setdefault(entry.step, entry)
            if not before.same_numbers(entry):
                found.append(
                    f"step {entry.step} came out otherwise when it was taken again: "
                    f"{_short(before)}, then {_short(entry)}"
                )
        elif state.base is not None and entry.step > state.base:
            found.append(f"steps {state.base + 1} to {entry.step} are not in the record")
        state.apply(entry)
    return found


class _State:
    """What a record says so far."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.commits: dict[int, Commit] = {}
        self.change: Change | None = None
        self.base: int | None = None  # the step that the next one follows
        for entry in entries:
            self.apply(entry)

    def apply(self, entry: Entry) -> None:
        self.base = entry.step
        if isinstance(entry, Commit):
            self.commits[entry.step] = entry
        else:
            self.change = entry
            for step in [s for s in self.commits if s > entry.step]:
                del self.commits[step]

    def has(self, entry: Entry) -> bool:
        if isinstance(entry, Commit):
            there = self.commits.get(entry.step)
            return there is not None and there.same_numbers(entry)
        return self.change is not None and replace(self.change, time=0.0) == replace(
            entry, time=0.0
        )

    def check(self, entry: Entry) -> str | None:
        """What is wrong with an entry that comes next."""
        now = self.change
        if isinstance(entry, Change):
            # 1 begins the count anew: the whole job was started again.
            if now is not None and entry.generation != 1 and entry.generation <= now.generation:
                return f"generation {entry.generation} comes after generation {now.generation}"
            return None
        if self.base is not None and entry.step <= self.base:
            there = self.commits.get(entry.step)
            told = f": {_short(there)}, now {_short(entry)}" if there is not None else ""
            return f"step {entry.step} is committed again after step {self.base}{told}"
        if self.base is not None and entry.step != self.base + 1:
            return f"step {entry.step} is committed after step {self.base}: one is left out"
        if now is not None and (entry.generation, entry.members) != (now.generation, now.members):
            return (
                f"step {entry.step} is committed by generation {entry.generation} of members "
                f"{list(entry.members)}, but it is generation {now.generation} of "
                f"{list(now.members)}"
            )
        return None


def _short(commit: Commit) -> str:
    return f"loss {commit.loss} at position {commit.position}, generation {commit.generation}"


def _encode(entry: Entry) -> bytes:
    body = json.dumps({"kind": entry.kind, **asdict(entry)}, separators=(",", ":")).encode()
    return _HEAD % crc32c.crc32c(body) + body + b"}\n"


def _parse(path: Path, data: bytes) -> tuple[list[Entry], int]:
    """The entries, and the bytes that they take; a torn last line is not among them."""
    entries: list[Entry] = []
    start = 0
    while start < len(data):
        end = data.find(b"\n", start) + 1
        entry = _decode(data[start:end]) if end else None
        if entry is None:
            # A whole last line that is damaged was not torn by a killed process: it is told, too.
            if end:
                line = len(entries) + 1
                raise CorruptError(
                    f"{path}: line {line} is damaged; what comes after it cannot be relied on. "
                    "Move the file aside: the checkpoints do not depend on it."
                )
            break
        entries.append(entry)
        start = end
    return entries, start


def _decode(line: bytes) -> Entry | None:
    body = line[_HEAD_NBYTES:-2]
    if line != _HEAD % crc32c.crc32c(body) + body + b"}\n":
        return None
    try:
        found = json.loads(body)
        kind = _KINDS[found["kind"]]
        known = {f.name for f in fields(kind)}
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in found.items() if k in known
        }
        return kind(**values)
    except (ValueError, KeyError, TypeError):
        return None
