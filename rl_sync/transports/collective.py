"""Versions by torch.distributed: rank 0 of a group broadcasts, the others are receivers.

For rollouts in the trainer's own job, over gloo or NCCL. It is in step: for each `publish` of rank
0 every other rank calls `update(at_least=version)` once. A round is: rank 0 broadcasts the newest
version's number; every receiver says what it serves; for each state that occurs rank 0 broadcasts
the way from there, whole, and receivers that are elsewhere pass over it. What a receiver serves
when the next round begins is its acknowledgement, so one that failed gets what it missed.

The group's own timeout bounds every wait. Its traffic is not authenticated; manifests and payloads
are checked as on every other way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from planaria.core.deadline import Deadline
from planaria.errors import CollectiveError, NotCommittedError
from planaria.rl_sync.transports.feed import Ack, Ahead, Head, Offer
from planaria.rl_sync.versions.log import VersionLog
from planaria.rl_sync.versions.manifest import Manifest

_RECORD = 1024
_MOST = 1 << 40


class _Group:
    """Bytes over a process group."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        on_gpu = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else None

    def broadcast(self, data: bytes | None) -> bytes:
        """The bytes of rank 0, on every rank."""
        size = torch.tensor([len(data) if data is not None else 0], device=self._device)
        self._do(size)
        count = int(size)
        if not 0 <= count <= _MOST:
            raise CollectiveError(f"rank 0 wants to send {count} bytes")
        if data is None:
            buffer = torch.empty(count, dtype=torch.uint8, device=self._device)
        else:
            host = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
            buffer = host if self._device is None else host.to(self._device)
        if count:
            self._do(buffer)
        return buffer.cpu().numpy().tobytes()

    def gather(self, value: Any) -> list[Any]:
        """A small JSON value of every rank, on every rank."""
        data = json.dumps(value).encode()
        record = torch.zeros(_RECORD, dtype=torch.uint8)
        record[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        record = record if self._device is None else record.to(self._device)
        parts = [torch.empty_like(record) for _ in range(self.size)]
        try:
            dist.all_gather(parts, record, group=self._group)
        except RuntimeError as error:
            raise self._failed(error) from error
        return [json.loads(p.cpu().numpy().tobytes().rstrip(b"\0")) for p in parts]

    def _do(self, tensor: torch.Tensor) -> None:
        try:
            dist.broadcast(tensor, group=self._group, group_src=0)
        except RuntimeError as error:
            raise self._failed(error) from error

    def _failed(self, error: RuntimeError) -> CollectiveError:
        return CollectiveError(
            f"rank {self.rank} of {self.size}: weights could not be broadcast "
            f"({str(error).splitlines()[0]}); another rank has probably died: see its log"
        )


class GroupOutlet:
    """Rank 0's side; give it to `Publisher.attach`."""

    def __init__(self, log: VersionLog, group: Any = None) -> None:
        """Wraps a group.

        Args:
            log: The publisher's, see `Publisher.log`.
            group: Process group of the trainer's rank 0, first, and all receivers.
        """
        self.url, self.sent_bytes = "torch.distributed", 0
        self._log, self._group = log, _Group(group)

    def published(self, version: int, deadline: Deadline) -> None:
        """See `Outlet.published`: one round with all receivers.

        Raises:
            CollectiveError: A receiver is gone.
        """
        newest = self._log.newest
        assert newest is not None
        self._group.broadcast(json.dumps([newest.version, list(newest.digest)]).encode())
        states: dict[str, tuple[Any, int]] = {}
        for at in self._group.gather(None)[1:]:
            if at is not None:
                have, shard, worker = at
                states[json.dumps([have, shard])] = have, shard
                if have is not None:
                    ack = Ack(worker, shard, int(have[0]), str(have[1]))
                    self._log.acknowledge(ack, deadline)
        ways = [
            (key, self._log.chain(None if have is None else (have[0], have[1]), shard, deadline))
            for key, (have, shard) in states.items()
        ]
        self._group.broadcast(json.dumps([[key, len(offers)] for key, offers in ways]).encode())
        for _, offers in ways:
            for offer in offers:
                manifest = Manifest.verify(offer.manifest, self._log.token)
                self._send(offer.manifest)
                self._send(manifest_table(self._log, manifest))
                sizes = [size for size, _ in manifest.items()]
                self._send(json.dumps(sizes).encode())
                for batch in batches(sizes):
                    self._send(b"".join(offer.read(batch, deadline)))

    def resumed(self, version: int, digest: tuple[str, ...]) -> None:
        """See `Outlet.resumed`."""

    def close(self) -> None:
        """See `Outlet.close`."""

    def _send(self, data: bytes) -> None:
        self._group.broadcast(data)
        self.sent_bytes += len(data)


class GroupFeed:
    """A receiver's side: give it to `Subscriber` instead of a URL."""

    def __init__(self, group: Any = None, worker: str | None = None) -> None:
        """Wraps a group; this rank is not its first one."""
        self._group = _Group(group)
        self._worker = worker or f"rank-{self._group.rank}"
        self._tables: dict[str, bytes] = {}

    def head(self, after: int | None, deadline: Deadline, wait: float | None = None) -> Head | None:
        """See `Feed.head`: begins a round; waits for rank 0's next `publish`."""
        version, digest = json.loads(self._group.broadcast(None))
        if after is not None and version <= after:
            self._round(None)
        return Head(int(version), tuple(map(str, digest)))

    def chain(self, have: tuple[int, str] | None, shard: int, deadline: Deadline) -> list[Offer]:
        """See `Feed.chain`: ends the round that `head` began."""
        return self._round([None if have is None else list(have), shard, self._worker])

    def ahead(
        self, have: tuple[int, str], shard: int, seen: tuple[str, int] | None, deadline: Deadline,
        wait: float,
    ) -> Ahead:  # fmt: skip
        """See `Feed.ahead`: versions come whole here."""
        return Ahead(None, over=True)

    def table(self, key: str, deadline: Deadline) -> bytes:
        """See `Feed.table`: it came with the version."""
        if key not in self._tables:
            raise NotCommittedError("the block table did not come with its version")
        return self._tables[key]

    def acknowledge(self, ack: Ack, deadline: Deadline) -> None:
        """See `Feed.acknowledge`: the next round says it."""

    def close(self) -> None:
        """See `Feed.close`."""

    def _round(self, at: Any) -> list[Offer]:
        self._group.gather(at)
        ways = json.loads(self._group.broadcast(None))
        mine = None if at is None else json.dumps(at[:2])
        found: list[Offer] = []
        for key, count in ways:
            for _ in range(count):
                manifest, table = self._group.broadcast(None), self._group.broadcast(None)
                sizes = json.loads(self._group.broadcast(None))
                payloads: list[bytes] = []
                for batch in batches(sizes):
                    data, start = self._group.broadcast(None), 0
                    for n in batch if key == mine else ():
                        payloads.append(data[start : start + sizes[n]])
                        start += sizes[n]
                if key == mine:
                    self._tables[hashlib.sha256(table).hexdigest()] = table
                    found.append(_held(manifest, payloads))
        return found


def _held(manifest: bytes, payloads: list[bytes]) -> Offer:
    def read(numbers: Sequence[int], deadline: Deadline) -> list[bytes]:
        if any(not 0 <= n < len(payloads) for n in numbers):
            raise NotCommittedError("there is no such payload")
        return [payloads[n] for n in numbers]

    return Offer(manifest, read)


def manifest_table(log: VersionLog, manifest: Manifest) -> bytes:
    """The block table that goes with a manifest."""
    return log.table(manifest.table, Deadline(60.0))


def batches(sizes: Sequence[int], limit: int = 64 << 20) -> list[list[int]]:
    """Numbers of payloads that go in one broadcast."""
    found: list[list[int]] = []
    room = 0
    for number, size in enumerate(sizes):
        if not found or size > room:
            found.append([])
            room = limit
        found[-1].append(number)
        room -= size
    return found
