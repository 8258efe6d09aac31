"""How the nodes of a job find each other: a fixed number of them, JSON only, token checked.

Torch's own dynamic rendezvous unpickles what it reads from the store and listens on every
interface. Here the first node listens on exactly the address that was given, through a socket
bound beforehand; what nodes say to each other is JSON with an HMAC made of the job's token; and
every round gets a store of its own for the ranks, so that keys of a failed attempt cannot be met
again. A single node needs no network: its control store is in memory, the ranks' on loopback.

Round r: every node posts who it is; the first node, once it has a valid post of each, publishes
the assignment (order of the nodes, address of the ranks' store, number of the attempt, the
frozen configuration). Torch's store itself is not authenticated: whoever reaches its port can
disturb a job, but not join it or give it orders.
"""

import contextlib
import errno
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, HashStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from planaria.core.deadline import Deadline
from planaria.errors import CollectiveError, ConfigError

_POLL_S = 0.05
_STORE_TIMEOUT = timedelta(seconds=30)
# How long the first node keeps the store up for the others to see that all are done.
_FAREWELL_S = 10.0

_log = logging.getLogger("planaria.launch")


@dataclass(frozen=True)
class Node:
    """One launcher that takes part."""

    id: str
    nproc: int


@dataclass(frozen=True)
class Assignment:
    """What the first node tells all of them about a round."""

    round: int
    attempt: int
    config: str
    addr: str
    port: int
    nodes: tuple[Node, ...]

    def group_rank(self, node_id: str) -> int:
        """Place of a node among the nodes."""
        return next(i for i, node in enumerate(self.nodes) if node.id == node_id)

    def first_rank(self, group_rank: int) -> int:
        """Global rank of a node's first rank."""
        return sum(node.nproc for node in self.nodes[:group_rank])

    @property
    def world_size(self) -> int:
        return sum(node.nproc for node in self.nodes)


class FixedRendezvous(RendezvousHandler):
    """Brings a fixed number of nodes together, again for each attempt.

    Args:
        nproc: Ranks on this node.
        nnodes: Nodes of the job.
        endpoint: Host and port where the first node listens; None for a single node. The node that
            can bind it becomes the first one.
        timeout_s: In which all nodes have to come together.
        facts: What has to be equal on all nodes, by name: versions, the configuration's digest.
        load_token: Returns the job's token; called when this node is about to use the network.
        begin: Called on the first node for each round; returns the number of the attempt and the
            frozen configuration.
        joined: Called on every node when the round's assignment is known.
        check: Called while waiting; raises to give up.
    """

    def __init__(
        self,
        *,
        nproc: int,
        nnodes: int = 1,
        endpoint: tuple[str, int] | None = None,
        timeout_s: float = 600.0,
        facts: Mapping[str, Any] | None = None,
        load_token: Callable[[], bytes],
        begin: Callable[[], tuple[int, str]],
        joined: Callable[[Assignment], None] = lambda assignment: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        if nnodes > 1 and endpoint is None:
            raise ConfigError(f"{nnodes} nodes need --rdzv HOST:PORT to find each other")
        self.node = Node(f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}", nproc)
        self.assignment: Assignment | None = None
        self._nnodes = nnodes
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._facts = json.loads(json.dumps(dict(facts or {})))
        self._load_token = load_token
        self._begin = begin
        self._joined = joined
        self._check = check
        self._control: Store | None = None
        self._ranks_store: TCPStore | None = None
        self._token = b""
        # Names this life of the job in every message, so that none of an earlier one is taken.
        self._session: str | None = None
        self._warned: set[str] = set()
        # Nodes that want to hear how it ends before the store goes down.
        self._listening = 1
        self._listener = None if nnodes == 1 else self._claim(*(endpoint or ("", 0)))
        self.is_first = nnodes == 1 or self._listener is not None

    @property
    def is_local(self) -> bool:
        """Whether all nodes are launchers on this machine, which meet on loopback."""
        if self._endpoint is None:
            return True
        _, (address, *_) = _resolve(*self._endpoint)
        return ipaddress.ip_address(str(address).partition("%")[0]).is_loopback

    # The interface of torch -----------------------------------------------------------------

    def get_backend(self) -> str:
        return "planaria"

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_run_id(self) -> str:
        return self._session or "planaria"

    def next_rendezvous(self) -> RendezvousInfo:
        """Joins the next round and waits until it is complete.

        Raises:
            ConfigError: This node's versions or configuration differ from the first node's, or the
                job has all its nodes already.
            DeadlineError: Not all nodes came in time.
            CollectiveError: The first node is gone.
        """
        deadline = Deadline(self._timeout_s)
        with self._contact():
            control = self._connect(deadline)
            number = self._next_round(control)
            if self._nnodes > 1:
                self._post(control, number)
            if self.is_first:
                nodes = self._gather(control, number, deadline)
                assignment = self._publish(control, number, nodes)
            else:
                assignment = self._await_assignment(control, number, deadline)
        self.assignment = assignment
        self._listening = len(assignment.nodes)
        self._joined(assignment)
        return RendezvousInfo(
            control,
            assignment.group_rank(self.node.id),
            len(assignment.nodes),
            RendezvousStoreInfo(assignment.addr, assignment.port),
        )

    def num_nodes_waiting(self) -> int:
        """Nodes that have posted for the round after this one: one of them saw a rank fail."""
        if self._nnodes == 1 or self._control is None or self.assignment is None:
            return 0
        with self._contact():
            number = self.assignment.round + 1
            count = self._control.add(f"round-{number}/count", 0)
            posts = (
                self._read(self._control, f"round-{number}/post-{i + 1}") for i in range(count)
            )
            return sum(post is not None for post in posts)

    def is_closed(self) -> bool:
        return self.closing_reason() is not None

    def closing_reason(self) -> str | None:
        """Why another node gave the job up, or None."""
        if self._nnodes == 1 or self._control is None:
            return None
        with self._contact():
            closed = self._read(self._control, "closed")
        return None if closed is None or closed["node"] == self.node.id else str(closed["reason"])

    def set_closed(self, reason: str = "closed") -> None:
        """Tells the other nodes that the job will not go on."""
        if self._nnodes > 1 and self._control is not None:
            with contextlib.suppress(CollectiveError), self._contact():
                self._write(self._control, "closed", {"node": self.node.id, "reason": reason})

    def wait_for_all(self) -> None:
        """Waits until the ranks of every node are done.

        Raises:
            CollectiveError: Another node gave up, or the first node is gone.
            DeadlineError: The others took too long.
        """
        if self._nnodes == 1 or self._control is None or self.assignment is None:
            return
        deadline = Deadline(self._timeout_s)
        key = f"round-{self.assignment.round}/done"
        with self._contact():
            self._control.add(key, 1)
            while self._control.add(key, 0) < self._nnodes:
                reason = self.closing_reason()
                if reason is not None:
                    raise CollectiveError(reason)
                self._pause(deadline, "the ranks of the other nodes to end")

    def dismiss(self, reason: str) -> None:
        """Tells nodes that come that there is nothing to join; does nothing on a single node."""
        if self._nnodes == 1 or not self.is_first:
            return
        with contextlib.suppress(CollectiveError, ConfigError), self._contact():
            self._connect(Deadline(_FAREWELL_S))
            self._listening = self._nnodes
            self.set_closed(reason)

    def shutdown(self) -> bool:
        """Takes the stores down; the first node lets the others read their last news before."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._nnodes > 1 and self._control is not None:
            with contextlib.suppress(CollectiveError), self._contact():
                self._control.add("gone", 1)
                farewell = Deadline(_FAREWELL_S)
                while self.is_first and self._control.add("gone", 0) < self._listening:
                    if farewell.expired:
                        break
                    time.sleep(_POLL_S)
        self._control = self._ranks_store = None
        return True

    # Who listens ----------------------------------------------------------------------------

    def _claim(self, host: str, port: int) -> socket.socket | None:
        """The bound socket on the node that owns the address and comes first, else None."""
        family, address = _resolve(host, port)
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            # At once: until a socket listens, Linux lets a second one bind the same address.
            listener.listen(1024)
        except OSError as error:
            listener.close()
            if error.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
                return None
            raise ConfigError(
                f"--rdzv {host}:{port}: cannot listen there ({error.strerror})"
            ) from error
        return listener

    def _connect(self, deadline: Deadline) -> Store:
        """The control store, made or reached when first needed."""
        if self._control is not None:
            return self._control
        if self.is_first:
            self._session = secrets.token_hex(8)
        if self._nnodes == 1:
            self._control = HashStore()
            return self._control
        assert self._endpoint is not None
        host, port = self._endpoint
        if self._listener is not None:
            self._token = self._load_token()
            self._control = _serve(self._listener, host)
            self._listener = None
            self._write(self._control, "session", {})
            return self._control
        control = self._reach(host, port, deadline)
        # Only now: on a shared run folder the first node has made the token before its greeting.
        while not control.check(["session"]):
            self._pause(deadline, f"a greeting from {host}:{port}")
        self._token = self._load_token()
        while (hello := self._read(control, "session")) is None:
            self._pause(deadline, f"a greeting from {host}:{port} under this node's token")
        self._session = hello["session"]
        self._control = control
        return control

    def _reach(self, host: str, port: int, deadline: Deadline) -> TCPStore:
        while True:
            if _answers(host, port):
                try:
                    return TCPStore(host, port, is_master=False, timeout=_STORE_TIMEOUT)
                except DistError as error:
                    _log.info("%s:%s listens, but does not answer yet: %s", host, port, error)
            self._pause(deadline, f"the first node to answer on {host}:{port}")

    # One round ------------------------------------------------------------------------------

    def _next_round(self, control: Store) -> int:
        if self.assignment is not None:
            return self.assignment.round + 1
        if self._nnodes == 1 or self.is_first:
            return 0
        last = self._read(control, "round")
        return 0 if last is None else int(last["round"]) + 1

    def _post(self, control: Store, number: int) -> None:
        index = control.add(f"round-{number}/count", 1)
        post = {**asdict(self.node), "round": number, "facts": self._facts}
        self._write(control, f"round-{number}/post-{index}", post)

    def _gather(self, control: Store, number: int, deadline: Deadline) -> list[Node]:
        """Every node of the round, this one first and the others in a stable order."""
        if self._nnodes == 1:
            return [self.node]
        found: dict[str, Node] = {}
        index = 1
        while len(found) < self._nnodes:
            if not control.check([f"round-{number}/post-{index}"]):
                self._pause(deadline, f"{self._nnodes} nodes to join ({len(found)} have)")
                continue
            post = self._read(control, f"round-{number}/post-{index}")
            index += 1
            if post is None or post.get("round") != number:
                continue
            differs = [k for k, v in self._facts.items() if post["facts"].get(k) != v]
            if differs:
                reason = "; ".join(
                    f"{k} is {post['facts'].get(k)!r}, on the first node {self._facts[k]!r}"
                    for k in differs
                )
                self._write(control, f"round-{number}/refused-{post['id']}", {"reason": reason})
                _log.warning("refused node %s: %s", post["id"], reason)
                continue
            found[post["id"]] = Node(post["id"], int(post["nproc"]))
        before = [n.id for n in self.assignment.nodes] if self.assignment else []
        others = sorted(
            (n for n in found.values() if n.id != self.node.id),
            key=lambda n: (before.index(n.id) if n.id in before else len(before), n.id),
        )
        return [self.node, *others]

    def _publish(self, control: Store, number: int, nodes: list[Node]) -> Assignment:
        attempt, config = self._begin()
        host = "127.0.0.1" if self._endpoint is None else self._endpoint[0]
        family, (addr, *_) = _resolve(host, 0)
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind((addr, 0))
        listener.listen(1024)
        port = listener.getsockname()[1]
        self._ranks_store = _serve(listener, addr)
        assignment = Assignment(number, attempt, config, addr, port, tuple(nodes))
        if self._nnodes > 1:
            self._write(control, f"round-{number}/assignment", asdict(assignment))
            self._write(control, "round", {"round": number})
        return assignment

    def _await_assignment(self, control: Store, number: int, deadline: Deadline) -> Assignment:
        while True:
            refused = self._read(control, f"round-{number}/refused-{self.node.id}")
            if refused is not None:
                raise ConfigError(f"the first node refuses this one: {refused['reason']}")
            reason = self.closing_reason()
            if reason is not None:
                raise CollectiveError(f"the job was given up by another node: {reason}")
            record = self._read(control, f"round-{number}/assignment")
            if record is not None:
                break
            self._pause(deadline, f"all {self._nnodes} nodes to join")
        nodes = tuple(Node(**node) for node in record.pop("nodes"))
        assignment = Assignment(**record, nodes=nodes)
        if self.node not in nodes:
            raise ConfigError(f"the job has its {self._nnodes} nodes already; this one is too many")
        return assignment

    # Talking --------------------------------------------------------------------------------

    def _write(self, control: Store, key: str, body: dict[str, Any]) -> None:
        text = json.dumps({**body, "session": self._session})
        control.set(key, f"{self._mac(key, text)}\n{text}")

    def _read(self, control: Store, key: str) -> dict[str, Any] | None:
        """A message under a key; None if there is none that the token vouches for."""
        if not control.check([key]):
            return None
        mac, _, text = control.get(key).decode(errors="replace").partition("\n")
        if not hmac.compare_digest(mac.encode(), self._mac(key, text).encode()):
            if key not in self._warned:
                self._warned.add(key)
                _log.warning("rendezvous: ignored %r, which another token than ours signed", key)
            return None
        body = json.loads(text)
        session = body.pop("session") if self._session is not None else None
        return body if session == self._session else None

    def _mac(self, key: str, text: str) -> str:
        message = f"planaria rendezvous\0{key}\0{text}".encode()
        return hmac.new(self._token, message, hashlib.sha256).hexdigest()

    def _pause(self, deadline: Deadline, what: str) -> None:
        self._check()
        if deadline.expired:
            raise deadline.error(what)
        time.sleep(_POLL_S)

    @contextlib.contextmanager
    def _contact(self) -> Iterator[None]:
        try:
            yield
        except DistError as error:
            host, port = self._endpoint or ("127.0.0.1", 0)
            raise CollectiveError(
                f"lost the rendezvous at {host}:{port} ({str(error).splitlines()[0]}); the first "
                "node's launcher has probably ended: see its output"
            ) from error


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"--rdzv {host}:{port}: {error.strerror or error}") from error
    return family, address


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _serve(listener: socket.socket, host: str) -> TCPStore:
    """A store server on a listening socket, which it takes over."""
    port = listener.getsockname()[1]
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=_STORE_TIMEOUT,
        master_listen_fd=listener.detach(),
    )
