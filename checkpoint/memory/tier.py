"""What a user says of the memory tier."""

from __future__ import annotations

import os
from dataclasses import dataclass

from planaria.checkpoint.memory.memory import Scheme
from planaria.checkpoint.memory.process import Options
from planaria.checkpoint.memory.runtime import job_id
from planaria.core.node import node_name
from planaria.core.token import TOKEN_ENV, load_token
from planaria.errors import ConfigError

#: What fails together with this node.
DOMAIN_ENV = "PLANARIA_FAILURE_DOMAIN"
#: What the job is known by, where the launcher says so.
JOB_ENV = "PLANARIA_MEMORY_JOB"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class MemoryTier:
    """Snapshots in the memory of the job's nodes, with parity against the loss of some of them.

    One snapshot process a node holds them; it is started by whichever rank comes first, outlives
    the ranks, and ends with the job or after some idle time.

    Args:
        budget: Bytes of each node's memory that snapshots may take; by default half of what is
            available when its process starts. Two of the node's images must fit, with their parity.
            A budget that is given is taken at the start, in the background; else what two images
            and their parity need, once the first is known.
        losses: So many nodes of a group may be lost at once without losing a snapshot. Fewer nodes
            than that protect as far as they can: a single one survives only its ranks.
        group_size: Nodes that protect each other, at most.
        every: Steps between two snapshots.
        node: Label of this rank's node: ranks of one node have the same, of different nodes
            different ones. By default ``PLANARIA_NODE``, else the host's name.
        failure_domain: What fails together with this node, such as its rack: parts of a stripe
            go to different ones. By default ``PLANARIA_FAILURE_DOMAIN``.
        host: Address on which nodes listen for each other. Anything but loopback needs the job's
            token (``PLANARIA_TOKEN``, or that of `planaria run`).
        idle_s: After so many seconds without ranks a snapshot process ends.
        timeout_s: Budget of each phase of a snapshot, and of its recovery, in seconds.
        bytes_per_s: Most bytes a second that a node sends for parity; None for no limit.
        nice: By how much snapshot processes give way to training where cores are short, 0 (not at
            all) to 19.

    Raises:
        ConfigError: An argument makes no sense.
    """

    budget: int | None = None
    losses: int = 1
    group_size: int = 16
    every: int = 1
    node: str | None = None
    failure_domain: str | None = None
    host: str = "127.0.0.1"
    idle_s: float = 600.0
    timeout_s: float = 60.0
    bytes_per_s: float | None = None
    nice: int = 5

    def __post_init__(self) -> None:
        if self.budget is not None and (not _is_whole(self.budget) or self.budget < 1 << 16):
            raise ConfigError(f"budget={self.budget!r}: give a number of bytes, 65536 or more")
        if not _is_whole(self.every) or self.every < 1:
            raise ConfigError(f"every={self.every!r}: give a number of steps, 1 or more")
        for name in ("idle_s", "timeout_s"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < 1e9:
                raise ConfigError(f"{name}={value!r}: give a number of seconds above 0")
        if not _is_whole(self.losses) or not _is_whole(self.group_size):
            raise ConfigError("losses and group_size are whole numbers")
        if not _is_whole(self.nice) or not 0 <= self.nice <= 19:
            raise ConfigError(f"nice={self.nice!r}: give a whole number from 0 to 19")
        _ = self.scheme

    @property
    def scheme(self) -> Scheme:
        """How snapshots are protected."""
        return Scheme(self.losses, self.group_size)

    def options(self, root_id: str, root: str, token: bytes | None = None) -> Options:
        """What this rank's snapshot process is to be like.

        Args:
            root_id: Name of the checkpoint root, the same on all ranks and in all of its lives.
            root: Its path or URL, for people.
            token: The job's token; by default that of the environment or the run's folder.

        Raises:
            ConfigError: It would listen where others can reach it, without a token.
        """
        token = token or load_token(os.environ.get("PLANARIA_RUN_DIR"))
        if token is None and self.host not in _LOOPBACK:
            raise ConfigError(
                f"MemoryTier(host={self.host!r}) without a token: set {TOKEN_ENV} to the same "
                "random text on all nodes"
            )
        # Another token is another job: it could not talk to the processes of the first.
        job = job_id(root_id, (token or b"").hex())
        if JOB_ENV in os.environ:
            job = job_id(os.environ[JOB_ENV], root)
        domain = self.failure_domain
        return Options(
            job=job,
            node=self.node or node_name(),
            budget=self.budget or _available() // 2,
            failure_domain=os.environ.get(DOMAIN_ENV, "") if domain is None else domain,
            host=self.host,
            idle_s=float(self.idle_s),
            timeout_s=float(self.timeout_s),
            rate=self.bytes_per_s,
            # Half of the machine's memory is not taken before it is known to be needed.
            prefault=self.budget or 0,
            nice=self.nice,
            root=root,
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _available() -> int:
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 1 << 30
