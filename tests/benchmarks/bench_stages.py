"""Each stage of the data path alone, on one thread, against what the machine can do.

A save: the copy into the pool, which looks for NaNs and makes the checksum as well, the writes, the
sync, the commit.
A load: the cold read, the checksum, placing. Each is run with the code that saves and loads use,
over all of the state, in turn with a plain copy, a raw aligned write, its fsync, a raw commit and a
raw cold read of as many bytes. All of a save by the stages, one after the other, is a file that the
safetensors library reads: it is compared bit for bit with the state, as is what was placed.

`--files` writes the same bytes as several files at once, one thread each, in turn with one file.
The rule by which a rank would write several: on an idle machine (where others run, more threads get
more of the processor, and that alone is faster) they are faster by a tenth in the median, and in
no turn slower. The table says what comes of it.

Run: ``make bench SUITE=stages``, or
``python tests/benchmarks/bench_stages.py [--mb 512] [--turns 5] [--files 2,4]``.
"""

import argparse
import ctypes
import os
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import limits
import torch
from safetensors.torch import load_file
from states import State, same_bits
from timing import Goal, Turns, clock, in_turn, machine, publish_tables

from planaria.checkpoint.capture.copying import ChunkCopier
from planaria.checkpoint.capture.kernels import place_pieces
from planaria.checkpoint.capture.pool import Buffer, BufferPool
from planaria.checkpoint.capture.warming import warm
from planaria.checkpoint.format.checksum import checksum
from planaria.checkpoint.layout.own_plan import Announcer, OwnPlan
from planaria.checkpoint.layout.plan import make_plan
from planaria.checkpoint.opening import CHUNK_NBYTES
from planaria.checkpoint.persist import WRITE_CHUNKS
from planaria.checkpoint.state.stateset import StateSet
from planaria.checkpoint.storage.local import LocalStorage
from planaria.core.deadline import Deadline

#: Stage -> the limit that it is measured against.
SAVE = {
    "copy into the pool": "memcpy",
    "write": "raw write",
    "fsync": "raw fsync",
    "commit": "raw commit",
}
LOAD = {"read, cold": "raw read", "verify": "memcpy", "place": "memcpy"}

#: Below this load average the machine counts as idle.
IDLE_LOAD = 1.0


class Stages:
    """The data path of one process, stage by stage.

    Args:
        root: A folder to work in.
        mb: Size of the state.
        tensors: How many there are.
    """

    def __init__(self, root: Path, mb: int, tensors: int) -> None:
        warm()
        self.root, self.state = root, State(tensors, (mb << 20) // tensors // 4)
        self.live = StateSet({"model": self.state.module})
        collected = self.live.collect().tensors
        announced, _ = Announcer()(collected)
        self.own = OwnPlan(make_plan([announced], None), 0, CHUNK_NBYTES)
        self.pool = BufferPool(self.own.nbytes + CHUNK_NBYTES, CHUNK_NBYTES)
        self.pool.reserve(self.own.nbytes)
        count = len(self.own.chunks)
        taken = [self.pool.acquire(Deadline(60)) for _ in range(count)]
        self.buffers: list[Buffer] = sorted(taken, key=lambda b: b.tensor.data_ptr())
        self.views = [
            buffer.view(chunk.nbytes)
            for buffer, chunk in zip(self.buffers, self.own.chunks, strict=True)
        ]
        self.nbytes = self.own.nbytes
        self.header = self.own.header.render(1)
        self.storage = LocalStorage(root)
        self.memory = limits.Memory(self.nbytes)
        self.sums = [0] * count
        self.path = root / "data.safetensors"
        self.writer: Any = None
        self.copier = ChunkCopier(self.own.sources(collected), self.own.chunks, self.pool, {}, 60.0)

    # A save

    def copy(self) -> float:
        """Into buffers that were touched before; looks for NaNs and makes checksums."""
        self.state.renew(1)

        def run() -> None:
            copies = map(self.copier._copy, self.buffers, self.own.chunks)
            self.sums = [self.copier._finish(copy).checksum for copy in copies]

        return clock(run)

    def write(self) -> float:
        """What was copied, without the sync."""
        limits.remove(self.path)
        self.writer = self.storage.create(self.path.name)

        def run() -> None:
            self.writer.reserve(len(self.header))
            for i in range(0, len(self.views), WRITE_CHUNKS):
                self.writer.write(*self.views[i : i + WRITE_CHUNKS])
            self.writer.fill(self.header)

        return clock(run)

    def finish(self) -> float:
        """The sync of what was written, of its folder, and the close."""
        return clock(self.writer.finish)

    def commit(self) -> float:
        """A small file, put in place by rename, all of it synced."""
        data = b" " * (200 * len(self.own.entries))
        return clock(lambda: self.storage.put("manifest.json", data))

    # A load

    def read(self) -> float:
        """Into buffers, neighbours in one go, from a file that the page cache has not."""
        runs, first = list[memoryview](), self.buffers[0].tensor
        for view, buffer in zip(self.views, self.buffers, strict=True):
            ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(view)), 0, len(view))
            slab = buffer.tensor.untyped_storage()
            if not runs or buffer.tensor.data_ptr() == slab.data_ptr():
                runs.append(memoryview(b""))
                first = buffer.tensor
            nbytes = len(runs[-1]) + len(view)
            runs[-1] = first.as_strided((nbytes,), (1,)).numpy().data
        limits.forget(self.path)

        def run() -> None:
            at = len(self.header)
            for run in runs:
                assert self.storage.read_into(self.path.name, at, run) == len(run)
                at += len(run)

        return clock(run)

    def verify(self) -> float:
        """Of what was read."""

        def run() -> None:
            assert [checksum(view) for view in self.views] == self.sums

        return clock(run)

    def place(self) -> float:
        """Into the tensors, from what was read."""
        expected = self.state.copy()
        self.state.clear()

        def run() -> None:
            for buffer, chunk in zip(self.buffers, self.own.chunks, strict=True):
                into = self.copier._sources.addresses[chunk.numbers] + chunk.starts
                place_pieces(into, buffer.tensor.data_ptr() + chunk.places, chunk.sizes)

        seconds = clock(run)
        self.state.check(expected)
        return seconds

    # Limits

    def memcpy(self) -> float:
        """A plain copy of as many bytes between touched pages."""
        half = self.memory.nbytes // 2 // limits.ALIGNMENT * limits.ALIGNMENT
        base = self.memory.tensor.data_ptr()
        return self.nbytes / half * clock(lambda: ctypes.memmove(base + half, base, half))

    def raw_write(self) -> float:
        """Aligned blocks past the page cache, without the sync."""
        path = self.root / "raw"
        limits.remove(path)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o644)
        self.raw_fd = fd
        step = CHUNK_NBYTES * WRITE_CHUNKS

        def run() -> None:
            for at in range(0, self.memory.nbytes, step):
                os.pwrite(fd, self.memory.view[at : at + step], at)

        return clock(run)

    def raw_fsync(self) -> float:
        """Of that, and of its folder."""

        def run() -> None:
            os.fsync(self.raw_fd)
            os.close(self.raw_fd)
            folder = os.open(self.root, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)

        return clock(run)

    def raw_commit(self) -> float:
        """As `commit`, in plain calls."""
        new, final = self.root / "new", self.root / "final"

        def run() -> None:
            with new.open("wb") as file:
                file.write(b" " * (200 * len(self.own.entries)))
                file.flush()
                os.fsync(file.fileno())
            new.rename(final)
            folder = os.open(self.root, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)

        return clock(run)

    def raw_read(self) -> float:
        """Aligned blocks past the page cache, on one thread."""
        path = self.root / "raw"
        limits.forget(path)
        return clock(lambda: limits.read_raw(path, self.memory, threads=1))

    def check(self) -> None:
        """Makes sure that the stages have saved the state.

        Raises:
            NotMeasured: They have not.
        """
        stored = load_file(self.path)
        for name, value in self.state.tensors.items():
            same_bits(stored[f"model.{name}"], value, name)

    def files(self, count: int) -> float:
        """All bytes until durable, as so many files, each written by a thread of its own."""
        paths = [self.root / f"part-{count}-{i}" for i in range(count)]
        for path in paths:
            limits.remove(path)
        writers = [self.storage.create(path.name) for path in paths]
        errors: list[BaseException] = []

        def one(number: int) -> None:
            try:
                mine = self.views[number::count]
                for i in range(0, len(mine), WRITE_CHUNKS):
                    writers[number].write(*mine[i : i + WRITE_CHUNKS])
                writers[number].finish()
            except BaseException as error:
                errors.append(error)

        def run() -> None:
            threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        seconds = clock(run)
        if errors:
            raise errors[0]
        for number, path in enumerate(paths):
            written = path.read_bytes()
            assert written == b"".join(self.views[number::count]), "not what was to be written"
            limits.remove(path)
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mb", type=int, default=512, help="size of the state")
    parser.add_argument("--tensors", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--files", default="2,4", help="numbers of files to compare with one")
    args = parser.parse_args()
    started = machine()
    torch.set_num_threads(1)
    counts = [1, *(int(n) for n in args.files.split(",") if n)]
    with tempfile.TemporaryDirectory() as root:
        stages = Stages(Path(root), args.mb, args.tensors)
        calls: dict[str, Callable[[], float]] = {
            "memcpy": stages.memcpy,
            "copy into the pool": stages.copy,
            "raw write": stages.raw_write,
            "raw fsync": stages.raw_fsync,
            "write": stages.write,
            "fsync": stages.finish,
            "raw commit": stages.raw_commit,
            "commit": stages.commit,
            "raw read": stages.raw_read,
            "read, cold": stages.read,
            "verify": stages.verify,
            "place": stages.place,
        }
        turns = in_turn(calls, args.turns, must=calls)
        stages.check()
        spread = in_turn(
            {str(n): partial(stages.files, n) for n in counts}, args.turns, must=map(str, counts)
        )
    publish_tables(
        "stages",
        [
            (f"{what} of {args.mb} MB in {args.tensors} tensors, one thread (measured)",
             rows(turns, of, stages.nbytes))
            for what, of in (("Save", SAVE), ("Load", LOAD))
        ]
        + [(f"{args.mb} MB until durable, as several files (measured)",
            files_rows(spread, counts, stages.nbytes, started["load_average"][0]))],
        vars(args),
        goals=[
            *(Goal(f"{stage}, of {limit}", turns.ratio(limit, stage)["median"], 0.9)
              for stage, limit in (("copy into the pool", "memcpy"), ("write", "raw write"),
                                   ("read, cold", "raw read"))),
        ],
        started=started,
    )  # fmt: skip


def rows(turns: Turns, of: dict[str, str], nbytes: int) -> list[dict[str, Any]]:
    """One row a stage: its speed, and what fraction of its limit that is."""
    found = []
    for stage, limit in of.items():
        ratio, median = turns.ratio(limit, stage), turns.median(stage)
        by_bytes = stage not in ("fsync", "commit")
        found.append({
            "stage": stage,
            "ms": median * 1e3,
            "GB/s": nbytes / 1e9 / median if by_bytes else None,
            "limit": limit,
            "limit ms": turns.median(limit) * 1e3,
            "of the limit": ratio["median"],
            "smallest": ratio["min"],
            "largest": ratio["max"],
        })  # fmt: skip
    return found


def verdict(ratio: dict[str, float], load: float) -> str:
    """Whether a rank should write so many files instead of one.

    Args:
        ratio: How many times as fast they are: median, min and max over the turns.
        load: Of the machine, before the run.
    """
    if load >= IDLE_LOAD:
        return "not told: others ran"
    return "yes" if ratio["median"] >= 1.1 and ratio["min"] >= 1 else "no"


def files_rows(turns: Turns, counts: list[int], nbytes: int, load: float) -> list[dict[str, Any]]:
    """One row a number of files."""
    return [
        {
            "files": n,
            "ms": turns.median(str(n)) * 1e3,
            "GB/s": nbytes / 1e9 / turns.median(str(n)),
            "times as fast as one": turns.ratio("1", str(n))["median"],
            "smallest": turns.ratio("1", str(n))["min"],
            "largest": turns.ratio("1", str(n))["max"],
            "worth it": "-" if n == 1 else verdict(turns.ratio("1", str(n)), load),
        }
        for n in counts
    ]


if __name__ == "__main__":
    main()
