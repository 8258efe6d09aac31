"""A warm restart: the memory tier of the default job, and its snapshot processes."""

import contextlib
import dataclasses
import os
import socket
import threading
from typing import TYPE_CHECKING

from planaria.checkpoint.memory.client import NodeClient
from planaria.checkpoint.memory.runtime import job_id
from planaria.checkpoint.memory.starting import connect_or_start
from planaria.checkpoint.memory.tier import JOB_ENV, MemoryTier
from planaria.core.deadline import Deadline
from planaria.core.token import load_token
from planaria.errors import PlanariaError
from planaria.launch.run_folder import RunFolder

if TYPE_CHECKING:
    from planaria.launch.config import RunConf

_START_S = 60.0
_END_S = 30.0


def memory_tier(conf: "RunConf", local_rank: int, local_size: int) -> MemoryTier | None:
    """What a rank of the default job hands to its checkpointer.

    Args:
        conf: The run's configuration.
        local_rank: The rank's number on its machine.
        local_size: How many there are.
    """
    elastic = conf.elastic
    if elastic.mode != "warm":
        return None
    host = elastic.host
    if host is None:
        host = "127.0.0.1" if conf.launcher.nnodes == 1 else "0.0.0.0"
    label = socket.gethostname()
    if elastic.nodes > 1:
        label = f"{label}-{local_rank * elastic.nodes // local_size}"
    return MemoryTier(
        budget=elastic.budget,
        losses=elastic.losses,
        group_size=elastic.group_size,
        every=elastic.every,
        node=label,
        host=host,
    )


def environment(folder: RunFolder) -> dict[str, str]:
    """What ranks must know to find the run's snapshot processes: a fresh run has others."""
    token = load_token(folder.path)
    return {JOB_ENV: job_id("run", (token or b"").hex())}


class Nodes:
    """This machine's snapshot processes, from the start of the ranks to the end of the run.

    They are started while the ranks load their libraries. What goes wrong is left to the ranks,
    who try again and know how to go on without.

    Args:
        conf: The run's configuration.
        folder: Its folder.
    """

    def __init__(self, conf: "RunConf", folder: RunFolder) -> None:
        self._clients: list[NodeClient] = []
        size = conf.launcher.nproc
        made = [memory_tier(conf, rank, size) for rank in range(size)]
        tiers = {tier.node: tier for tier in made if tier is not None}
        # A script of the user's own has a memory tier of its own, or none.
        wanted = [] if conf.script is not None else list(tiers.values())
        self._thread = threading.Thread(
            target=self._start, args=(wanted, folder), name="planaria-nodes", daemon=True
        )
        self._thread.start()

    def _start(self, tiers: list[MemoryTier], folder: RunFolder) -> None:
        deadline = Deadline(_START_S)
        for tier in tiers:
            with contextlib.suppress(PlanariaError, OSError):
                token = load_token(folder.path)
                options = tier.options("", str(folder.ckpt), token=token)
                root = os.path.abspath(folder.ckpt)
                job = job_id(environment(folder)[JOB_ENV], root)
                options = dataclasses.replace(options, job=job, root=root)
                name = f"launcher {os.getpid()}"
                self._clients.append(connect_or_start(options, name, deadline, token=token))

    def close(self, *, over: bool) -> None:
        """Lets go of the processes.

        Args:
            over: Whether the run has ended as it should: then they end, too. After a failure they
                wait for some time, for the same command to go on from what they hold.
        """
        self._thread.join(_END_S)
        for client in self._clients:
            client.close(part=over)
