"""gloo groups outside torch's registry: made and dropped by some ranks alone, at any time."""

import json
import os
import threading
from datetime import timedelta
from typing import Any

from planaria.elastic.reduction.sockets import GroupSockets
from planaria.errors import CollectiveError

#: The end of a group takes gloo some 10 ms a connection; nobody is to wait for it.
_KEPT_S = 1.0


class GlooGroup:
    """A gloo group, and the connections below it.

    Args:
        store: A store under a prefix that no earlier group had.
        rank: This rank's number in the group.
        size: Number of ranks.
        timeout_s: Seconds to wait for all of them to turn up, and for each operation.

    Attributes:
        group: The `torch.distributed.ProcessGroupGloo`, once it is made.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout_s: float) -> None:
        self.rank, self.size = rank, size
        self._store, self._timeout_s = store, timeout_s
        self._sockets = GroupSockets()
        self._given_up = False
        self.group: Any = None

    def make(self) -> "GlooGroup":
        """Makes it; returns it.

        Raises:
            CollectiveError: Some rank did not turn up, or it was closed meanwhile.
        """
        import torch.distributed as dist

        options: Any = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
        options._timeout = timedelta(seconds=self._timeout_s)
        try:
            options._devices = _devices()
            self._sockets.note_device()
            self._store.set(f"ports/{self.rank}", json.dumps(self._sockets.ports))
            group = dist.ProcessGroupGloo(self._store, self.rank, self.size, options)
            # All have come, so all have said it.
            others = [f"ports/{rank}" for rank in range(self.size) if rank != self.rank]
            theirs = {port for said in self._store.multi_get(others) for port in json.loads(said)}
        except RuntimeError as error:
            self.close()
            raise CollectiveError(
                f"rank {self.rank} of {self.size}: no group within {self._timeout_s:g} s "
                f"({str(error).splitlines()[0]}): another rank did not turn up"
            ) from error
        self.group = group
        self._sockets.find(theirs)
        if self._given_up:
            self.close()
            raise CollectiveError(f"rank {self.rank} of {self.size}: the group was given up")
        return self

    def close(self) -> None:
        """Breaks the connections, and so ends all waits here and on others; drops the group.

        It may be called again, by any thread, also while the group is being made.
        """
        self._given_up = True
        if self.group is None:
            self._sockets.find()
        self._sockets.shut()
        group, self.group = self.group, None
        if group is not None:
            timer = threading.Timer(_KEPT_S, _drop, [group])
            timer.daemon = True
            timer.start()


def _devices() -> list[Any]:
    """What torch would make by itself."""
    from torch.distributed import ProcessGroupGloo

    names = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if names:
        return [ProcessGroupGloo.create_device(interface=name) for name in names.split(",")]
    return [ProcessGroupGloo.create_default_device()]


def _drop(group: Any) -> None:
    """Nothing: the last one to refer to it waits for its end."""
