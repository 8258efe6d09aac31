"""The inside of a rank that `ranks` starts: environment, watchdog, group, function, result."""

import contextlib
import faulthandler
import importlib
import importlib.util
import os
import pickle
import resource
import select
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Plan:
    """What a rank is told.

    Attributes:
        rank: The rank.
        target: Module, file (where the module cannot be found by its name) and function.
        args: The function's further arguments, pickled.
        folder: Where the rank's log, stacks and result go.
        deadline: When the rank has to have ended (`time.monotonic`).
        backend: The backend of the process group, `None` for no group.
        timeout: Seconds, of the run and of the group.
        environ: The rank's whole environment.
        caller: Pid of the process that waits for the rank; without it the rank ends.
    """

    rank: int
    target: tuple[str, str | None, str]
    args: bytes
    folder: str
    deadline: float
    backend: str | None
    timeout: float
    environ: dict[str, str]
    caller: int

    def path(self, kind: str) -> Path:
        """The file for the rank's "log", "stacks" or "result"."""
        return Path(self.folder) / f"rank-{self.rank}.{kind}"


def rank_main(plan: Plan) -> None:
    """Runs the plan's function and leaves what came of it in the plan's folder."""
    # A group of its own: what the rank starts can be found and ended with it.
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    log = os.open(plan.path("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(plan.environ)
    stacks = plan.path("stacks").open("w")
    faulthandler.enable(file=stacks)
    threading.Thread(target=_end_with, args=(plan.caller,), name="caller", daemon=True).start()
    # A watchdog in C: it ends the rank at the deadline whatever holds the interpreter.
    left = max(plan.deadline - time.monotonic(), 0.001)
    faulthandler.dump_traceback_later(left, exit=True, file=stacks)
    try:
        _report(plan, True, pickle.dumps(_run(plan)), "")
    except BaseException as error:
        text = traceback.format_exc()
        print(text, file=sys.stderr)
        try:
            payload = pickle.dumps(error)
        except Exception:
            payload = b""
        _report(plan, False, payload, text)
        sys.stdout.flush()
        sys.stderr.flush()
        # No tidy end after an error: it could wait for ranks that are not coming.
        os._exit(1)


def _end_with(caller: int) -> None:
    """Ends this rank, and what it started, when the caller is gone: killed, or crashed."""
    with contextlib.suppress(ProcessLookupError):
        select.select([os.pidfd_open(caller)], [], [])
    os.killpg(0, signal.SIGKILL)


def _run(plan: Plan) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    function = _find(*plan.target)
    args = pickle.loads(plan.args)
    if plan.backend is None:
        return function(plan.rank, *args)
    dist.init_process_group(plan.backend, timeout=timedelta(seconds=plan.timeout))
    value = function(plan.rank, *args)
    if dist.is_initialized():
        dist.destroy_process_group()
    return value


def _find(module_name: str, file: str | None, name: str) -> Callable[..., Any]:
    if file is None:
        return getattr(importlib.import_module(module_name), name)
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    parents = module_name.split(".")[:-1]
    for depth in range(len(parents)):
        parent = ".".join(parents[: depth + 1])
        sys.modules.setdefault(parent, types.ModuleType(parent)).__dict__.setdefault("__path__", [])
    # Under the name it has in the caller, so that its classes travel both ways.
    sys.modules[module_name] = module
    if module_name == "__mp_main__":
        sys.modules["__main__"] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def _report(plan: Plan, ok: bool, payload: bytes, text: str) -> None:
    partial = plan.path("partial")
    partial.write_bytes(pickle.dumps((ok, payload, text, time.monotonic())))
    partial.rename(plan.path("result"))
