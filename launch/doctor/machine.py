"""Checks of the machine: disk, memory, shared memory."""

import contextlib
import errno
import mmap
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from planaria.launch.doctor import NOTE, OK, WRONG, Finding
from planaria.launch.output import size

_PROBE_NBYTES = 64 << 20
_BLOCK = 4 << 20
_LEAST_FREE = 1 << 30
_LEAST_SHM = 64 << 20


def disk(folder: Path, state_nbytes: int | None) -> Iterator[Finding]:
    """Free space, the speed of a durable write, and O_DIRECT.

    Args:
        folder: Where checkpoints go; it exists.
        state_nbytes: Size of a checkpoint there, if one is known.
    """
    free = shutil.disk_usage(folder).free
    wanted = max(_LEAST_FREE, 2 * (state_nbytes or 0))
    text = f"{size(free)} free for {folder}"
    facts = {"free_bytes": free, "path": str(folder)}
    if free >= wanted:
        yield Finding("disk space", OK, text, facts)
    else:
        why = f"two checkpoints need {size(2 * state_nbytes)}" if state_nbytes else "little"
        yield Finding(
            "disk space", WRONG, f"{text}, {why}: free some, or planaria prune old ones", facts
        )
    # Named like what a killed process leaves, so that a later doctor would find it.
    probe = folder / f"doctor.tmp-{secrets.token_hex(4)}"
    try:
        nbytes = min(_PROBE_NBYTES, max(_BLOCK, free // 4) // _BLOCK * _BLOCK)
        yield _write_speed(probe, nbytes)
        yield _direct(probe)
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _write_speed(probe: Path, nbytes: int) -> Finding:
    block = secrets.token_bytes(_BLOCK)  # file systems that compress must not look fast
    try:
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        return Finding("disk write", WRONG, f"cannot write to {probe.parent}: {error.strerror}")
    try:
        began = time.perf_counter()
        for _ in range(nbytes // _BLOCK):
            view = memoryview(block)
            while view:
                view = view[os.write(fd, view) :]
        written = time.perf_counter()
        os.fsync(fd)
        synced = time.perf_counter()
    finally:
        os.close(fd)
    rate = nbytes / (synced - began)
    return Finding(
        "disk write",
        OK,
        f"{size(rate)}/s with fsync, which took {(synced - written) * 1e3:.0f} ms of "
        f"{(synced - began) * 1e3:.0f} ms for {size(nbytes)}",
        {"bytes_per_s": rate, "fsync_s": synced - written},
    )


def _direct(probe: Path) -> Finding:
    """Whether writes can go past the page cache."""
    flag = getattr(os, "O_DIRECT", 0)
    aligned = mmap.mmap(-1, mmap.PAGESIZE)
    try:
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flag, 0o600)
        try:
            os.write(fd, aligned)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            return Finding("O_DIRECT", WRONG, f"a write failed: {error.strerror}")
        return Finding(
            "O_DIRECT",
            NOTE,
            "not on this file system: checkpoints go through the page cache, and are as safe",
            {"supported": False},
        )
    finally:
        aligned.close()
    return Finding("O_DIRECT", OK, "supported", {"supported": True})


def memory(state_nbytes: int | None) -> Iterator[Finding]:
    """What is available to this machine, and to this container."""
    available = _meminfo("MemAvailable")
    total = _meminfo("MemTotal")
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    text = f"{size(available)} of {size(total)} available"
    if limit is not None and limit < total:
        available = min(available, max(0, limit - (used or 0)))
        text = f"{size(available)} available of this container's limit of {size(limit)}"
    facts = {"available_bytes": available, "total_bytes": total, "limit_bytes": limit}
    wanted = max(_LEAST_FREE, state_nbytes or 0)
    if available >= wanted:
        yield Finding("memory", OK, text, facts)
    else:
        need = size(wanted)
        yield Finding("memory", WRONG, f"{text}, less than {need}: end what uses it", facts)


def _meminfo(key: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/meminfo does not say {key}")


def _cgroup(name: str) -> int | None:
    """A number of this process's control group (version 2), None where there is none."""
    try:
        path = Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
        for folder in (Path("/sys/fs/cgroup") / path, Path("/sys/fs/cgroup")):
            if (folder / name).is_file():
                text = (folder / name).read_text().strip()
                return None if text == "max" else int(text)
    except (OSError, ValueError):
        pass
    return None


def shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """What data workers and torch's own tensors between processes need."""
    if not folder.is_dir():
        text = f"there is no {folder}: data workers cannot hand over batches"
        yield Finding("shared memory", WRONG, text)
        return
    free = shutil.disk_usage(folder).free
    text, facts = f"{size(free)} free in {folder}", {"free_bytes": free}
    if not os.access(folder, os.W_OK):
        yield Finding("shared memory", WRONG, f"{folder} cannot be written", facts)
    elif free < _LEAST_SHM:
        yield Finding(
            "shared memory", WRONG, f"{text}: start the container with --shm-size=1g", facts
        )
    else:
        yield Finding("shared memory", OK, text, facts)
    try:
        os.close(os.memfd_create("planaria-doctor"))
    except (AttributeError, OSError) as error:
        yield Finding("memfd", NOTE, f"not available ({error}): no memory tier on this machine")
