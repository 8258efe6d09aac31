"""NCCL groups outside torch's registry, ended by an abort from any thread, and sums over them.

Written against torch's interface and tested with a double of it; not run on several GPUs yet.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from planaria.checkpoint.memory.communicating import communicating
from planaria.core.deadline import Deadline
from planaria.elastic.reduction.transport import Parts, Transport, Wait
from planaria.errors import CollectiveError, ConfigError, NotSupportedError

if TYPE_CHECKING:
    import torch

_LEAST_PAUSE_S, _MOST_PAUSE_S = 0.00002, 0.001


class NcclGroup:
    """An NCCL group of one device a rank.

    NCCL's operations are launched on a stream and return; an error of a peer shows nowhere, and a
    kernel that waits for it spins for ever. What ends it is an abort of the communicator, here and
    on each of the others, from a thread that is not in a call of NCCL's itself: the one that hears
    of losses. After it the device can be used again, with a new group.

    Args:
        store: A store under a prefix that no earlier group had.
        rank: This rank's number in the group.
        size: Number of ranks.
        timeout_s: Seconds for each operation.
        device: This rank's device; no other rank of the group has it.

    Attributes:
        group: The `torch.distributed.ProcessGroupNCCL`, once it is made.
    """

    def __init__(
        self, store: Any, rank: int, size: int, timeout_s: float, device: "torch.device"
    ) -> None:
        if device.type != "cuda":
            raise ConfigError(f"NCCL joins CUDA devices, not {device}")
        self.rank, self.size, self.device = rank, size, device
        self._store, self._timeout_s = store, timeout_s
        self._lock = threading.Lock()
        self._given_up = False
        self.group: Any = None

    def make(self) -> "NcclGroup":
        """Makes it, with its communicator; returns it.

        Raises:
            CollectiveError: Another rank did not come, or it was closed meanwhile.
            NotSupportedError: This torch has no NCCL.
        """
        backend = _backend()
        # Torch's watchdogs would end the process at an error or a timeout: we abort, and go on.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
        options = backend.Options()
        options._timeout = timedelta(seconds=self._timeout_s)
        with self._lock:
            if self._given_up:
                raise self._gone()
            # Known before anything waits in it, so that an abort finds it.
            self.group = group = backend(self._store, self.rank, self.size, options)
        try:
            # Now, not in the first operation: all are known to be there afterwards.
            group.eager_connect_single_device(self.device)
        except RuntimeError as error:
            self.close()
            raise CollectiveError(
                f"rank {self.rank} of {self.size}: no NCCL group within {self._timeout_s:g} s "
                f"({str(error).splitlines()[0]}): another rank did not turn up"
            ) from error
        if self._given_up:
            raise self._gone()
        return self

    def close(self) -> None:
        """Aborts what is under way here, and by that on others. It may be called again."""
        with self._lock:
            self._given_up = True
            group, self.group = self.group, None
        if group is not None:
            # Of a communicator that is broken already an abort may fail; it is of no use any more.
            with contextlib.suppress(RuntimeError):
                group.abort()

    def _gone(self) -> CollectiveError:
        return CollectiveError(f"rank {self.rank} of {self.size}: the group was given up")


class NcclTransport:
    """A transport for tensors on this rank's device, see `Transport`.

    NCCL knows no tags: all ranks have to start their exchanges in the same order.

    Args:
        group: The group.
    """

    def __init__(self, group: NcclGroup) -> None:
        self._owned = group
        self.rank, self.size = group.rank, group.size

    def exchange(self, tag: int, outgoing: Parts, incoming: Parts) -> Wait:
        """Starts an exchange, as one launch: alone each of its parts would block the others."""
        group, device = self._open, self._owned.device
        started, work = False, None
        group._start_coalescing(device)
        try:
            for step in range(1, self.size):
                giver, taker = (self.rank - step) % self.size, (self.rank + step) % self.size
                for tensor in incoming[giver]:
                    if tensor.numel():
                        group.recv([tensor], giver, tag)
                        started = True
                for tensor in outgoing[taker]:
                    if tensor.numel():
                        group.send([tensor], taker, tag)
                        started = True
        except RuntimeError as error:
            raise self._error("an exchange", error) from error
        finally:
            with contextlib.suppress(RuntimeError):
                work = group._end_coalescing(device)
        return self._wait(work, "an exchange") if started and work is not None else _nothing

    def all_reduce(self, tensor: "torch.Tensor") -> Wait:
        """Starts a plain sum."""
        try:
            work = self._open.allreduce([tensor])
        except RuntimeError as error:
            raise self._error("an all-reduce", error) from error
        return self._wait(work, "an all-reduce")

    def close(self) -> None:
        """Aborts the group: all waits here end at once, and those of others by their own."""
        self._owned.close()

    @property
    def _open(self) -> Any:
        group = self._owned.group
        if group is None:
            raise CollectiveError(f"rank {self.rank} of {self.size}: the transport was closed")
        return group

    def _wait(self, work: Any, what: str) -> Wait:
        def wait(deadline: Deadline) -> None:
            # `work.wait` would only make the stream wait: nobody would notice an abort.
            pause = _LEAST_PAUSE_S
            with communicating():  # snapshots in memory give way
                while not work.is_completed():
                    self._open  # noqa: B018
                    deadline.check(f"{what} of rank {self.rank} of {self.size}")
                    time.sleep(pause)
                    pause = min(2 * pause, _MOST_PAUSE_S)
            self._open  # noqa: B018
            try:
                work.wait()
            except RuntimeError as error:
                raise self._error(what, error) from error

        return wait

    def _error(self, what: str, error: RuntimeError) -> CollectiveError:
        return CollectiveError(
            f"rank {self.rank} of {self.size}: {what} failed ({str(error).splitlines()[0]}); "
            "another rank has probably died: see its log"
        )


class DeviceTransport:
    """Tensors on the device by NCCL, all others, such as votes, over gloo.

    Args:
        near: For tensors in the host's memory.
        far: For those on the device.
    """

    def __init__(self, near: Transport, far: Transport) -> None:
        self._near, self._far = near, far
        self.rank, self.size = near.rank, near.size

    def exchange(self, tag: int, outgoing: Parts, incoming: Parts) -> Wait:
        """Starts an exchange of tensors that are all here or all there."""
        far = any(_on_device(t) for parts in (*outgoing, *incoming) for t in parts)
        return (self._far if far else self._near).exchange(tag, outgoing, incoming)

    def all_reduce(self, tensor: "torch.Tensor") -> Wait:
        """Starts a plain sum."""
        return (self._far if _on_device(tensor) else self._near).all_reduce(tensor)

    def close(self) -> None:
        """Ends both, the one first that wakes others."""
        self._near.close()
        self._far.close()


def local_device(slot: int | None = None, count: Callable[[], int] | None = None) -> "torch.device":
    """The device of this process's place on its machine, for NCCL one a rank.

    Args:
        slot: The place, by default LOCAL_RANK of the environment.
        count: Returns the number of devices, by default torch's.

    Raises:
        ConfigError: There are fewer devices.
    """
    import torch

    slot = int(os.environ.get("LOCAL_RANK", "0")) if slot is None else slot
    there = (count or torch.cuda.device_count)()
    if slot >= there:
        raise ConfigError(f"rank in place {slot} of this machine has no device: there are {there}")
    return torch.device("cuda", slot)


def _on_device(tensor: "torch.Tensor") -> bool:
    return tensor.is_cuda


def _nothing(deadline: Deadline) -> None:
    """There was nothing to wait for."""


def _backend() -> Any:
    import torch.distributed as dist

    if not dist.is_nccl_available():
        raise NotSupportedError("this torch was built without NCCL: use CPUs, over gloo")
    return dist.ProcessGroupNCCL
