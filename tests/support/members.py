"""Members of an elastic job without an agent: this process coordinates, starts and reaps them.

::

    def body(member: int) -> int:              # in the test file, or "module:function"
        membership = connect()
        view = membership.join({}, Deadline(60))
        ...

    with LocalMembers(3, body, rules=Rules(3)) as job:      # 3 processes are on their way
        job.kill(1)                                         # SIGKILL; its death is told to the job
        job.add()                                           # one more, with a new id
        results = job.wait()                                # by member: a `ranks.RankResult`
    assert results[0].value == ...

The store is on loopback in this process, and outlives every member. What a `with` block leaves
running is killed at its end.
"""

import contextlib
import os
import pickle
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Self

import ranks
from rank_process import Plan, rank_main

from planaria.core.deadline import Deadline
from planaria.elastic.membership.connecting import AGENT_ENV, MEMBER_ENV
from planaria.elastic.membership.coordinator import Coordinator
from planaria.elastic.membership.desk import Desk, Reception
from planaria.elastic.membership.links import Message
from planaria.elastic.membership.rules import Rules
from planaria.elastic.membership.view import View

TOKEN = b"the token of the members of a test"


class LocalMembers:
    """A job whose agent is this process.

    Args:
        world: Processes to start at once.
        target: What each runs, called with its id and `args`; as for `ranks.run_ranks`.
        *args: Further arguments.
        rules: The job's rules, by default `Rules(world)`. Replacements are started as they say.
        timeout: Seconds that a process may take.
        env: Environment variables on top of the caller's, `None` removes one.
    """

    def __init__(
        self,
        world: int,
        target: str | Callable[..., Any],
        *args: Any,
        rules: Rules | None = None,
        timeout: float = 60,
        env: Mapping[str, str | None] | None = None,
    ) -> None:
        self.notes: list[tuple[str, Mapping[str, Any], float]] = []
        self._target, self._args = ranks._locate(target), pickle.dumps(args)
        self._timeout, self._env, self._world = timeout, dict(env or {}), world
        self._folder = tempfile.TemporaryDirectory(prefix="members-")
        self._context = ranks._server()
        self._store, store = _store(timeout)
        self._ahead_s = 0.0
        self.coordinator = Coordinator(
            rules or Rules(world), store, on_note=self._note,
            clock=lambda: time.monotonic() + self._ahead_s,
        )  # fmt: skip
        self.desk = Desk(
            lambda member, message: self.coordinator.take("here", member, message), beat_s=0.1
        )
        self._reception = Reception({"member": self.desk.welcome}, token=TOKEN)
        self._processes: dict[int, Any] = {}
        self._plans: dict[int, Plan] = {}
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._wake, self._woken = os.pipe()
        self._reaped: set[int] = set()
        self._closed = False
        self._first = world

    def __enter__(self) -> Self:
        self.coordinator.attach("here", self)
        self.coordinator.start()
        self._reception.start()
        self._reaper = threading.Thread(target=self._reap, name="members-reaper", daemon=True)
        self._reaper.start()
        for _ in range(self._first):
            self.add()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
        self._poke()
        self._reaper.join()
        ranks._end(list(self._processes.values()))
        self.coordinator.close()
        self._reception.close()
        self.desk.close()
        os.close(self._wake)
        os.close(self._woken)
        self._folder.cleanup()

    # For tests -----------------------------------------------------------------------------------

    def add(self) -> int:
        """Starts a process more; returns its id."""
        (member,) = self.coordinator.new_ids("here", 1)
        self.start(member, None)
        return member

    def start(self, member: int, instead_of: int | None) -> None:
        """Starts a process under an id; also what the coordinator calls for a replacement."""
        with self._lock:
            if self._closed:
                return
            host, port = self._reception.address
            environ = ranks._environ(member, self._world, 0, {
                AGENT_ENV: f"{host}:{port}",
                MEMBER_ENV: str(member),
                "PLANARIA_TOKEN": TOKEN.decode(),
                **self._env,
            })  # fmt: skip
            plan = Plan(
                rank=member, target=self._target, args=self._args, folder=self._folder.name,
                deadline=time.monotonic() + self._timeout, backend=None, timeout=self._timeout,
                environ=environ, caller=os.getpid(),
            )  # fmt: skip
            process = self._context.Process(target=rank_main, args=(plan,), name=f"m-{member}")
            with ranks._hidden_main():
                process.start()
            self._processes[member], self._plans[member] = process, plan
            self._changed.notify_all()
        self._poke()

    def pid(self, member: int) -> int:
        """The process id of a member."""
        return self._processes[member].pid

    def kill(self, member: int, number: int = signal.SIGKILL) -> None:
        """Sends a signal to a member."""
        os.kill(self.pid(member), number)

    def wait(self, timeout: float | None = None) -> dict[int, ranks.RankResult]:
        """Waits until all have ended, and tells how each has."""
        until = Deadline(self._timeout if timeout is None else timeout)
        with self._changed:
            ended = self._changed.wait_for(
                lambda: self._reaped == set(self._processes), until.timeout()
            )
        if not ended:
            raise until.error("members to end: " + self._story())
        return {member: self.result(member) for member in sorted(self._processes)}

    def result(self, member: int) -> ranks.RankResult:
        """How a member that has ended ended."""
        result = ranks._outcome(self._plans[member], self._processes[member].exitcode, False)
        if result.output:
            print(f"[member {member}]\n{result.output}", end="", flush=True)
        return result

    def await_generation(self, generation: int, timeout: float = 60) -> View:
        """Waits until a generation was decided."""
        until = Deadline(timeout)
        while True:
            view = self.coordinator.view
            if view is not None and view.generation >= generation and view.store[1]:
                return view
            until.check(f"generation {generation}")
            time.sleep(0.005)

    def await_members(self, members: tuple[int, ...], timeout: float = 60) -> None:
        """Waits until a generation of exactly these was decided, and is the newest."""
        until = Deadline(timeout)
        while (view := self.coordinator.view) is None or view.members != members:
            if until.expired:
                raise until.error(f"a generation of {members}: {self._story()}")
            time.sleep(0.005)

    def await_end(self, member: int, timeout: float = 60) -> None:
        """Waits until a process has ended."""
        until = Deadline(timeout)
        with self._changed:
            if not self._changed.wait_for(lambda: member in self._reaped, until.timeout()):
                raise until.error(f"the end of member {member}")

    def let_seem_silent(self, member: int, timeout: float = 60) -> None:
        """Waits until a process is stopped; the job then takes it for silent for too long."""
        stat, until = Path(f"/proc/{self.pid(member)}/stat"), Deadline(timeout)
        while stat.read_text().rpartition(")")[2].split()[0] != "T":
            until.check(f"member {member} to be stopped")
            time.sleep(0.005)
        decider: Any = self.coordinator._decider
        tick = decider.tick

        def silent(now: float) -> Any:
            if member in decider._table:
                decider._table[member].watched.heard = now - decider.rules.hang_s
            return tick(now)

        decider.tick = silent

    def pass_time(self, seconds: float) -> None:
        """Puts the job's clock on."""
        self._ahead_s += seconds

    def await_note(self, kind: str, timeout: float = 60) -> Mapping[str, Any]:
        """Waits until something was noted; returns the first of its kind."""
        until = Deadline(timeout)
        while True:
            for each, content, _ in list(self.notes):
                if each == kind:
                    return content
            until.check(f"a note of {kind}")
            time.sleep(0.005)

    # What the coordinator asks of an agent -------------------------------------------------------

    def deliver(self, member: int, message: Message) -> None:
        self.desk.deliver(member, message)

    def fence(self, member: int, reason: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid(member), signal.SIGKILL)

    def stop(self, reason: str) -> None:
        pass

    def propose(self, term: int, view: View) -> None:
        self.coordinator.accepted("here", term, view.generation)

    # ---------------------------------------------------------------------------------------------

    def _note(self, kind: str, content: Mapping[str, Any]) -> None:
        self.notes.append((kind, content, time.monotonic()))

    def _story(self) -> str:
        left = ", ".join(str(m) for m in self._processes if m not in self._reaped)
        ended = [f"member {m}: {self.result(m).error}" for m in sorted(self._reaped)]
        start = self.notes[0][2] if self.notes else 0.0
        notes = [f"{at - start:.3f} {kind} {dict(content)}" for kind, content, at in self.notes]
        return "\n".join([left, *ended, *notes])

    def _poke(self) -> None:
        os.write(self._woken, b".")

    def _reap(self) -> None:
        """Sees each end at once: the pipe to its parent closes when that has reaped it."""
        while not self._closed:
            with self._lock:
                running = {
                    p.sentinel: m for m, p in self._processes.items() if m not in self._reaped
                }
            for ready in wait([*running, self._wake]):
                if ready == self._wake:
                    os.read(self._wake, 4096)
                    continue
                member = running[ready]  # pyright: ignore[reportArgumentType]
                code = self._processes[member].exitcode
                self.desk.dismiss(member)
                with self._changed:
                    self._reaped.add(member)
                    self._changed.notify_all()
                self.coordinator.dead([member], f"exit code {code}")


def _store(timeout: float) -> tuple[Any, tuple[str, int]]:
    from torch.distributed import TCPStore

    listener = socket.create_server(("127.0.0.1", 0))
    host, port = listener.getsockname()[:2]
    store = TCPStore(
        host, port, is_master=True, wait_for_workers=False,
        timeout=timedelta(seconds=timeout), master_listen_fd=listener.detach(),
    )  # fmt: skip
    return store, (host, port)
