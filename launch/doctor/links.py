"""Checks of the links between ranks: name resolution, TCP, gloo; and of what is installed."""

import contextlib
import json
import platform
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib import metadata

from planaria.core import procs
from planaria.core.deadline import Deadline
from planaria.errors import ConfigError, DeadlineError
from planaria.launch.doctor import NOTE, OK, WRONG, Finding
from planaria.launch.output import size

_NBYTES = 32 << 20
_PIECE = 1 << 20


def tcp() -> Iterator[Finding]:
    """Round trip and throughput on the loopback interface, and whether the host knows its name."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5.0)
        echo = threading.Thread(target=_echo, args=(server,), daemon=True)
        echo.start()
        with socket.create_connection(server.getsockname(), timeout=5.0) as link:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            trips = sorted(_trip(link) for _ in range(50))
            began = time.perf_counter()
            piece = bytes(_PIECE)
            for _ in range(_NBYTES // _PIECE):
                link.sendall(piece)
            link.shutdown(socket.SHUT_WR)
            while link.recv(1 << 16):
                pass
            rate = _NBYTES / (time.perf_counter() - began)
    trip = trips[len(trips) // 2]
    yield Finding(
        "loopback TCP",
        OK,
        f"{trip * 1e6:.0f} µs there and back, {size(rate)}/s",
        {"round_trip_s": trip, "bytes_per_s": rate},
    )
    name = socket.gethostname()
    try:
        yield Finding("host name", OK, f"{name} is {socket.gethostbyname(name)}")
    except OSError as error:
        yield Finding(
            "host name",
            NOTE,
            f"{name} has no address ({error}): for several nodes put it into /etc/hosts, or set "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
        )


def _trip(link: socket.socket) -> float:
    began = time.perf_counter()
    link.sendall(b"x")
    link.recv(1)
    return time.perf_counter() - began


def _echo(server: socket.socket) -> None:
    """Sends single bytes back, and swallows the rest."""
    with contextlib.suppress(OSError):
        link, _ = server.accept()
        link.settimeout(10.0)
        with link:
            while data := link.recv(1 << 20):
                if len(data) == 1:
                    link.sendall(data)


# Two ranks in one process: what hangs is ended with it.
_GLOO = """
import json, sys, threading
from datetime import timedelta
import torch
import torch.distributed as dist
store, limit, sums = dist.HashStore(), timedelta(seconds=float(sys.argv[1])), {}
def rank(r):
    group = dist.ProcessGroupGloo(dist.PrefixStore("doctor", store), r, 2, limit)
    value = torch.full((1000,), float(r + 1))
    group.allreduce([value]).wait()
    sums[r] = float(value.sum())
ranks = [threading.Thread(target=rank, args=(r,), daemon=True) for r in range(2)]
[t.start() for t in ranks]
[t.join(float(sys.argv[1])) for t in ranks]
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"right": sums == {0: 3000.0, 1: 3000.0}, "gpus": gpus}))
"""


def gloo(limit_s: float = 60.0) -> Iterator[Finding]:
    """Whether two ranks can sum, and which GPUs torch sees."""
    command = [sys.executable, "-c", _GLOO, str(limit_s / 2)]
    try:
        with procs.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            code = process.wait(Deadline(limit_s))
            assert process.stdout is not None
            assert process.stderr is not None
            out, err = process.stdout.read().decode(), process.stderr.read().decode()
    except (DeadlineError, ConfigError) as error:
        yield Finding("gloo", WRONG, f"two ranks on this machine did not get to sum: {error}")
        return
    try:
        facts = json.loads(out)
    except ValueError:
        last = (err.strip().splitlines() or ["it said nothing"])[-1]
        yield Finding("gloo", WRONG, f"two ranks on this machine failed (code {code}): {last}")
        return
    if facts["right"]:
        yield Finding("gloo", OK, "two ranks on this machine sum right")
    else:
        yield Finding("gloo", WRONG, "two ranks on this machine do not come to the right sum")
    gpus = facts["gpus"]
    yield Finding("GPU", OK if gpus else NOTE, ", ".join(gpus) or "none", {"gpus": gpus})


def versions() -> Iterator[Finding]:
    """What is installed, against what Planaria asks for."""
    try:
        required = metadata.requires("planaria") or []
    except metadata.PackageNotFoundError:
        yield Finding("versions", NOTE, "planaria is not installed as a package")
        return
    found, wrong = {"python": platform.python_version()}, []
    for line in required:
        match = re.match(r"([A-Za-z0-9_.-]+)\s*>=\s*([0-9.]+)", line)
        if match is None or "extra ==" in line:
            continue
        name, least = match.groups()
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing (>= {least})")
            continue
        if _numbers(found[name]) < _numbers(least):
            wrong.append(f"{name} {found[name]} is older than {least}")
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    if wrong:
        text = f"{'; '.join(wrong)}: install Planaria again. ({text})"
    yield Finding("versions", WRONG if wrong else OK, text, {"versions": found})


def _numbers(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3]]
