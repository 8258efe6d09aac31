"""A member's own end: it talks to the agent that started it, in threads beside training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from planaria.core.deadline import Deadline
from planaria.core.points import point
from planaria.core.wire import connect
from planaria.elastic.membership import points
from planaria.elastic.membership.links import LIMITS, Link
from planaria.elastic.membership.view import IDLE, WAITING, Standing, View, ids
from planaria.errors import CollectiveError, ConfigError, StoppedError, WireError

if TYPE_CHECKING:
    from torch.distributed import Store

_STORE_S = 60.0
_SMOOTHING = 0.3
_FAREWELL_S = 1.0


class AgentMembership:
    """A member whose agent is a process on the same machine; see `Membership`.

    Args:
        host: Where the agent listens.
        port: Its port.
        member: The id that the agent gave this process.
        token: The job's token.
        deadline: In which the agent has to answer.

    Raises:
        WireError: The agent does not answer, or is not of this job.
        DeadlineError: It did not in time.
    """

    def __init__(
        self, host: str, port: int, member: int, *, token: bytes | None, deadline: Deadline
    ) -> None:
        self.id = member
        self._changed = threading.Condition()
        self._view: View | None = None
        self._gone: frozenset[int] = frozenset()
        self._disturbed = False
        self._wanted: str | None = None
        self._answers: set[str] = set()
        self._failed: CollectiveError | ConfigError | None = None
        self._calls: list[Callable[[frozenset[int]], object]] = []
        self._closed = threading.Event()
        self._beat_s = 1.0
        self._pace = _Pace()
        connection = connect(host, port, token=token, deadline=deadline, limits=LIMITS)
        connection.send({"type": "hello", "kind": "member", "member": member}, deadline=deadline)
        self._link = Link(connection, self._hear, self._hung_up, name="planaria-control")
        self._link.start()
        beating = threading.Thread(target=self._beat, name="planaria-heartbeat", daemon=True)
        beating.start()
        # By their end the agent sees that of this process, early.
        self._link.send({"type": "threads", "ids": [*self._link.threads, beating.native_id]})

    def join(self, facts: Mapping[str, Any], deadline: Deadline) -> View:
        """Asks to take part; returns once admitted, see `Membership.join`."""
        point(points.JOIN)
        self._link.send({"type": "join", "facts": dict(facts)})
        point(points.ASKED)
        view = self._next_view(0, deadline, "to be admitted by the others")
        point(points.ADMITTED)
        return view

    def regroup(self, standing: Standing, deadline: Deadline) -> View:
        """Agrees on the next generation, see `Membership.regroup`."""
        point(points.REGROUP, step=standing.committed)
        self._link.send({"type": "standing", "standing": standing.to_json()})
        point(points.STOOD, step=standing.committed)
        view = self._next_view(standing.generation, deadline, "the others to regroup")
        point(points.AGREED, step=standing.committed)
        return view

    def store(self, view: View, name: str = "") -> Store:
        """A store that the generation's members share, see `Membership.store`."""
        from torch.distributed import DistError, PrefixStore, TCPStore

        host, port = view.store
        try:
            store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_STORE_S))
        except (DistError, RuntimeError) as error:
            raise CollectiveError(
                f"the store of generation {view.generation} at {host}:{port} does not answer "
                f"({str(error).splitlines()[0]})"
            ) from error
        return PrefixStore(f"gen{view.generation}/{name}", store)

    def change_wanted(self) -> str | None:
        """What is wanted at the next boundary, see `Membership.change_wanted`."""
        return self._wanted

    def gone(self) -> frozenset[int]:
        """Members of the current generation that are proven dead."""
        return self._gone

    def disturbed(self) -> bool:
        """Whether members were lost or others regroup, see `Membership.disturbed`."""
        return self._disturbed or self._failed is not None

    def on_loss(self, call: Callable[[frozenset[int]], object]) -> None:
        """Has `call(ids)` called when members are lost, see `Membership.on_loss`."""
        self._calls.append(call)

    def progress(self, step: int, phase: str) -> None:
        """Says what this member is doing, see `Membership.progress`."""
        self._pace.move(step, phase)

    def leave(self, reason: str, deadline: Deadline) -> None:
        """Goes, see `Membership.leave`."""
        view = self._view
        if view is None:
            return
        point(points.LEAVE)
        # What it has seen committed the others have, too: it goes at a boundary.
        standing = Standing(view.generation, view.step or 0, reason, leaving=True)
        self._link.send({"type": "standing", "standing": standing.to_json()})
        self._answer("left", deadline)
        point(points.LEFT)

    def finish(self, deadline: Deadline, *, complete: bool = False) -> None:
        """Says that the run is done, see `Membership.finish`."""
        point(points.FINISH)
        self._link.send({"type": "finish", "complete": complete})
        self._answer("finished", deadline)

    def close(self) -> None:
        """Hangs up. It may be called again."""
        if not self._closed.is_set():
            self._closed.set()
            self._link.send({"type": "bye"})
            self._link.drain(Deadline(_FAREWELL_S))

    # ---------------------------------------------------------------------------------------------

    def _next_view(self, after: int, deadline: Deadline, what: str) -> View:
        def there() -> bool:
            new = self._view is not None and self._view.generation > after
            return new or self._failed is not None

        with self._changed:
            if not self._changed.wait_for(there, deadline.timeout()):
                raise deadline.error(what)
            # A failure that comes after the view is the next call's.
            if self._view is not None and self._view.generation > after:
                return self._view
            assert self._failed is not None
            raise self._failed

    def _answer(self, kind: str, deadline: Deadline) -> None:
        with self._changed:
            came = self._changed.wait_for(
                lambda: kind in self._answers or self._failed is not None, deadline.timeout()
            )
            if not came:
                raise deadline.error("the agent's answer")
            if kind not in self._answers and self._failed is not None:
                raise self._failed

    def _hear(self, message: dict[str, Any]) -> None:
        kind = message.get("type")
        lost: frozenset[int] | None = None
        with self._changed:
            if kind == "welcome":
                self._beat_s = max(float(message["beat_s"]), 0.01)
                self._pace.woken.set()
            elif kind == "view":
                view = View.from_json(message["view"])
                if self._view is None or view.generation > self._view.generation:
                    self._view, self._gone, self._wanted = view, frozenset(), None
                    self._disturbed = False
            elif kind == "lost":
                if self._view is not None and message["generation"] == self._view.generation:
                    lost = frozenset(ids(message["ids"]))
                    self._disturbed = True
                    self._gone |= lost
            elif kind == "wanted":
                self._wanted = message["what"]
            elif kind == "refused":
                self._failed = ConfigError(
                    f"member {self.id} differs from the job: {message['reason']}"
                )
            elif kind == "stopped":
                self._failed = StoppedError(f"member {self.id}: {message['reason']}")
                if self._view is not None:
                    # Who waits for others in a collective waits in vain.
                    lost, self._disturbed = frozenset(), True
            elif kind in ("left", "finished"):
                self._answers.add(kind)
            else:
                raise WireError(f"a message of an unknown kind: {kind!r}")
            self._changed.notify_all()
        if lost is not None:
            self._tell_of_loss(lost)

    def _tell_of_loss(self, members: frozenset[int]) -> None:
        for call in list(self._calls):
            call(members)

    def _hung_up(self) -> None:
        with self._changed:
            unasked = not self._closed.is_set() and self._view is not None
            self._disturbed = self._disturbed or unasked
            if self._failed is None:
                self._failed = CollectiveError(
                    f"member {self.id} has lost its agent: it ended, or gave this member up"
                )
            self._changed.notify_all()
        self._closed.set()
        if unasked:
            self._tell_of_loss(frozenset())

    def _beat(self) -> None:
        while not self._closed.is_set():
            self._link.send({"type": "beat", **self._pace.beat()})
            self._pace.woken.wait(self._beat_s)
            self._pace.woken.clear()


class _Pace:
    """Where a member is in its step, and how long its own part of one takes.

    Written by one thread and read by another without a lock: a heartbeat that mixes two moments
    does no harm.
    """

    def __init__(self) -> None:
        self.step = 0
        self.phase = IDLE
        self.woken = threading.Event()
        self._moved = time.monotonic()
        self._busy = 0.0
        self._step_s: float | None = None

    def move(self, step: int, phase: str) -> None:
        now = time.monotonic()
        if self.phase not in WAITING and self.phase != IDLE:
            self._busy += now - self._moved
        if step != self.step:
            if self._busy > 0:
                old = self._step_s
                self._step_s = self._busy if old is None else old + _SMOOTHING * (self._busy - old)
            self._busy = 0.0
        self.step, self.phase, self._moved = step, phase, now

    def beat(self) -> dict[str, Any]:
        age = time.monotonic() - self._moved
        return {"step": self.step, "phase": self.phase, "age": age, "step_s": self._step_s}
