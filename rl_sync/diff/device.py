"""The scan where the weights are: only what changed crosses to the host.

A block is cast to the rollout's format on its device and compared there, as integers, with a
baseline of bits that is kept on the device, too. Positions, old and new bits of what differs are
put together there and copied to pinned memory of the host; the host's own copy (`History`) moves by
them, and the device's moves with it, in `commit`. A baseline that is not there (at first, after a
resume, where memory was short) is copied from the host's, so that the host's alone says what a
version is. Old bits come from the device and are compared with the host's: a baseline that is
another is found by them.

It is made of plain torch operations; on a CPU the same code does the same, only slower than `scan`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from planaria.errors import SyncError
from planaria.rl_sync.bits import bits_of, tensor_of
from planaria.rl_sync.diff.scan import Bits, Changes, Scanner, gather

_log = logging.getLogger("planaria.rl_sync")

Live = Callable[[int], list[torch.Tensor]]
"""The live bits of a block, by its number: flat integer tensors, where the weights are."""


class Streams:
    """Has what reads the weights on a GPU follow what `publish` was called after, beside the rest.

    Without it, a thread would read on the default stream: too early for a trainer that uses another
    one, and in line with the next forward for one that does not.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._marks: dict[torch.device, Any] = {}  # events

    @property
    def marked(self) -> bool:
        """Whether there are weights on a GPU."""
        return bool(self._marks)

    def mark(self, devices: Iterable[torch.device]) -> None:
        """What this thread has queued on these devices so far is what has to be waited for."""
        for device in devices:
            if device.type == "cuda":
                self._marks[device] = torch.cuda.current_stream(device).record_event()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """On streams of their own, one a device, after what was marked."""
        with ExitStack() as stack:
            for device, mark in self._marks.items():
                with self._lock:
                    if device not in self._streams:
                        self._streams[device] = torch.cuda.Stream(device)
                stream = self._streams[device]
                stream.wait_event(mark)
                stack.enter_context(torch.cuda.stream(stream))
            yield


class _Found(NamedTuple):
    """What differs in a block, on the device: nothing where there is much, but all of it."""

    live: torch.Tensor
    pos: torch.Tensor | None
    new: torch.Tensor


class DeviceScan:
    """Baselines on the weights' devices. Blocks may be scanned by several threads at once."""

    def __init__(self, live: Live, wanted: bool | None) -> None:
        """Holds nothing yet.

        Args:
            live: Gives live bits.
            wanted: True: wherever the weights are, and however little memory is left; None: on
                GPUs that have room for twice the baselines; False: never.
        """
        self._live, self._wanted = live, wanted
        self.streams = Streams()
        self._lock = threading.Lock()
        self._base: dict[int, torch.Tensor] = {}
        self._found: dict[int, _Found] = {}
        self._nbytes = 0
        self._refused = wanted is False
        self.copied_bytes = 0

    def begin(self, nbytes: int) -> None:
        """Forgets everything: the host's baseline is a new one, of so many bytes."""
        self.forget()
        self._nbytes, self._refused = nbytes, self._wanted is False

    def forget(self) -> None:
        """Lets go of all memory; baselines are copied from the host's again."""
        with self._lock:
            self._base, self._found = {}, {}

    def pieces(self, number: int) -> list[Bits]:
        """The live bits of a block on the host, an array a piece; its own memory on a CPU."""
        with self.streams.reading():
            return [bits_of(piece.cpu()) for piece in self._live(number)]

    def scan(self, numbers: Sequence[int], newest: Callable[[int], Bits]) -> dict[int, Changes]:
        """Finds what changed in some blocks.

        Args:
            numbers: The blocks.
            newest: The host's baseline of a block.

        Returns:
            The changes by block, as `Scanner` finds them. Blocks whose weights are not on one
            device that is meant, or for which there is no memory, are not in it.

        Raises:
            SyncError: A baseline on a device was not the host's. All are copied anew next time.
        """
        with self._lock:
            for number in numbers:
                self._found.pop(number, None)
        if self._refused or (self._wanted is None and not self.streams.marked):
            return {}
        try:
            with self.streams.reading():
                return self._scanned(numbers, newest)
        except torch.OutOfMemoryError:
            self._refuse("a scan ran out of it")
            return {}

    def commit(self, changes: Mapping[int, Changes]) -> None:
        """Moves the baselines as the host's has just moved, by the changes of a version."""
        with self._lock:
            found, self._found = self._found, {}
        try:
            with self.streams.reading():
                for number, moved in changes.items():
                    self._move(number, moved, found.get(number))
        except torch.OutOfMemoryError:
            self._refuse("moving a baseline ran out of it")

    def _move(self, number: int, moved: Changes, found: _Found | None) -> None:
        with self._lock:
            base = self._base.get(number)
            if base is None or found is None:
                self._base.pop(number, None)  # the host has found them by itself
            elif found.pos is None:
                self._base[number] = found.live
            else:
                assert found.pos.numel() == moved.size
                base[found.pos.long()] = found.new

    def _scanned(self, numbers: Sequence[int], newest: Callable[[int], Bits]) -> dict[int, Changes]:
        copies, devices = dict[int, tuple[torch.Tensor, ...]](), set[torch.device]()
        for number in numbers:
            pieces = self._live(number)
            device = pieces[0].device
            if any(p.device != device for p in pieces) or not self._meant(device):
                continue
            base = self._baseline(number, device, newest)
            live = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            pos = torch.nonzero(live != base).view(-1)
            if pos.numel() * (4 + 2 * live.element_size()) < live.numel() * live.element_size():
                found = _Found(live[:0], at := pos.int(), live[pos])
                copies[number] = tuple(map(_to_host, (at, base[pos], found.new)))
            else:  # all of it is fewer bytes than what changed
                found = _Found(live.clone() if len(pieces) == 1 else live, None, live[:0])
                copies[number] = (_to_host(found.live),)
            with self._lock:
                self._found[number] = found
            devices.add(device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        scanner = Scanner()
        return {n: self._checked(c, newest(n), scanner) for n, c in copies.items()}

    def _checked(self, copies: tuple[torch.Tensor, ...], base: Bits, scanner: Scanner) -> Changes:
        with self._lock:
            self.copied_bytes += sum(c.nbytes for c in copies)
        if len(copies) == 1:
            return scanner.scan([bits_of(copies[0])], base)
        pos, old, new = map(bits_of, copies)
        known = np.empty_like(old)
        gather(base, pos, known)
        if not same_bits(old, known):
            self.forget()
            raise SyncError(
                "the baseline on a device is not that of the newest version; nothing was "
                "published, and it is copied from the host's again: publish once more"
            )
        return Changes(pos.copy(), old.copy(), new.copy())  # pinned memory is not for keeping

    def _meant(self, device: torch.device) -> bool:
        """Whether blocks on a device are scanned there, as long as there is memory."""
        if self._wanted is None and device.type != "cuda":
            return False
        with self._lock:
            held = bool(self._base)
        if self._wanted is None and not held:
            free = room(device)
            if free < 2 * self._nbytes:
                self._refuse(f"{self._nbytes} bytes and as many again are needed, {free} are free")
        return not self._refused

    def _baseline(
        self, number: int, device: torch.device, newest: Callable[[int], Bits]
    ) -> torch.Tensor:
        with self._lock:
            base = self._base.get(number)
        if base is None or base.device != device:
            base = tensor_of(newest(number)).to(device, copy=True)
            with self._lock:
                self._base[number] = base
        return base

    def _refuse(self, why: str) -> None:
        self._refused = True
        self.forget()
        _log.warning("weights are compared on the host: no memory of the GPU for it (%s)", why)


def same_bits(old: Bits, known: Bits) -> bool:
    """Whether the device's old bits of what changed are the host's."""
    return np.array_equal(old, known)


def room(device: torch.device) -> int:
    """Bytes that can still be had on a GPU: free ones, and those that torch keeps for reuse."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory, pinned and under way where it comes from a GPU."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    there = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return there.copy_(tensor, non_blocking=True)
