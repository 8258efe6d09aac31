"""Object stores and other file systems, through fsspec's interface.

Every call has a deadline, and whatever goes wrong is an `OSError`, as it is on a local disk.
"""

import contextlib
import errno
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import fsspec

from planaria.checkpoint.storage.streaming import RemoteWriter
from planaria.checkpoint.storage.timed import within
from planaria.core.points import point
from planaria.errors import ConfigError, PlanariaError

T = TypeVar("T")

#: Seconds that one call (one part of a file, one small file) may take.
CALL_TIMEOUT_S = 300.0
#: Bytes of a file that are held in memory and sent as one part.
BLOCK_NBYTES = 32 << 20
#: S3 takes 10,000 parts.
MOST_BLOCKS = 9000
#: Bytes that are asked for in one request; several are under way at once.
READ_NBYTES = 8 << 20
#: How often the rest is asked for when a store returns less than it has.
SHORT_READS = 8
# These have names, not folders. To make one would at most make a bucket that nobody asked for.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss", "cos", "r2"}
_SPEAKS_FOR_ITSELF = (
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    PermissionError,
    TimeoutError,
)


class RemoteStorage:
    """Checkpoints under an fsspec URL (``s3://``, ``gs://``, ``memory://``...).

    A file appears there when it is closed, whole; so a small file is put atomically, and there are
    neither folders nor syncs to care for.

    Args:
        url: The folder's URL. Options of the file system come from fsspec's own configuration.
        timeout_s: Seconds that one call may take.

    Raises:
        ConfigError: The URL's protocol is unknown, or its package is not installed.
    """

    def __init__(self, url: str, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self.url = url.rstrip("/")
        self.local: str | None = None
        self._timeout_s = timeout_s
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"cannot open {url!r}: {error}") from error
        protocol = self._fs.protocol
        self._has_folders = not _OBJECT_STORES & {*([protocol] if type(protocol) is str else
                                                    protocol)}  # fmt: skip
        self._creates = _takes_mode(self._fs)

    def list(self, path: str = "") -> list[str]:
        """See `Storage.list`."""
        at = self._at(path)
        try:
            found = self.call(f"list {at}", lambda: self._fs.ls(at, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        full = (str(name).rstrip("/") for name in found)
        # Some stores list the folder's own placeholder in it.
        return sorted({name.rpartition("/")[2] for name in full if name != at} - {""})

    def size(self, path: str) -> int | None:
        """See `Storage.size`."""
        at = self._at(path)
        try:
            info = self.call(f"look at {at}", lambda: self._fs.info(at))
        except FileNotFoundError:
            return None
        return None if info.get("type") == "directory" else int(info["size"])

    def read(self, path: str) -> bytes:
        """See `Storage.read`."""
        at = self._at(path)
        return self.call(f"read {at}", lambda: self._fs.cat_file(at))

    def read_into(self, path: str, start: int, buffer: memoryview) -> int:
        """See `Storage.read_into`. Several ranges are read at once; what comes short is completed.

        Raises:
            OSError: The store returns less than it has, again and again.
        """
        done = 0
        for _ in range(SHORT_READS):
            done += self._read_ranges(path, start + done, buffer[done:])
            if done == len(buffer) or start + done >= self._size_of(path):
                return done
        raise OSError(
            f"{self._at(path)}: of {len(buffer)} bytes from {start} on only {done} were returned, "
            "though the file has more"
        )

    def _read_ranges(self, path: str, start: int, buffer: memoryview) -> int:
        """Reads at most so much; returns how much came in one piece."""
        at, end = self._at(path), start + len(buffer)
        starts = list(range(start, end, READ_NBYTES))
        ends = [min(s + READ_NBYTES, end) for s in starts]
        try:
            parts = self.call(
                f"read {at} from byte {start} on",
                lambda: self._fs.cat_ranges([at] * len(starts), starts, ends, on_error="raise"),
            )
        except FileNotFoundError:
            raise
        except OSError:
            # Stores refuse a range that begins past the end: what lies before it is there.
            there = max(0, self._size_of(path) - start)
            if there >= len(buffer):
                raise
            return self._read_ranges(path, start, buffer[:there]) if there else 0
        done = 0
        for part, first, last in zip(parts, starts, ends, strict=True):
            if len(part) > last - first:
                raise OSError(f"{at}: {len(part)} bytes were returned for {last - first}")
            buffer[done : done + len(part)] = part
            done += len(part)
            if len(part) < last - first:
                break
        return done

    def _size_of(self, path: str) -> int:
        size = self.size(path)
        if size is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", self._at(path))
        return size

    def create(self, path: str, nbytes: int = 0) -> RemoteWriter:
        """See `Storage.create`; `nbytes` is its length, where that is known and large."""
        block_nbytes = max(BLOCK_NBYTES, -(-nbytes // MOST_BLOCKS))
        return RemoteWriter(self._fs, self.call, self._at(path), block_nbytes)

    def put(
        self,
        path: str,
        data: bytes,
        *,
        points: tuple[str, str] | None = None,
        step: int | None = None,
    ) -> None:
        """See `Storage.put`."""
        at = self._at(path)
        if points:
            point(points[0], step=step)
        self.call(f"write {at}", lambda: self._fs.pipe_file(at, data))
        if points:
            point(points[1], step=step)

    def put_new(
        self,
        path: str,
        data: bytes,
        *,
        points: tuple[str, str] | None = None,
        step: int | None = None,
    ) -> None:
        """See `PutsIfAbsent.put_new`.

        Where the file system, or the store behind it, knows no conditional write, it looks first
        and writes then: two writers that do so in the same moment are told apart only by reading
        back what they wrote.
        """
        at = self._at(path)
        if points:
            point(points[0], step=step)
        if self._creates:
            self._creates = self._create_small(path, data)
        if not self._creates:
            if self.size(path) is not None:
                raise FileExistsError(errno.EEXIST, "exists already", at)
            self.call(f"write {at}", lambda: self._fs.pipe_file(at, data))
        if points:
            point(points[1], step=step)

    def _create_small(self, path: str, data: bytes) -> bool:
        """Writes it by a conditional write; False if the store has none (nothing is written)."""
        at = self._at(path)
        try:
            self.call(f"create {at}", lambda: self._fs.pipe_file(at, data, mode="create"))
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EINVAL):
                raise
            # A refused condition that is not named as such, or a header that the store rejects.
            if self.size(path) is not None:
                raise FileExistsError(errno.EEXIST, "exists already", at) from error
            return False
        return True

    def make_folder(self, path: str) -> None:
        """See `Storage.make_folder`."""
        if self._has_folders:
            at = self._at(path)
            self.call(f"make {at}", lambda: self._fs.makedirs(at, exist_ok=True))

    def sync_folder(self, path: str) -> None:
        """Nothing to do: see the class."""

    def remove(self, path: str) -> None:
        """See `Storage.remove`."""
        at = self._at(path)
        with contextlib.suppress(FileNotFoundError):
            self.call(f"remove {at}", lambda: self._fs.rm_file(at))

    def remove_folder(self, path: str) -> None:
        """See `Storage.remove_folder`."""
        at = self._at(path)
        if not self.list(path):
            with contextlib.suppress(FileNotFoundError):
                self.call(f"remove {at}", lambda: self._fs.rmdir(at))

    def abort_unfinished(self) -> None:
        """Ends uploads that a killed process left half done: no listing shows them, bills do.

        For whoever holds the lock of this folder, before the first upload.
        """
        if not hasattr(self._fs, "abort_mpu"):
            return
        bucket, key, _ = self._fs.split_path(self._root)
        prefix = f"{key}/" if key else ""
        found = self.call(
            f"list unfinished uploads to {self._root}",
            lambda: self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix),
        )
        for each in found.get("Uploads", []):
            abort = partial(self._fs.abort_mpu, bucket, each["Key"], each["UploadId"])
            self.call(f"end an upload to {each['Key']}", abort)

    def call(self, what: str, call: Callable[[], T]) -> T:
        """Calls the file system, past its cache of listings, within the deadline.

        Raises:
            OSError: Whatever it raised.
            DeadlineError: It did not answer.
        """
        self._fs.invalidate_cache()
        try:
            return within(self._timeout_s, f"{self.url}: {what}", call)
        except (*_SPEAKS_FOR_ITSELF, PlanariaError):
            raise
        except OSError as error:
            if error.errno == errno.EIO:  # on a disk, damage; here, any answer that has no name
                raise OSError(f"{self.url}: {what}: {error.strerror or error}") from error
            raise
        except Exception as error:
            text = str(error) or type(error).__name__
            raise OSError(f"{self.url}: {what}: {text}") from error

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root


def _takes_mode(fs: Any) -> bool:
    """Whether a file system knows `mode="create"` for small files."""
    pipe_file = fs._pipe_file if getattr(fs, "async_impl", False) else fs.pipe_file
    try:
        return "mode" in inspect.signature(pipe_file).parameters
    except (TypeError, ValueError):
        return False
