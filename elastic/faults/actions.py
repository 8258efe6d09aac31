"""What a runner does to a job from outside, one function a kind of fault.

Each returns what it did, for people, and, for faults that last, a function that ends it.
"""

import contextlib
import fnmatch
import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from planaria.elastic.faults import sockets
from planaria.elastic.faults.processes import RankProcess, marked, parent_of
from planaria.elastic.faults.schedule import Fault
from planaria.errors import ConfigError, NotSupportedError

#: A slow rank is stopped and let go on this often.
_SLICE_S = 0.05

End = Callable[[], str]


@dataclass(frozen=True)
class Target:
    """What a fault is done to.

    Attributes:
        mark: The mark of the job.
        ranks: Its live ranks.
        folder: The folder of its run, for faults in files.
        seed: What places of corruption are drawn from.
    """

    mark: str
    ranks: Mapping[int, RankProcess]
    folder: Path
    seed: int


def begin(fault: Fault, target: Target) -> tuple[str, End | None]:
    """Does a fault.

    Returns:
        What was done, and for faults that last what ends it and says so.

    Raises:
        ConfigError: There is nothing to do it to, or it is not possible here.
    """
    hit = [target.ranks[r] for r in fault.ranks or sorted(target.ranks) if r in target.ranks]
    if not hit and fault.kind != "corrupt_file":
        raise ConfigError(f"no live rank {', '.join(map(str, fault.ranks)) or 'at all'}")
    if fault.kind in ("kill", "terminate", "stop"):
        return _signalled(fault, hit)
    return _OTHERS[fault.kind](fault, hit, target)


def _signalled(fault: Fault, hit: Sequence[RankProcess]) -> tuple[str, End | None]:
    number = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "stop": signal.SIGSTOP}
    done = [r for r in hit if r.signal(number[fault.kind])]
    if not done:
        raise ConfigError("the ranks were gone already")
    told = f"{number[fault.kind].name} to {_names(done)}"
    if fault.kind != "stop":
        return told, None

    def go_on() -> str:
        woken = [r for r in done if r.signal(signal.SIGCONT)]
        gone = [r for r in done if r not in woken]
        return "; ".join(
            [f"SIGCONT to {_names(woken)}"] * bool(woken)
            + [f"{_names(gone)} had been ended meanwhile"] * bool(gone)
        )

    return told, go_on


def _slow(fault: Fault, hit: Sequence[RankProcess], target: Target) -> tuple[str, End | None]:
    over = threading.Event()

    def work() -> None:
        try:
            while not over.is_set():
                for rank in hit:
                    rank.signal(signal.SIGSTOP)
                over.wait(_SLICE_S * (1 - fault.share))
                for rank in hit:
                    rank.signal(signal.SIGCONT)
                over.wait(_SLICE_S * fault.share)
        finally:
            for rank in hit:
                rank.signal(signal.SIGCONT)

    thread = threading.Thread(target=work, name="planaria-slow", daemon=True)
    thread.start()

    def end() -> str:
        over.set()
        thread.join()
        return f"{_names(hit)} at full speed"

    return f"{_names(hit)} gets {fault.share:.0%} of its time", end


def _partition(fault: Fault, hit: Sequence[RankProcess], target: Target) -> tuple[str, End | None]:
    inside = {rank.rank for rank in hit}

    def pick() -> list[sockets.Connection]:
        one, other = sides(target, inside)
        return sockets.between(one, other)

    cut = sockets.Cut(pick)
    others = sorted(set(target.ranks) - inside)
    said = f"rank {_list(sorted(inside))} cut off from rank {_list(others)}"
    return said, lambda: f"healed, {cut.end()} ends of connections had been silent"


def sides(target: Target, inside: set[int]) -> tuple[set[int], set[int]]:
    """The processes of the two sides of a partition, as they are now.

    Whatever has ranks of one side alone below it, such as the agent of a node, is on that side, as
    is what ranks have started; what has ranks of both belongs to none.
    """
    jobs = marked(target.mark)
    above: dict[int, set[bool]] = {}
    own: dict[int, bool] = {}
    for pid, env in jobs.items():
        if env.get("RANK", "").isdecimal():
            own[pid] = int(env["RANK"]) in inside
            parent = parent_of(pid)
            while parent in jobs:
                above.setdefault(parent, set()).add(own[pid])
                parent = parent_of(parent)
    for pid in jobs:
        if pid not in own and len(above.get(pid, ())) == 1:
            own[pid] = next(iter(above[pid]))
    return {p for p, mine in own.items() if mine}, {p for p, mine in own.items() if not mine}


def _store_loss(fault: Fault, hit: Sequence[RankProcess], target: Target) -> tuple[str, End | None]:
    port = fault.target.rpartition(":")[2] or hit[0].env.get("MASTER_PORT", "")
    if not port.isdecimal():
        raise ConfigError("the ranks have no MASTER_PORT: name the store with target=HOST:PORT")
    pids = {rank.pid for rank in hit}
    cut = sockets.Cut(lambda: sockets.to_port(pids, int(port)), reset=True)
    return (
        f"connections of {_names(hit)} to the store at port {port} are cut",
        lambda: f"the store can be reached again, {cut.end()} connections had been cut",
    )


def _corrupt_memory(
    fault: Fault, hit: Sequence[RankProcess], target: Target
) -> tuple[str, End | None]:
    drawn = random.Random(target.seed)
    return "; ".join(corrupt_memory(rank.pid, fault.target, drawn) for rank in hit), None


def corrupt_memory(pid: int, pattern: str, drawn: random.Random) -> str:
    """Changes one bit in a writable mapping of a process whose name matches a pattern.

    Raises:
        ConfigError: There is no such mapping, or this process may not write to it.
    """
    regions: list[tuple[int, int, str]] = []
    try:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, mode, _, _, _, *name = line.split(maxsplit=5)
            named = name[0] if name else ""
            if "w" in mode and fnmatch.fnmatch(named, pattern):
                start, _, end = span.partition("-")
                regions.append((int(start, 16), int(end, 16), named))
        if not regions:
            raise ConfigError(f"process {pid} has no writable mapping {pattern}")
        start, end, named = drawn.choice(regions)
        place = drawn.randrange(start, end)
        with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(place)
            old = memory.read(1)[0]
            new = old ^ 1 << drawn.randrange(8)
            memory.seek(place)
            memory.write(bytes([new]))
    except OSError as error:
        raise ConfigError(f"the memory of process {pid} cannot be changed: {error}") from error
    return f"byte {place - start} of {named} of process {pid}: {old} -> {new}"


def _corrupt_file(
    fault: Fault, hit: Sequence[RankProcess], target: Target
) -> tuple[str, End | None]:
    found = [p for p in target.folder.glob(fault.target) if p.is_file() and p.stat().st_size]
    if not found:
        raise ConfigError(f"no file {fault.target} in the run's folder")
    newest = max(found, key=lambda p: (p.stat().st_mtime_ns, str(p)))
    return corrupt_file(newest, random.Random(target.seed)), None


def corrupt_file(path: Path, drawn: random.Random) -> str:
    """Changes one bit of a file in place, and leaves its times as they were."""
    stat = path.stat()
    place = drawn.randrange(stat.st_size)
    with path.open("r+b", buffering=0) as file:
        file.seek(place)
        old = file.read(1)[0]
        new = old ^ 1 << drawn.randrange(8)
        file.seek(place)
        file.write(bytes([new]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return f"byte {place} of {path.name}: {old} -> {new}"


@contextlib.contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[Path]:
    """A file system in memory, of a size of its own, at a new folder, for a run with a full disk.

    Raises:
        NotSupportedError: This process may not mount.
    """
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "none", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise NotSupportedError(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=60)


def _names(ranks: Sequence[RankProcess]) -> str:
    return "rank " + ", ".join(f"{r.rank} (process {r.pid})" for r in ranks)


def _list(items: Sequence[int]) -> str:
    return ", ".join(map(str, items)) or "none"


_OTHERS = {
    "slow": _slow,
    "partition": _partition,
    "store_loss": _store_loss,
    "corrupt_memory": _corrupt_memory,
    "corrupt_file": _corrupt_file,
}
