"""The snapshot process as the writer of durable checkpoints, out of its memory.

Once a snapshot is described its ranks are not needed any more: rank 0's node has every node write
the images that it holds, writes itself what a node was lost with, and commits the step as a trainer
would, manifest last. torch is not needed for any of it: the manifest is the snapshot's own.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

from planaria.checkpoint import points
from planaria.checkpoint.capture.aligned import aligned_memory
from planaria.checkpoint.memory.log import say
from planaria.checkpoint.memory.memory import Key, Member, Peers, Reply
from planaria.checkpoint.memory.meta import Snapshot
from planaria.checkpoint.storage.local import LocalStorage
from planaria.core.byte_stream import Buffer
from planaria.core.deadline import Deadline
from planaria.core.points import point
from planaria.errors import PlanariaError, SaveFailedError, StorageError, WireError

_BLOCK_NBYTES = 4 << 20
#: As `planaria.checkpoint.persist.RETRY_AFTER_S`.
_RETRY_AFTER_S = (0.1, 0.5, 2.0)
_OP = "persist"
_REMEMBERED = 16


class Node(Protocol):
    """What is needed of `planaria.checkpoint.memory.node.SnapshotNode`."""

    def wait(self, key: Key, deadline: Deadline) -> None:
        """Returns once the snapshot is committed."""
        ...

    def hold(self, key: Key) -> None:
        """Keeps its memory."""
        ...

    def let_go(self, key: Key) -> None:
        """Ends one `hold`."""
        ...

    def recoverable(self, deadline: Deadline) -> list[Snapshot]:
        """What can be read."""
        ...

    def read(self, key: Key, file: str, offset: int, into: memoryview, deadline: Deadline) -> None:
        """Reads a part of a file, verified, from wherever it is."""
        ...

    def local_span(self, key: Key, file: str) -> Any:
        """Where an image of this node lies."""
        ...

    def serve(self, request: dict[str, Any], payloads: Sequence[Buffer]) -> Reply:
        """Answers a request of a peer."""
        ...


class Persisting:
    """Writes snapshots to storage. Thread-safe.

    Args:
        uuid: This node.
        node: Holds the snapshots.
        peers: The other nodes.
        timeout_s: How long one step may take.
    """

    def __init__(self, uuid: str, node: Node, peers: Peers, timeout_s: float) -> None:
        self._uuid, self._node, self._peers, self._timeout_s = uuid, node, peers, timeout_s
        self._busy = 0
        self._ended: dict[Key, str | None] = {}
        self._changed = threading.Condition()

    def start(self, key: Key, root: str, members: Sequence[Member], manifest: bytes) -> None:
        """Has a step written as soon as its snapshot is committed; returns at once."""
        with self._changed:
            self._busy += 1
            self._ended.pop(key, None)
        threading.Thread(
            target=self._run, args=(key, root, members, manifest), name="planaria-persist",
            daemon=True,
        ).start()  # fmt: skip

    def wait(self, key: Key, deadline: Deadline) -> None:
        """Returns once a step is durable.

        Raises:
            SaveFailedError: It will not be.
            DeadlineError: Not in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._ended, deadline.timeout()):
                raise deadline.error(f"{key} to be written by node {self._uuid}")
            why = self._ended[key]
        if why is not None:
            raise SaveFailedError(why)

    def settle(self, deadline: Deadline) -> None:
        """Returns once nothing is being written.

        Raises:
            DeadlineError: Not in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._busy, deadline.timeout()):
                raise deadline.error(f"node {self._uuid} to end its writing")

    def serve(self, request: dict[str, Any], payloads: Sequence[Buffer]) -> Reply:
        """Answers a request of a peer: one of these, or of the node."""
        if request.get("op") != _OP:
            return self._node.serve(request, payloads)
        key, files = Key.from_json(request["key"]), [str(f) for f in request["files"]]
        with self._working():
            return {"written": self._write_own(key, str(request["root"]), files)}, ()

    def _run(self, key: Key, root: str, members: Sequence[Member], manifest: bytes) -> None:
        why: str | None = None
        try:
            self._node.wait(key, Deadline(self._timeout_s))
            self._write_all(key, root, members, manifest)
        except Exception as error:  # told to whoever asks
            why = str(error) or repr(error)
            say(f"step {key.step} was not written: {why}")
        with self._changed:
            self._busy -= 1
            self._ended[key] = why
            while len(self._ended) > _REMEMBERED:
                self._ended.pop(next(iter(self._ended)))
            self._changed.notify_all()

    def _write_all(self, key: Key, root: str, members: Sequence[Member], manifest: bytes) -> None:
        sizes = {f[0]: int(f[1]) + int(f[2]) for f in json.loads(manifest)["manifest"]["files"]}
        deadline = Deadline(self._timeout_s)
        written: set[str] = set()
        lock = threading.Lock()
        wrong: list[str] = []

        def ask(uuid: str) -> None:
            request = {"op": _OP, "key": key.to_json(), "root": root, "files": list(sizes)}
            try:
                answer = (
                    self.serve(request, ())
                    if uuid == self._uuid
                    else self._peers.call(uuid, request, (), deadline)
                )
                with lock:
                    written.update(answer[0]["written"])
            except (WireError, TimeoutError):  # it is lost: what it held is decoded below
                pass
            except PlanariaError as error:
                wrong.append(f"node {uuid}: {error}")

        threads = [
            threading.Thread(target=ask, args=(member.uuid,), daemon=True) for member in members
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(deadline.timeout() + 1.0)
        if wrong:
            raise SaveFailedError(f"step {key.step} was not committed: {wrong[0]}")
        with self._held(key):
            for file in sorted(set(sizes) - written):
                self._write(key, root, file, sizes[file])
        storage = LocalStorage(root)
        folder = _folder(key)
        point(points.MANIFEST_BEGIN, step=key.step)
        _on_disk(
            f"{root}/{folder}",
            lambda: storage.put(
                f"{folder}/manifest.json",
                manifest,
                points=(points.MANIFEST_WRITTEN, points.MANIFEST_RENAMED),
                step=key.step,
            ),
        )
        point(points.COMMITTED, step=key.step)

    def _write_own(self, key: Key, root: str, files: Collection[str]) -> list[str]:
        """Writes the images of this node."""
        own = [file for file in files if self._node.local_span(key, file) is not None]
        with self._held(key):
            for file in own:
                self._write(key, root, file, self._node.local_span(key, file).nbytes)
        return own

    def _write(self, key: Key, root: str, file: str, nbytes: int) -> None:
        """Writes one image durably; every byte of it is compared with its checksum before.

        Under a name of its own until it is whole: a node that was taken for lost, and writes on,
        must not harm what another one has written in its place, and may have committed.
        """
        storage, path = LocalStorage(root), f"{_folder(key)}/{file}"
        _on_disk(root, lambda: storage.make_folder(_folder(key)))
        writer = _on_disk(f"{root}/{path}", lambda: storage.replace(path, lambda _: None))
        deadline = Deadline(self._timeout_s)
        buffer = aligned_memory(_BLOCK_NBYTES)
        try:
            for start in range(0, nbytes, _BLOCK_NBYTES):
                part = buffer[: min(_BLOCK_NBYTES, nbytes - start)]
                self._node.read(key, file, start, part, deadline)

                def write(part: memoryview = part) -> None:
                    point(points.WRITE_CHUNK, step=key.step)
                    writer.write(part)

                _on_disk(f"{root}/{path}", write)
            point(points.WRITE_END, step=key.step)
            # Not again: after a failed fsync the next one may succeed with the bytes lost.
            _on_disk(f"{root}/{path}", writer.finish, again=False)
            point(points.FSYNC_END, step=key.step)
        except BaseException:
            writer.abort()
            raise

    @contextlib.contextmanager
    def _held(self, key: Key) -> Iterator[None]:
        self._node.hold(key)
        try:
            yield
        finally:
            self._node.let_go(key)

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        with self._changed:
            self._busy += 1
        try:
            yield
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()


def _folder(key: Key) -> str:
    return f"step-{key.step:08d}"


def _on_disk(what: str, call: Callable[[], Any], *, again: bool = True) -> Any:
    """Calls it, and after an error of the disk again.

    Raises:
        StorageError: It failed each time.
    """
    for pause in (*(_RETRY_AFTER_S if again else ()), None):
        try:
            return call()
        except OSError as error:
            if pause is None:
                raise StorageError(f"cannot write to {what}: {error}") from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")
