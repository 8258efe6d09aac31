"""Copying a committed step to another root: data files first, the manifest last, all of it checked.

What is read is compared with the checksums in the manifest before it is sent, so damage is never
copied; what was sent is looked at again before the manifest says that it is there.
"""

import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from planaria.checkpoint import points
from planaria.checkpoint.format import manifest as manifest_format
from planaria.checkpoint.format.checksum import checksum
from planaria.checkpoint.format.manifest import FileInfo, Manifest
from planaria.checkpoint.storage.base import ReplacesFiles, Storage, Writer, reading
from planaria.checkpoint.storage.names import data_path
from planaria.checkpoint.storage.remote import RemoteStorage
from planaria.checkpoint.storage.root import Root, step_folder
from planaria.core.deadline import Deadline
from planaria.core.pacing import TokenBucket
from planaria.core.points import point
from planaria.errors import CorruptError, StorageError

T = TypeVar("T")


class StoppedError(Exception):
    """The copy was told to stop."""


class SupersededError(Exception):
    """The step was removed or saved again while it was copied."""


@dataclass(frozen=True)
class CopyLimits:
    """How a step is copied.

    Attributes:
        bucket: Yields the bytes that may be sent, None for no limit.
        streams: Files that are copied at once.
        read_back: Whether to read all data again from where it was copied to.
        timeout_s: Longest wait for the bucket, in seconds.
        stop: Ends the copy at the next chunk.
    """

    bucket: TokenBucket | None = None
    streams: int = 2
    read_back: bool = False
    timeout_s: float = 1800.0
    stop: threading.Event = field(default_factory=threading.Event)


def copy_step(
    source: Root,
    target: Root,
    step: int,
    *,
    again: bool,
    limits: CopyLimits,
    before_commit: Callable[[], None] = lambda: None,
) -> Manifest:
    """Copies a step; files of it that are there already are not sent again.

    Args:
        source: Where it is committed.
        target: Where it is committed when this returns.
        step: The step.
        again: Whether another attempt at the step, in the target, is to be replaced.
        limits: How.
        before_commit: Called when all data is there; what it raises ends the copy.

    Returns:
        Its manifest.

    Raises:
        SupersededError: The source does not have this attempt at the step any more.
        CorruptError: The source's copy is damaged.
        StoppedError: `limits.stop` was set.
        StorageError: The target has not kept what it confirmed.
        OSError: The target failed.
    """
    data = manifest_bytes(source, step)
    manifest = Manifest.from_bytes(data, f"{source.storage.url}/{step_folder(step)}")
    point(points.MIRROR_BEGIN, step=step)
    for folder in dict.fromkeys([step, *(f.step for f in manifest.files if f.step is not None)]):
        target.prepare(folder)
    copy = FileCopy(source.storage, target.storage, manifest, limits)
    try:
        _at_once(copy.file, manifest.files, limits.streams)
    except CorruptError as error:
        if _unchanged(source, step, data):
            raise
        raise SupersededError from error
    before_commit()
    target.need_format(manifest.format)
    # Nobody wants a step that the source has given up meanwhile.
    if not _unchanged(source, step, data):
        raise SupersededError
    target.write_manifest(
        step, data, again=again, points=(points.MIRROR_MANIFEST, points.MIRROR_WRITTEN)
    )
    point(points.MIRROR_COMMITTED, step=step)
    return manifest


class FileCopy:
    """Copies data files of one step.

    Args:
        source: Where they are.
        target: Where they go.
        manifest: The step.
        limits: How.
    """

    def __init__(
        self, source: Storage, target: Storage, manifest: Manifest, limits: CopyLimits
    ) -> None:
        self._source, self._target, self._limits = source, target, limits
        self._manifest = manifest

    def file(self, file: FileInfo) -> None:
        """Copies a file, if it is not there yet.

        Raises:
            CorruptError: The source's is damaged.
            StoppedError: `limits.stop` was set.
            StorageError: The target has not kept what it confirmed.
            OSError: The target failed.
        """
        # The name holds the attempt: of the right length, it is what an earlier try has sent.
        if self._target.size(data_path(self._manifest, file)) != file.nbytes:
            self.send(file)
        else:
            self._check(file)
        point(points.MIRROR_FILE, step=self._manifest.step)

    def send(self, file: FileInfo) -> None:
        """Copies a file; what is there of it stays until all of it is there anew.

        Raises:
            StorageError: As `file`, and all others.
        """
        path, is_checked = data_path(self._manifest, file), False
        if isinstance(self._target, RemoteStorage):
            writer: Writer = self._target.create(path, file.nbytes)
        elif isinstance(self._target, ReplacesFiles) and self._target.size(path) is not None:
            writer, is_checked = self._target.replace(path, partial(self._read_all, file)), True
        else:
            writer = self._target.create(path)
        try:
            for start, nbytes, expected in _pieces(file):
                data = self._read(self._source, path, start, nbytes, expected)
                point(points.MIRROR_CHUNK, step=self._manifest.step)
                if self._limits.bucket is not None:
                    self._limits.bucket.take(nbytes, Deadline(self._limits.timeout_s))
                writer.write(data)
            writer.finish()
        except BaseException:
            writer.abort()
            raise
        if not is_checked:
            self._check(file)

    def is_whole(self, file: FileInfo) -> bool:
        """Whether the target has the file, byte for byte.

        Raises:
            StoppedError: `limits.stop` was set.
            StorageError: It cannot be told now.
            OSError: It cannot be told now.
        """
        if self._target.size(data_path(self._manifest, file)) != file.nbytes:
            return False
        try:
            self._read_all(file, data_path(self._manifest, file))
        except CorruptError:
            return False
        return True

    def _check(self, file: FileInfo) -> None:
        """What was sent is there."""
        path = data_path(self._manifest, file)
        size = self._target.size(path)
        if size != file.nbytes:
            raise StorageError(
                f"{self._target.url}/{path}: {file.nbytes} bytes were sent and confirmed, but "
                f"{'nothing is' if size is None else f'{size} are'} there"
            )
        if self._limits.read_back:
            self._read_back(file)

    def _read_back(self, file: FileInfo) -> None:
        path = data_path(self._manifest, file)
        try:
            self._read_all(file, path)
        except CorruptError as error:
            # Else the next try would take it for what it should be, by its length.
            self._target.remove(path)
            raise StorageError(f"{error}; it was confirmed, and is sent again") from error

    def _read_all(self, file: FileInfo, path: str) -> None:
        for start, nbytes, expected in _pieces(file):
            self._read(self._target, path, start, nbytes, expected)

    def _read(
        self, place: Storage, path: str, start: int, nbytes: int, expected: int
    ) -> memoryview:
        if self._limits.stop.is_set():
            raise StoppedError
        view = memoryview(bytearray(nbytes))
        count = reading(f"{place.url}/{path}", lambda: place.read_into(path, start, view))
        if count < nbytes or checksum(view, self._manifest.checksum) != expected:
            raise CorruptError(
                f"{place.url}/{path}: "
                + ("is cut off" if count < nbytes else "does not match its checksum")
                + f" at byte {start}"
            )
        return view


def _pieces(file: FileInfo) -> Iterable[tuple[int, int, int]]:
    """First byte, length and checksum of the header and each chunk."""
    yield 0, file.data_start, file.header_checksum
    for chunk, expected in enumerate(file.chunk_checksums):
        start, nbytes = file.chunk_range(chunk)
        yield file.data_start + start, nbytes, expected


def manifest_bytes(root: Root, step: int) -> bytes:
    """The manifest file of a step.

    Raises:
        SupersededError: There is none.
        StorageError: It cannot be read.
    """
    path = f"{step_folder(step)}/{manifest_format.NAME}"
    try:
        return reading(f"{root.storage.url}/{path}", lambda: root.storage.read(path))
    except CorruptError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise SupersededError from error
        raise


def _unchanged(root: Root, step: int, data: bytes) -> bool:
    try:
        return manifest_bytes(root, step) == data
    except SupersededError:
        return False


def _at_once(work: Callable[[T], None], items: list[T], most: int) -> None:
    """Does it for all items, up to `most` of them at once; after an error it begins no more.

    In threads that do not keep the process from ending, unlike those of an executor. They are
    waited for without a deadline, for all that they do has its own.
    """
    left: queue.SimpleQueue[T] = queue.SimpleQueue()
    for item in items:
        left.put(item)
    errors: list[BaseException] = []

    def run() -> None:
        while not errors:
            try:
                item = left.get_nowait()
            except queue.Empty:
                return
            try:
                work(item)
            except BaseException as error:  # raised again below
                errors.append(error)

    threads = [
        threading.Thread(target=run, name="planaria-mirror-file", daemon=True)
        for _ in range(min(most, len(items)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
