"""What a disk may hold after a power cut: a recording of file operations, and a pessimistic model.

SIGKILL leaves the page cache alone, so it cannot show a missing fsync. Here every operation of a
job is recorded; then the recording is replayed up to some point into a model in which only what was
synced is certain. Bytes that were not synced may be lost, zeroed or torn, each write for itself;
names that were not synced (of new files and folders, renames, removals) may be missing, or there,
in any order. Certain are only: `fsync` makes a file's bytes durable, `sync_folder` the names in a
folder; a rename happens wholly or not at all.
"""

import base64
import fcntl
import json
import os
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planaria.checkpoint.storage.os_files import OsFiles

Op = dict[str, Any]


class FrozenError(OSError):
    """The process is dead as far as its disk can tell: nothing that it does has an effect."""


class RecordingFiles(OsFiles):
    """Carries out operations and logs them, in one order for all threads and processes.

    Args:
        log: The log file; several recorders may share it.
        base: Folder that exists, and lies above everything that is written.
        freeze_at: Position in the log from which on nothing is carried out any more.
    """

    def __init__(self, log: Path, base: Path, *, freeze_at: int | None = None) -> None:
        self._log = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
        self._base, self._freeze_at = base, freeze_at
        self._lock = threading.Lock()
        self._paths: dict[int, str] = {}

    def mark(self, what: str, value: int) -> None:
        """Logs an event of the job, such as a commit."""
        with self._turn():
            self._append({"op": "mark", "what": what, "value": value})

    def open(self, path: str, *, direct: bool = False) -> int:
        with self._turn():
            fd = super().open(path, direct=direct)
            self._paths[fd] = self._inside(path)
            self._append({"op": "open", "path": self._paths[fd]})
            return fd

    def write(self, fd: int, parts: Sequence[memoryview], at: int) -> int:
        with self._turn():
            taken = super().write(fd, parts, at)
            text = base64.b64encode(b"".join(parts)[:taken]).decode()
            self._append({"op": "write", "path": self._paths[fd], "at": at, "data": text})
            return taken

    def fsync(self, fd: int) -> None:
        with self._turn():  # the model keeps what is synced: the real disk need not
            self._append({"op": "fsync", "path": self._paths[fd]})

    def close(self, fd: int) -> None:
        with self._turn(always=True):
            self._paths.pop(fd)
            super().close(fd)

    def rename(self, old: str, new: str) -> None:
        with self._turn():
            super().rename(old, new)
            self._append({"op": "rename", "path": self._inside(old), "to": self._inside(new)})
            for fd, path in self._paths.items():
                if path == self._inside(old):
                    self._paths[fd] = self._inside(new)

    def make_folder(self, path: str) -> None:
        with self._turn():
            new = not os.path.isdir(path)
            super().make_folder(path)
            if new:
                self._append({"op": "mkdir", "path": self._inside(path)})

    def sync_folder(self, path: str) -> None:
        with self._turn():
            assert os.path.isdir(path)
            if Path(path).is_relative_to(self._base):
                self._append({"op": "sync", "path": self._inside(path)})

    def unlink(self, path: str) -> None:
        with self._turn():
            super().unlink(path)
            self._append({"op": "unlink", "path": self._inside(path)})

    def remove_folder(self, path: str) -> None:
        with self._turn():
            super().remove_folder(path)
            self._append({"op": "rmdir", "path": self._inside(path)})

    @contextmanager
    def _turn(self, *, always: bool = False) -> Iterator[None]:
        with self._lock:
            fcntl.flock(self._log, fcntl.LOCK_EX)
            try:
                if not always and self._freeze_at is not None and self._done() >= self._freeze_at:
                    raise FrozenError("the process is dead")
                yield
            finally:
                fcntl.flock(self._log, fcntl.LOCK_UN)

    def _done(self) -> int:
        return os.pread(self._log, 1 << 30, 0).count(b"\n")

    def _append(self, op: Op) -> None:
        os.write(self._log, json.dumps(op).encode() + b"\n")

    def _inside(self, path: str) -> str:
        inside = os.path.relpath(path, self._base)
        assert not inside.startswith(".."), path
        return inside

    def __del__(self) -> None:
        os.close(self._log)


def read_log(log: Path) -> list[Op]:
    """All operations and marks, in order."""
    return [json.loads(line) for line in log.read_text().splitlines()]


@dataclass
class Fate:
    """Decides what became of that which was not synced.

    Attributes:
        names: Probability that a change of a name is there.
        writes: Weights of a write's ends: whole, lost, zeroed, torn.
        shuffle: Whether changes of names may come in another order.
        rng: Where chance comes from.
    """

    names: float
    writes: tuple[float, float, float, float]
    shuffle: bool = False
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    @classmethod
    def extremes(cls) -> list["Fate"]:
        """Nothing, everything, and names without their bytes in two ways."""
        whole, lost, zeroed = (1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0)
        return [cls(0.0, lost), cls(1.0, whole), cls(1.0, lost), cls(1.0, zeroed)]

    @classmethod
    def random(cls, seed: int) -> "Fate":
        """Chance, with its own bias."""
        rng = random.Random(seed)
        weights = (rng.random(), rng.random(), rng.random(), rng.random())
        return cls(rng.choice((0.1, 0.5, 0.9)), weights, True, rng)


class _File:
    def __init__(self) -> None:
        self.durable = b""
        self.pending: list[tuple[int | None, bytes]] = []  # where (None: cut to nothing), what

    def sync(self) -> None:
        self.durable, self.pending = self.after_all(), []

    def after_all(self) -> bytes:
        content = bytearray(self.durable)
        for at, data in self.pending:
            _put(content, at, data)
        return bytes(content)

    def after_crash(self, fate: Fate) -> bytes:
        content = bytearray(self.durable)
        for at, data in self.pending:
            end = fate.rng.choices(("whole", "lost", "zeroed", "torn"), fate.writes)[0]
            if end == "whole":
                _put(content, at, data)
            elif end == "zeroed":
                _put(content, at, bytes(len(data)))
            elif end == "torn":
                _put(content, at, data[: fate.rng.randrange(len(data) + 1)])
        return bytes(content)


def _put(content: bytearray, at: int | None, data: bytes) -> None:
    if at is None:
        content.clear()
        return
    content.extend(bytes(max(0, at - len(content))))
    content[at : at + len(data)] = data


# A change of names: what disappears, what appears.
_Change = tuple[str | None, str | None, "_File | _Folder | None"]


class _Folder:
    def __init__(self) -> None:
        self.durable: dict[str, _File | _Folder] = {}
        self.names: dict[str, _File | _Folder] = {}
        self.pending: list[_Change] = []

    def change(self, gone: str | None, new: str | None, node: "_File | _Folder | None") -> None:
        _change(self.names, (gone, new, node))
        self.pending.append((gone, new, node))

    def sync(self) -> None:
        self.durable, self.pending = dict(self.names), []

    def after_crash(self, fate: Fate) -> dict[str, "_File | _Folder"]:
        found = dict(self.durable)
        changes = [c for c in self.pending if fate.rng.random() < fate.names]
        if fate.shuffle:
            fate.rng.shuffle(changes)
        for each in changes:
            _change(found, each)
        return found


def _change(names: dict[str, "_File | _Folder"], change: _Change) -> None:
    gone, new, node = change
    if gone is not None:
        names.pop(gone, None)
    if new is not None and node is not None:
        names[new] = node


class Disk:
    """The model; starts as an empty, durable folder."""

    def __init__(self) -> None:
        self._top = _Folder()

    def apply(self, op: Op) -> None:
        """Carries out one operation of a log; marks do nothing."""
        if op["op"] == "mark":
            return
        folder, name = self._find(op["path"])
        if op["op"] == "open":
            file = folder.names.get(name)
            if isinstance(file, _File):
                file.pending.append((None, b""))
            else:
                folder.change(None, name, _File())
        elif op["op"] == "write":
            self._file(folder, name).pending.append((op["at"], base64.b64decode(op["data"])))
        elif op["op"] == "fsync":
            self._file(folder, name).sync()
        elif op["op"] == "rename":
            target, new = self._find(op["to"])
            assert target is folder, "a rename between folders has two syncs"
            folder.change(name, new, folder.names[name])
        elif op["op"] == "mkdir":
            folder.change(None, name, _Folder())
        elif op["op"] == "sync":
            self._folder(op["path"]).sync()
        else:
            folder.change(name, None, None)

    def crash(self, fate: Fate) -> dict[str, bytes | None]:
        """What is found after a power cut: path -> bytes, None for a folder."""
        found: dict[str, bytes | None] = {}

        def visit(folder: _Folder, prefix: str) -> None:
            for name, node in folder.after_crash(fate).items():
                if isinstance(node, _File):
                    found[prefix + name] = node.after_crash(fate)
                else:
                    found[prefix + name] = None
                    visit(node, f"{prefix}{name}/")

        visit(self._top, "")
        return found

    def _folder(self, path: str) -> _Folder:
        node: _File | _Folder = self._top
        for part in [] if path == "." else path.split("/"):
            assert isinstance(node, _Folder)
            node = node.names[part]
        assert isinstance(node, _Folder)
        return node

    def _find(self, path: str) -> tuple[_Folder, str]:
        above, _, name = path.rpartition("/")
        return self._folder(above or "."), name

    @staticmethod
    def _file(folder: _Folder, name: str) -> _File:
        node = folder.names[name]
        assert isinstance(node, _File)
        return node


def write_tree(tree: dict[str, bytes | None], top: Path) -> None:
    """Makes files and folders of what `Disk.crash` returned."""
    for path, data in sorted(tree.items()):
        if data is None:
            (top / path).mkdir()
        else:
            (top / path).write_bytes(data)
