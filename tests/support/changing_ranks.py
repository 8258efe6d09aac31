"""Ranks of a job that change while it runs: who meets whom is told by the test."""

import os
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from fault_job import CHUNK_NBYTES

import planaria.checkpoint.opening as opening_module
from planaria.core.collective import Meeting
from planaria.core.procs import Identity, identity, is_alive

WAIT_S = 60.0


class Members:
    """The processes of a test, which share a store.

    Args:
        me: This process's number, for as long as it lives.
    """

    def __init__(self, me: int) -> None:
        self.me = me
        opening_module.CHUNK_NBYTES = CHUNK_NBYTES  # also where `attach` makes the pool
        self._store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=WAIT_S),
        )
        self._store.set(f"process-{me}", ",".join(map(str, identity(os.getpid()))))

    def meeting(self, generation: int, members: Sequence[int]) -> Meeting:
        """Where these meet, of whom this is one."""
        store = dist.PrefixStore(f"generation-{generation}", self._store)
        return Meeting(store, list(members).index(self.me), len(members))

    def say(self, what: str) -> None:
        """Tells the others."""
        self._store.set(f"{what}-{self.me}", "")

    def hear(self, what: str, members: Sequence[int]) -> None:
        """Waits until all of these have said it."""
        self._store.wait([f"{what}-{m}" for m in members], timedelta(seconds=WAIT_S))

    def wait_dead(self, member: int) -> None:
        """Returns once a process is gone for certain."""
        pid, start, boot, host = self._store.get(f"process-{member}").decode().split(",")
        process = Identity(int(pid), int(start), boot, host)
        until = time.monotonic() + WAIT_S
        while is_alive(process):
            assert time.monotonic() < until, f"{member} does not die"
            time.sleep(0.005)


def own_threads(patience_s: float = WAIT_S) -> list[str]:
    """The checkpointer's threads that are alive, once those that end have had time to."""
    until = time.monotonic() + patience_s
    while left := [t.name for t in threading.enumerate() if t.name.startswith("planaria-")]:
        if time.monotonic() > until:
            break
        time.sleep(0.01)
    return left
