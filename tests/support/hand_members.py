"""Membership made by hand over a store: members are processes of this machine, told apart by pid.

It agrees on generations as a coordinator does, without an agent: who regroups says where it stands,
and once every member has spoken or is dead the lowest survivor writes the next view down.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from planaria.core.deadline import Deadline
from planaria.elastic.membership.view import Standing, View
from planaria.errors import ConfigError

MOST = 16


class HandMembership:
    """One member's place, see `planaria.elastic.membership.Membership`.

    Args:
        member: Its id.
        first: Ids of the members of generation 1.
    """

    def __init__(self, member: int, first: int) -> None:
        self.id, self._first = member, first
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60))
        self._store.set(f"pid/{member}", str(os.getpid()))
        self._view: View | None = None
        self.wanted: str | None = None

    def join(self, facts: Mapping[str, Any], deadline: Deadline) -> View:
        text = json.dumps(facts, sort_keys=True)
        if self.id < self._first:
            first = self._store.compare_set("facts", "", text).decode()
            view = View(1, tuple(range(self._first)), self.id)
        else:
            first = self._store.get("facts").decode()
            self._store.set(f"wants/{self.id}", "")
            view = None
        if text != first:
            raise ConfigError(f"the facts differ: {text} and {first}")
        generation = 1
        while view is None:
            deadline.check("a place in the run")
            key = f"view/{generation + 1}"
            if self._store.check([key]):
                generation += 1
                said = json.loads(self._store.get(key))
                if self.id in said["members"]:
                    view = self._read(generation, said)
            time.sleep(0.005)
        self._view = view
        return view

    def regroup(self, standing: Standing, deadline: Deadline) -> View:
        view = self._view
        assert view is not None
        key = f"view/{view.generation + 1}"
        if standing.leaving:
            self._store.set(f"said/{view.generation}/{self.id}", "left")
            return view
        self._store.set(f"said/{view.generation}/{self.id}", str(standing.committed))
        while not self._store.check([key]):
            deadline.check("a new generation")
            said, waiting = {}, []
            for member in view.members:
                name = f"said/{view.generation}/{member}"
                if self._store.check([name]):
                    said[member] = self._store.get(name).decode()
                elif not self._dead(member):
                    waiting.append(member)
            if waiting:
                time.sleep(0.002)
                continue
            alive = {m: int(s) for m, s in said.items() if s != "left" and not self._dead(m)}
            if min(alive) == self.id:
                new = [m for m in range(self._first, MOST)
                       if self._store.check([f"wants/{m}"]) and not self._dead(m)
                       and m not in view.members and m not in said]  # fmt: skip
                record = {"members": sorted([*alive, *new]), "joined": new,
                          "lost": sorted(set(view.members) - set(alive)),
                          "step": max(alive.values())}  # fmt: skip
                self._store.compare_set(key, "", json.dumps(record))
        said = json.loads(self._store.get(key))
        self._view = self._read(view.generation + 1, said)
        return self._view

    def store(self, view: View, name: str = "") -> dist.Store:
        return dist.PrefixStore(f"gen{view.generation}/{name}", self._store)

    def change_wanted(self) -> str | None:
        if self.wanted is not None:
            return self.wanted
        view = self._view
        assert view is not None
        for member in range(self._first, MOST):
            if (
                member not in view.members
                and self._store.check([f"wants/{member}"])
                and (not self._dead(member))
                and not self._store.check([f"left/{member}"])
            ):
                return "join"
        return None

    def gone(self) -> frozenset[int]:
        assert self._view is not None
        return frozenset(m for m in self._view.members if self._dead(m))

    def on_loss(self, call: Callable[[frozenset[int]], object]) -> None:
        pass

    def progress(self, step: int, phase: str) -> None:
        pass

    def leave(self, reason: str, deadline: Deadline) -> None:
        self._store.set(f"left/{self.id}", "")
        assert self._view is not None
        self._store.set(f"said/{self._view.generation}/{self.id}", "left")

    def finish(self, deadline: Deadline) -> None:
        self._store.set(f"left/{self.id}", "")

    def close(self) -> None:
        pass

    def await_wish(self, member: int) -> None:
        """Waits until a member has asked to join, or is gone again."""
        deadline = Deadline(30)
        while not self._store.check([f"wants/{member}"]):
            deadline.check(f"member {member} to ask")
            time.sleep(0.005)

    def _read(self, generation: int, said: Mapping[str, Any]) -> View:
        return View(generation, tuple(said["members"]), self.id, tuple(said["joined"]),
                    tuple(said["lost"]), said["step"])  # fmt: skip

    def _dead(self, member: int) -> bool:
        if not self._store.check([f"pid/{member}"]):
            return False
        try:
            stat = Path(f"/proc/{int(self._store.get(f'pid/{member}'))}/stat").read_text()
        except OSError:
            return True
        return stat.rpartition(")")[2].split()[0] in "ZX"
