"""Writing one rank's file of a save, chunk by chunk as they are captured."""

import queue
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from planaria import telemetry
from planaria.checkpoint import points
from planaria.checkpoint.capture.copying import Chunk
from planaria.checkpoint.capture.packing import Packer
from planaria.checkpoint.capture.pool import Buffers
from planaria.checkpoint.format import checksum
from planaria.checkpoint.format.manifest import FileInfo
from planaria.checkpoint.layout.own_plan import OwnPlan
from planaria.checkpoint.storage.root import Root, step_folder
from planaria.core.points import point
from planaria.errors import StorageError

T = TypeVar("T")

#: Seconds to wait before a failed write is tried again, one after the other.
RETRY_AFTER_S = (0.1, 0.5, 2.0)
#: Chunks that go to disk in one write where as many are ready: it keeps the disk's queue full.
WRITE_CHUNKS = 8


class CapturedChunks:
    """The chunks of one file, on their way from the capturing to the writing thread."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Chunk | None] = queue.SimpleQueue()

    def put(self, chunk: Chunk) -> None:
        """Hands a chunk over."""
        self._queue.put(chunk)

    def end(self) -> None:
        """There are no more."""
        self._queue.put(None)

    def take(self, limit: int = 1) -> list[Chunk]:
        """Waits for the next chunk, and takes what else is there; empty once there are no more."""
        taken: list[Chunk] = []
        while len(taken) < limit:
            try:
                chunk = self._queue.get(block=not taken)
            except queue.Empty:
                break
            if chunk is None:
                self._queue.put(None)  # for whoever asks next
                break
            taken.append(chunk)
        return taken


class Persister:
    """Writes files of one rank.

    Args:
        root: Where steps are committed.
        rank: This rank.
        retries: How often a failed write is tried again.
    """

    def __init__(self, root: Root, rank: int, retries: int) -> None:
        self._root, self._rank, self._retries = root, rank, retries

    def write(
        self,
        step: int,
        attempt: str,
        own: OwnPlan,
        chunks: CapturedChunks,
        buffers: Buffers,
        failed: Callable[[], Exception | None],
        packer: Packer | None = None,
    ) -> FileInfo | None:
        """Writes this rank's file durably; None if it has nothing to write.

        Args:
            step: Step that is saved.
            attempt: Id of the save.
            own: What goes into the file.
            chunks: Its chunks; all that are taken are given back.
            buffers: Where they lie.
            failed: Why the capture failed, None while it has not.
            packer: Captures what has changed, where not everything is written.

        Raises:
            StorageError: It cannot be written.
        """
        if not own.entries:
            return None
        name = f"rank-{self._rank:05d}-{attempt}.safetensors"
        header = own.header.render(step)
        sums: list[int] = []
        taken: list[Chunk] = []
        if packer is not None:
            # All of it may be unchanged: then there is no file.
            taken = chunks.take(WRITE_CHUNKS)
            if not taken and (error := failed()) is not None:
                raise error
            if not taken and not packer.writes_any:
                return None
        try:
            self.on_disk(step, lambda: self._root.prepare(step))
            path = f"{step_folder(step)}/{name}"
            writer = self.on_disk(step, lambda: self._root.storage.create(path))
        except BaseException:
            _give_back(buffers, taken)
            raise

        def write(place: str, *parts: memoryview | bytes) -> None:
            point(place, step=step)
            writer.write(*parts)

        def fill() -> None:
            point(points.WRITE_HEADER, step=step)
            writer.fill(header)

        try:
            # The header comes last where it can: half a file is then not even valid.
            header_is_last = writer.reserve(len(header))
            if not header_is_last:
                self.on_disk(step, lambda: write(points.WRITE_HEADER, header))
            while taken := taken or chunks.take(WRITE_CHUNKS):
                if (error := failed()) is not None:
                    raise error
                now, taken = taken, []
                self._write_chunks(step, now, buffers, partial(write, points.WRITE_CHUNK))
                sums += [chunk.checksum for chunk in now]
            if (error := failed()) is not None:
                raise error
            if packer is not None:  # only now is it known what the file holds
                header = packer.header(step, len(header))
            if header_is_last:
                self.on_disk(step, fill)
            point(points.WRITE_END, step=step)
            with telemetry.span("checkpoint.fsync", step=step):
                # Not again: after a failed fsync the next one may succeed with the bytes lost.
                self.on_disk(step, writer.finish, again=False)
            point(points.FSYNC_END, step=step)
        except BaseException:
            _give_back(buffers, taken)
            writer.abort()
            raise
        return FileInfo(
            name,
            len(header),
            own.nbytes if packer is None else packer.nbytes,
            buffers.buffer_nbytes,
            checksum.checksum(header),
            sums,
        )

    def _write_chunks(
        self, step: int, taken: list[Chunk], buffers: Buffers, write: Callable[..., None]
    ) -> None:
        try:
            for chunk in taken:
                buffers.check(chunk.buffer, chunk.generation)
            views = [chunk.buffer.view(chunk.nbytes) for chunk in taken]
            self.on_disk(step, lambda: write(*views))
            for chunk in taken:
                buffers.check(chunk.buffer, chunk.generation)
        finally:
            _give_back(buffers, taken)

    def on_disk(self, step: int, call: Callable[[], T], *, again: bool = True) -> T:
        """Calls it, and after an error of the disk again, as often as the failure policy says.

        Raises:
            StorageError: It failed each time.
        """
        for pause in (*RETRY_AFTER_S[: self._retries if again else 0], None):
            try:
                return call()
            except OSError as error:
                if pause is None:
                    raise StorageError(
                        f"rank {self._rank} cannot write to {self._root.storage.url}"
                        f"/{step_folder(step)}: {error}"
                    ) from error
                telemetry.event("checkpoint.retry", step=step, error=str(error))
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")


def _give_back(buffers: Buffers, taken: list[Chunk]) -> None:
    for chunk in taken:
        buffers.release(chunk.buffer, chunk.generation)
