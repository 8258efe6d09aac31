"""Snapshots in memory seen as a checkpoint root: what restores from that restores from these."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from planaria.checkpoint.format import manifest as manifest_format
from planaria.checkpoint.memory.client import NodeClient
from planaria.checkpoint.memory.memory import Key
from planaria.checkpoint.memory.meta import Snapshot
from planaria.checkpoint.storage.base import Writer
from planaria.checkpoint.storage.names import step_folder
from planaria.core.deadline import Deadline
from planaria.errors import CorruptError, NotCommittedError, NotSupportedError, PlanariaError

#: What is asked of another node in one go.
_FETCH_NBYTES = 32 << 20


class MemoryStorage:
    """The snapshots of a job as a folder of steps, read-only.

    Args:
        client: This node.
        snapshots: What there is; of one step the first counts.
        timeout_s: How long each read may take.
    """

    def __init__(self, client: NodeClient, snapshots: Sequence[Snapshot], timeout_s: float) -> None:
        self.local: str | None = None
        self.url = "memory"
        self._client, self._timeout_s = client, timeout_s
        self._snapshots: dict[str, Snapshot] = {}
        for snapshot in snapshots:
            self._snapshots.setdefault(step_folder(snapshot.key.step), snapshot)
        self._images: dict[str, NDArray[np.uint8] | None] = {}
        self._held: set[Key] = set()
        self._lock = threading.Lock()

    def list(self, path: str = "") -> list[str]:
        """See `Storage.list`."""
        if not path:
            return sorted(self._snapshots)
        snapshot = self._snapshots.get(path)
        return [] if snapshot is None else sorted([*snapshot.files, manifest_format.NAME])

    def size(self, path: str) -> int | None:
        """See `Storage.size`."""
        folder, _, name = path.partition("/")
        snapshot = self._snapshots.get(folder)
        if snapshot is None:
            return None
        return len(snapshot.manifest) if name == manifest_format.NAME else snapshot.files.get(name)

    def read(self, path: str) -> bytes:
        """See `Storage.read`."""
        folder, _, name = path.partition("/")
        snapshot = self._snapshots.get(folder)
        if snapshot is None or name != manifest_format.NAME:
            raise FileNotFoundError(path)
        return snapshot.manifest

    def view(self, path: str, start: int, nbytes: int) -> memoryview | None:
        """See `Mapped.view`."""
        image = self._image(path)
        if image is None or start + nbytes > len(image):
            return None
        return image[start : start + nbytes].data

    def read_into(self, path: str, start: int, buffer: memoryview) -> int:
        """See `Storage.read_into`."""
        there = max(0, min(len(buffer), (self.size(path) or 0) - start))
        image = self._image(path)
        if image is not None:
            np.copyto(np.frombuffer(buffer, np.uint8)[:there], image[start : start + there])
            return there
        folder, _, name = path.partition("/")
        key = self._snapshots[folder].key
        deadline = Deadline(self._timeout_s)
        try:
            for at in range(0, there, _FETCH_NBYTES):
                part = buffer[at : min(at + _FETCH_NBYTES, there)]
                self._client.fetch(key, name, start + at, part, deadline)
        except PlanariaError as error:
            # Whatever keeps it from us: there are other tiers to try.
            raise CorruptError(f"{self.url}/{path} cannot be read: {error}") from error
        return there

    def _image(self, path: str) -> NDArray[np.uint8] | None:
        """An image in this node's own memory."""
        with self._lock:
            if path in self._images:
                return self._images[path]
        folder, _, name = path.partition("/")
        snapshot = self._snapshots.get(folder)
        if snapshot is None or name not in snapshot.files:
            raise FileNotFoundError(path)
        try:
            found = self._local(snapshot.key, name)
        except PlanariaError as error:
            raise CorruptError(f"{self.url}/{path} cannot be read: {error}") from error
        with self._lock:
            self._images[path] = found
        return found

    def _local(self, key: Key, name: str) -> NDArray[np.uint8] | None:
        # Held: the nodes may replace the snapshot by one with more parity while it is looked at.
        with self._lock:
            if key not in self._held:
                try:
                    self._client.hold(key)
                except NotCommittedError:
                    return None
                self._held.add(key)
        return self._client.local(key, name)

    def close(self) -> None:
        """Ends the looking; views of images must not be used any more."""
        with self._lock:
            held, self._held = self._held, set()
            self._images.clear()
        for key in held:
            with contextlib.suppress(PlanariaError):
                self._client.let_go(key)

    # What a root does that is written to.

    def create(self, path: str) -> Writer:
        """Snapshots are taken by the capture, not written as files."""
        raise self._refusal(path)

    def put(
        self,
        path: str,
        data: bytes,
        *,
        points: tuple[str, str] | None = None,
        step: int | None = None,
    ) -> None:
        """As `create`."""
        raise self._refusal(path)

    def make_folder(self, path: str) -> None:
        """As `create`."""
        raise self._refusal(path)

    def sync_folder(self, path: str) -> None:
        """As `create`."""
        raise self._refusal(path)

    def remove(self, path: str) -> None:
        """As `create`."""
        raise self._refusal(path)

    def remove_folder(self, path: str) -> None:
        """As `create`."""
        raise self._refusal(path)

    def _refusal(self, path: str) -> NotSupportedError:
        return NotSupportedError(f"{self.url}/{path}: snapshots in memory are read-only")


def steps_of(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """The snapshots that belong to the run's present past, newest first.

    One that was taken before another, and yet is of the same or a later step, is of a past that
    the run has left: it was rewound in between.
    """
    kept: list[Snapshot] = []
    for snapshot in sorted(snapshots, key=lambda s: -s.sequence):
        if not kept or snapshot.key.step < kept[-1].key.step:
            kept.append(snapshot)
    return kept
