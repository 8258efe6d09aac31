"""An agent of an elastic job as a program, and what tests need to run several of them.

::

    with Nodes(tmp_path) as nodes:
        first = nodes.start(3, steps=500, rules={"policy": "shrink"})
        view = first.await_generation(1)
        os.kill(first.pid_of(1), signal.SIGKILL)
        end = first.end()                     # state, reason, failures
"""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any, Self

import ranks

from planaria.core.deadline import Deadline

TOKEN = "the token of the agents of a test"
WAIT_S = 90.0


class Node:
    """A running agent."""

    def __init__(self, folder: Path, process: Any) -> None:
        self.folder, self.process = folder, process

    @property
    def pid(self) -> int:
        """The agent's own process id."""
        return self.process.pid

    @property
    def address(self) -> str:
        """Where others can join, as host:port."""
        return str(self._find("agent")["address"])

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """What the agent has told so far."""
        return _lines(self.folder / "events.jsonl", kind)

    def journal(self, member: int, kind: str | None = None) -> list[dict[str, Any]]:
        """What a member has told so far."""
        return _lines(self.folder.parent / f"journal-{member}.jsonl", kind)

    def pid_of(self, member: int) -> int:
        """The process id of a member that was started here."""
        return next(e["pid"] for e in reversed(self.events("started")) if e["member"] == member)

    def await_event(self, kind: str, count: int = 1, **content: Any) -> dict[str, Any]:
        """Waits for the n-th event of a kind with some content."""
        return self._find(kind, count, **content)

    def await_generation(self, generation: int) -> dict[str, Any]:
        """Waits for a generation, decided here."""
        return self._find("generation", generation=generation)

    def await_first_step(self, member: int, generation: int) -> dict[str, Any]:
        """Waits until a member has completed a step of a generation."""
        until = Deadline(WAIT_S)
        while True:
            for line in self.journal(member, "first"):
                if line["generation"] >= generation:
                    return line
            self._check(until, f"member {member} to step in generation {generation}")

    def let_seem_silent(self, member: int) -> None:
        """Has the agent, as the coordinator, take a member for one that says nothing any more."""
        (self.folder / f"silent-{member}").touch()

    def let_recovery_take_too_long(self) -> None:
        """Has the agent, as the coordinator, find `recovery_s` over once a member stands."""
        (self.folder / "late").touch()

    def end(self) -> dict[str, Any]:
        """Waits for the agent's end; returns what it said of it."""
        self.process.join(WAIT_S)
        ends = self.events("end")
        code = self.process.exitcode
        assert ends, f"the agent ended with {code}:\n{self.output()}\n{self.events()}"
        return ends[-1]

    def output(self) -> str:
        """What the agent has printed."""
        return (self.folder / "agent.log").read_text()

    def _find(self, kind: str, count: int = 1, **content: Any) -> dict[str, Any]:
        until = Deadline(WAIT_S)
        while True:
            found = [e for e in self.events(kind) if content.items() <= e.items()]
            if len(found) >= count:
                return found[count - 1]
            self._check(until, f"{kind} {content}")

    def _check(self, until: Deadline, what: str) -> None:
        if until.expired or self.process.exitcode is not None:
            story = "\n".join(map(str, self.events()))
            raise AssertionError(f"waited in vain for {what}:\n{story}\n{self.output()}")
        time.sleep(0.01)


class Nodes:
    """Starts agents, forked from a server that has torch loaded; ends them with its block.

    Their ranks end with them: they have asked the kernel to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._nodes: list[Node] = []

    def start(
        self,
        nproc: int,
        *,
        steps: int = 10**6,
        rules: dict[str, Any] | None = None,
        trainer: dict[str, Any] | None = None,
        join: str | None = None,
        facts: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        token: str = TOKEN,
        faults: str = "",
    ) -> Node:
        """Starts an agent with its ranks."""
        folder = self._folder / f"node-{len(self._nodes)}"
        folder.mkdir()
        spec = {
            "nproc": nproc,
            "rules": {"world": nproc, **(rules or {})},
            "join": join,
            "facts": facts or {},
            "env": env or {},
            "faults": faults,
            "command": [
                str(Path(__file__).with_name("elastic_trainer.py")),
                str(steps),
                str(self._folder),
                json.dumps(trainer or {}),
            ],
        }
        (folder / "spec.json").write_text(json.dumps(spec))
        env = {**os.environ, "PLANARIA_TOKEN": token, "GLOO_SOCKET_IFNAME": "lo"}
        process = ranks._server().Process(target=main, args=(str(folder), env))
        with ranks._hidden_main():
            process.start()
        node = Node(folder, process)
        self._nodes.append(node)
        return node

    def enough(self) -> None:
        """Has the members finish at their next step."""
        (self._folder / "enough").touch()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self._nodes:
            node.process.kill()
        for node in self._nodes:
            node.process.join(WAIT_S)


def _lines(path: Path, kind: str | None) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [line for line in found if kind is None or line["kind"] == kind]


def _keep_time(folder: Path) -> None:
    """What an agent decides goes by times that a test names, and does not wait for."""
    from planaria.elastic.membership.decision import Decider

    tick = Decider.tick

    def later(self: Decider, now: float) -> Any:
        for path in folder.glob("silent-*"):
            member = int(path.name.rpartition("-")[2])
            if member in self._expected:
                self._expected[member] = now - self.rules.start_s
            if member in self._table:
                self._table[member].watched.heard = now - self.rules.hang_s
        if (folder / "late").exists() and self._stands_since is not None:
            self._stands_since = now - self.rules.recovery_s - 1.0
        return tick(self, now)

    Decider.tick = later


def main(place: str, env: dict[str, str]) -> None:
    """Runs an agent as the spec in a folder says."""
    from planaria.core import points
    from planaria.elastic.agent import ElasticAgent, RankFailure, RankLogs, StopRequest
    from planaria.elastic.membership.rules import Rules
    from planaria.errors import PlanariaError

    folder = Path(place)
    log = os.open(folder / "agent.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(env)
    spec = json.loads((folder / "spec.json").read_text())
    points.arm(spec["faults"])  # the server had none when it loaded them
    _keep_time(folder)
    events = (folder / "events.jsonl").open("a", buffering=1)

    def event(kind: str, content: Any) -> None:
        events.write(json.dumps({"at": time.time(), **content, "kind": kind}) + "\n")

    def failed(failure: RankFailure) -> None:
        event("failure", {"member": failure.rank, "how": failure.how})

    stop = StopRequest()
    signal.signal(signal.SIGTERM, lambda *_: stop.request())
    join = spec["join"]
    agent = ElasticAgent(
        command=spec["command"],
        nproc=spec["nproc"],
        rules=Rules(**spec["rules"]),
        logs=RankLogs(lambda attempt: folder / "logs", spec["env"], lambda: 0),
        stop=stop,
        token=os.environ["PLANARIA_TOKEN"].encode(),
        join=None if join is None else (join.rpartition(":")[0], int(join.rpartition(":")[2])),
        facts=spec["facts"],
        offer={"config": "of the first"},
        adopt=lambda offer: event("adopted", {"offer": offer}),
        grace_s=20.0,
        on_failure=failed,
        on_event=event,
    )
    signal.signal(signal.SIGUSR1, lambda *_: agent.leave())
    event("agent", {"pid": os.getpid(), "address": ":".join(map(str, agent.address))})
    try:
        end = agent.run_job()
    except PlanariaError as error:
        event("end", {"state": "error", "reason": f"{type(error).__name__}: {error}"})
        return
    event("end", {"state": end.state, "reason": end.reason,
                  "failures": [f.rank for f in end.failures]})  # fmt: skip
