"""Run one function on N ranks, each a process of its own, and bring back what they return.

::

    def body(rank: int, scale: float) -> float:          # in the test file or in tests/support
        value = torch.ones(1) * rank * scale
        dist.all_reduce(value)
        return value.item()

    assert run_ranks(2, body, 3.0) == [3.0, 3.0]

A rank is forked from a server that has torch loaded, so it starts in milliseconds. It gets the
environment that a launcher would give it, one torch thread, and (unless `init_group=False`) a gloo
group on the loopback interface. The store is hosted by the caller on a socket that is bound
before anybody knows its port, so ports cannot race and a rank's death never takes the store away.

Every run has one deadline. A rank that fails, dies or hangs is reported as such, with its
traceback or its stacks, and nothing that a rank started is left running.
"""

import contextlib
import importlib
import importlib.util
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from rank_process import Plan, rank_main

PRELOAD = (
    "pytest",
    "hypothesis",
    "numpy",
    "numba",
    "torch",
    "torch._dynamo",  # the first step of any optimizer imports it
    "functorch.compile",  # this and the next: the first torch.compile, whatever its backend
    "torch._dynamo.backends.debugging",
    "torch._inductor.compile_fx",
    "torch._inductor.lowering",
    "torch.distributed",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.tensor.parallel",
    "planaria",
    "planaria.checkpoint.checkpointer",
    "planaria.checkpoint.memory.process",
    "planaria.elastic.agent.agent",
    "planaria.rl_sync.publisher",
    "planaria.rl_sync.subscriber",
    "planaria.launch.cli",  # from here on what `forked` runs
    "planaria.launch.launchers.local",
    "planaria.launch.launchers.session",
    "planaria.launch.demo.train",
    "planaria.launch.demo.session",
    "rank_preload",
)
LOAD_TIMEOUT_S = 240.0
# Once one rank has failed, the others rarely end well: they get this long to say what they saw.
GRACE_AFTER_FAILURE_S = 20.0
# A hung rank writes its stacks and ends at the deadline by itself; after this it is killed.
GRACE_AFTER_DEADLINE_S = 3.0
# What a rank started may need a moment to notice that the rank is gone.
GRACE_FOR_ORPHANS_S = 30.0


class RankError(RuntimeError):
    """A rank did not do what it was asked; the message names it and holds its output."""


class RankDied(RankError):
    """A rank's process ended without a result."""


class RankHung(RankError, TimeoutError):
    """A rank was still running at the deadline; the message holds its stacks."""


class RemoteTraceback(Exception):
    """The cause of an error that is raised again here: the rank's own traceback, as text."""


@dataclass(frozen=True)
class RankResult:
    """How one rank ended.

    Attributes:
        rank: The rank.
        value: What its function returned, `None` if it did not return.
        error: The exception that its function raised, or a `RankDied` or `RankHung`.
        exitcode: As `multiprocessing.Process.exitcode`: negative for a signal.
        output: All that it wrote to its standard output and error.
        ended_at: When its function returned or raised (`time.monotonic`), 0 if it did neither.
    """

    rank: int
    value: Any
    error: BaseException | None
    exitcode: int
    output: str
    ended_at: float


def run_ranks(
    world: int,
    target: str | Callable[..., Any],
    *args: Any,
    timeout: float = 120,
    init_group: bool = True,
    backend: str = "gloo",
    env: Mapping[str, str | None] | None = None,
    expect_dead: Collection[int] = (),
    grace_s: float = GRACE_AFTER_FAILURE_S,
) -> list[Any]:
    """Runs `target(rank, *args)` on `world` ranks and returns what each rank returned.

    Args:
        world: How many ranks.
        target: A module-level function, as an object or as `"module:function"` for a module in
            `tests/support`. It is found by name in the rank, or by its file if it lies in a test.
        *args: Further arguments; they and the results travel pickled.
        timeout: Seconds that all ranks together may take, also the timeout of their group.
        init_group: Whether the ranks find their process group initialised.
        backend: The backend of that group.
        env: Environment variables on top of the caller's; `None` removes one.
        expect_dead: Ranks that may die by SIGKILL; their place in the results holds `None`.
        grace_s: Seconds for the others once a rank has failed.

    Raises:
        RankDied: A rank ended without a result, and not as expected.
        RankHung: A rank was still running at the deadline.
        BaseException: Whatever a rank raised first, with its traceback as the cause.
    """
    results = try_ranks(
        world, target, *args, timeout=timeout, init_group=init_group, backend=backend, env=env,
        grace_s=grace_s,
    )  # fmt: skip
    failed = [
        result
        for result in results
        if result.error
        and not (
            result.rank in expect_dead
            and isinstance(result.error, RankDied)
            and result.exitcode == -signal.SIGKILL
        )
    ]
    if failed:
        first = min(failed, key=_blame)
        assert first.error is not None
        for other in failed:
            if other is not first:
                first.error.add_note(f"[rank {other.rank}] {_one_line(other.error)}")
        raise first.error
    return [r.value for r in results]


def try_ranks(
    world: int,
    target: str | Callable[..., Any],
    *args: Any,
    timeout: float = 120,
    init_group: bool = True,
    backend: str = "gloo",
    env: Mapping[str, str | None] | None = None,
    grace_s: float = GRACE_AFTER_FAILURE_S,
) -> list[RankResult]:
    """As `run_ranks`, but returns how each rank ended instead of raising its error."""
    from torch.distributed import TCPStore

    payload = pickle.dumps(args)
    if world < 1:
        raise ValueError(f"at least one rank, not {world}")
    context = _server()
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        store = TCPStore(
            "127.0.0.1",
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout),
            master_listen_fd=listener.detach(),
        )
        plans = [
            Plan(
                rank=rank,
                target=_locate(target),
                args=payload,
                folder=folder,
                deadline=deadline,
                backend=backend if init_group else None,
                timeout=timeout,
                environ=_environ(rank, world, port, env or {}),
                caller=os.getpid(),
            )
            for rank in range(world)
        ]
        processes = [
            context.Process(target=rank_main, args=(plan,), name=f"rank-{plan.rank}")
            for plan in plans
        ]
        started: list[Any] = []
        killed: set[int] = set()
        try:
            with _hidden_main():
                for process in processes:
                    process.start()
                    started.append(process)
            killed = _watch(processes, plans, deadline, grace_s)
        finally:
            strays = _end(started)
        results = [
            _outcome(plan, process.exitcode, plan.rank in killed)
            for plan, process in zip(plans, processes, strict=True)
        ]
        del store
    for result in results:
        if result.output:
            print(f"[rank {result.rank}]\n{result.output}", end="", flush=True)
    for rank, left in strays.items():
        if results[rank].exitcode == 0:
            raise RankError(f"rank {rank} ended and left processes running (now killed): {left}")
    return results


def stop_server() -> None:
    """Ends the server that ranks are forked from; the next run starts another."""
    server: Any = multiprocessing.forkserver._forkserver
    if server._forkserver_pid is not None:
        # It holds nothing but libraries, which take seconds to end in an orderly way.
        os.kill(server._forkserver_pid, signal.SIGKILL)
    server._stop()
    multiprocessing.resource_tracker._resource_tracker._stop()  # pyright: ignore[reportAttributeAccessIssue]


def server_pids() -> set[int]:
    """Pids of the processes that this module and `multiprocessing` keep between runs."""
    server: Any = multiprocessing.forkserver._forkserver
    tracker: Any = multiprocessing.resource_tracker._resource_tracker
    return {pid for pid in (server._forkserver_pid, tracker._pid) if pid is not None}


def _server() -> multiprocessing.context.ForkServerContext:
    """The server of ranks, with everything loaded: loading is not on any run's time."""
    context = multiprocessing.get_context("forkserver")
    before = server_pids()
    context.set_forkserver_preload(list(PRELOAD))
    # Thread pools that are sized while a library loads are sized once, in the server.
    # It does not get the caller's sys.path, and this folder is on nobody else's.
    with _variable("OMP_NUM_THREADS", "1"), _variable("PYTHONPATH", str(Path(__file__).parent)):
        multiprocessing.forkserver.ensure_running()
    if server_pids() != before:
        with _hidden_main():
            first = context.Process(target=os.getpid)
            first.start()
        first.join(LOAD_TIMEOUT_S)
        if first.exitcode != 0:
            stop_server()
            raise RankError(
                f"the server of ranks did not start within {LOAD_TIMEOUT_S:g} s"
                f" (exit code of its first process: {first.exitcode})"
            )
    return context


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Keeps `multiprocessing` from running the caller's main script again in every rank."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _locate(target: str | Callable[..., Any]) -> tuple[str, str | None, str]:
    """Module, file (where the module cannot be found by its name) and name of the target."""
    if isinstance(target, str):
        module, _, name = target.partition(":")
        if not name:
            raise ValueError(f"name the target as 'module:function', not {target!r}")
        return module, None, name
    name, module = target.__qualname__, target.__module__
    if not name.isidentifier():
        raise ValueError(f"{name} is not a module-level function, so a rank cannot find it by name")
    file = sys.modules[module].__file__
    if module == "__main__":
        # As `multiprocessing` names it: under its own name the script would start all over.
        return "__mp_main__", file, name
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin == file and module.partition(".")[0] != "tests":
            return module, None, name
    return module, file, name


def _environ(rank: int, world: int, port: int, extra: Mapping[str, str | None]) -> dict[str, str]:
    wanted: dict[str, str | None] = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # The store is the caller's: every rank is its client, rank 0 too.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        **extra,
    }
    return {key: value for key, value in wanted.items() if value is not None}


def _watch(processes: list[Any], plans: list[Plan], deadline: float, grace_s: float) -> set[int]:
    """Waits until all ranks ended or time is up; returns the ranks that have to be killed."""
    until = deadline + GRACE_AFTER_DEADLINE_S
    running = dict(enumerate(processes))
    while running and (left := until - time.monotonic()) > 0:
        wait([process.sentinel for process in running.values()], timeout=left)
        for rank, process in list(running.items()):
            if process.exitcode is None:
                continue
            del running[rank]
            if process.exitcode not in (0, -signal.SIGKILL):
                until = min(until, time.monotonic() + grace_s)
    return set(running)


def _end(processes: list[Any]) -> dict[int, list[str]]:
    """Kills what still runs, ranks and their descendants; returns the descendants it found."""
    hung = [process for process in processes if process.exitcode is None]
    for process in hung:
        # Makes it write its stacks, unless it is stopped.
        os.kill(process.pid, signal.SIGABRT)
    for process in hung:
        process.join(1)
        process.kill()
        process.join()
    found: dict[int, list[str]] = {}
    until = time.monotonic() + GRACE_FOR_ORPHANS_S
    for rank, process in enumerate(processes):
        while (left := group_members(process.pid)) and time.monotonic() < until:
            time.sleep(0.02)
        if left:
            found[rank] = [f"{pid}: {command_line(pid)}" for pid in left]
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return found


def group_members(group: int) -> list[int]:
    """Pids of the processes in a process group, zombies left out."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            # The command, in parentheses, may hold spaces: fields are counted behind it.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] not in "ZX":
                members.append(int(entry.name))
    return members


def command_line(pid: int) -> str:
    """The command line of a process, or "?" if it is gone."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return "?"
    return raw.replace(b"\0", b" ").decode(errors="replace").strip() or "?"


def _outcome(plan: Plan, exitcode: int | None, killed: bool) -> RankResult:
    assert exitcode is not None
    rank, output, stacks = plan.rank, _text(plan.path("log")), _text(plan.path("stacks"))
    value, error, ended_at = _unpack(plan) if plan.path("result").exists() else (None, None, 0.0)
    if error is None and stacks.startswith("Timeout"):
        error = RankHung(f"rank {rank} was still running after {plan.timeout:g} s:\n{stacks}")
    elif error is None and killed:
        error = RankHung(
            f"rank {rank} did not end, and was killed:\n{stacks or 'no stacks: it was stopped'}"
        )
    elif error is None and exitcode != 0:
        how = f"by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"with code {exitcode}"
        last = (stacks + output[-4000:]).strip() or "(nothing)"
        error = RankDied(f"rank {rank} died {how}; the last it wrote:\n{last}")
    return RankResult(rank, value, error, exitcode, output, ended_at)


def _unpack(plan: Plan) -> tuple[Any, BaseException | None, float]:
    ok, payload, text, ended_at = pickle.loads(plan.path("result").read_bytes())
    if ok:
        return pickle.loads(payload), None, ended_at
    try:
        error = pickle.loads(payload)
    except Exception:
        error = RankError(f"rank {plan.rank} failed:\n{text}")
    error.add_note(f"[rank {plan.rank}] raised this")
    error.__cause__ = RemoteTraceback(f"\n\n[rank {plan.rank}] {text}")
    return None, error, ended_at


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _blame(result: RankResult) -> tuple[int, float]:
    """Orders failures by how near the cause they are: deaths, then errors by time, then hangs."""
    order = {RankDied: 0, RankHung: 2}
    return order.get(type(result.error), 1), result.ended_at


def _one_line(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
