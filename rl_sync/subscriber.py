"""The rollout's side: brings a model to the trainer's newest version, wholly or not at all."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from typing import Self

import torch
from torch import nn

from planaria import telemetry
from planaria.core.deadline import Deadline
from planaria.core.token import load_token
from planaria.errors import (
    ConfigError,
    CorruptError,
    NotCommittedError,
    PlanariaError,
    StaleError,
    WireError,
)
from planaria.rl_sync.diff.digest import Digest
from planaria.rl_sync.gate import VersionGate
from planaria.rl_sync.layout.table import BlockTable
from planaria.rl_sync.layout.target import RolloutTensors
from planaria.rl_sync.reports import UpdateReport, main_codec
from planaria.rl_sync.transports.feed import Ack, Ahead, Feed, Head, Offer
from planaria.rl_sync.transports.relay import RelayFeed
from planaria.rl_sync.transports.tcp import OTHER_JOB, FeedServer, parse_address
from planaria.rl_sync.transports.urls import open_feed
from planaria.rl_sync.versions import staging
from planaria.rl_sync.versions.ahead import ReadAhead, read_ahead
from planaria.rl_sync.versions.manifest import Manifest
from planaria.rl_sync.versions.speeds import DECODING, Speeds

_log = logging.getLogger("planaria.rl_sync")
#: Below so many bytes of payload an update says nothing about the link.
_LINK_BYTES = 64 << 10


class Subscriber:
    """Keeps the weights of a model at versions of a `Publisher`."""

    def __init__(
        self,
        model: nn.Module | Mapping[str, torch.Tensor],
        url: str | Feed,
        token: bytes | None = None,
        *,
        worker: str | None = None,
        shard: int = 0,
        only: Callable[[str], bool] | None = None,
        max_staleness: int | None = None,
        audit_every: int = 0,
        relay: str | None = None,
        relay_bytes: int = 1 << 30,
        timeout: float = 600.0,
    ) -> None:
        """Sets it up; nothing is fetched yet, and the model is not touched.

        Args:
            model: The module that is served, or its tensors by name. Its weights may be anything:
                the first update brings a full version.
            url: Where the publisher's versions are, see `planaria.rl_sync.transports.urls`.
            token: The job's token; by default what ``PLANARIA_TOKEN`` says.
            worker: Name of this receiver, in the publisher's status; by default host and process.
            shard: Which shard of the rollout's layout the model is.
            only: Which of the model's tensors are synchronised; the others are left alone.
            max_staleness: How many versions what is served may be behind the newest one known.
            audit_every: Hash all weights before every n-th update; 0 for never.
            relay: ``tcp://host:port`` to serve other receivers on, port 0 for a free one.
            relay_bytes: What the relay keeps for them.
            timeout: Seconds that an update may take.

        Raises:
            ConfigError: The URL cannot be used, or the relay's needs a token.
        """
        if max_staleness is not None and max_staleness < 0:
            raise ConfigError(f"max_staleness is a number of versions >= 0, not {max_staleness}")
        self.worker = worker or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        self._model, self._shard, self._only = model, shard, only
        self._token = token if token is not None else load_token()
        self._timeout, self._max_staleness, self._audit_every = timeout, max_staleness, audit_every
        self._updates = 0
        self.gate = VersionGate()
        self._tensors: RolloutTensors | None = None
        self._version: int | None = None
        self._digest: Digest | None = None
        self._head: Head | None = None
        self._ahead: ReadAhead | None = None
        self._speeds = Speeds(DECODING)
        self._updating = threading.Lock()
        self._server: FeedServer | None = None
        self._feed = self._open(url, relay, relay_bytes)

    @property
    def version(self) -> int | None:
        """The version that the model serves; None before the first update."""
        return self._version

    @property
    def digest(self) -> str | None:
        """That version's digest, as the publisher reported it for this shard."""
        return None if self._digest is None else str(self._digest)

    @property
    def lag(self) -> int:
        """How far the served version's number is behind the newest one that is known of."""
        if self._head is None:
            return 0
        return max(self._head.version - (-1 if self._version is None else self._version), 0)

    @property
    def relay_url(self) -> str | None:
        """Where this receiver serves others; None if it does not."""
        return None if self._server is None else self._server.url

    @property
    def relayed_bytes(self) -> int:
        """Payload bytes that this receiver sent to others."""
        return 0 if self._server is None else self._server.sent_bytes

    def update(
        self, at_least: int | None = None, timeout: float | None = None
    ) -> UpdateReport | None:
        """Brings the model to the newest version.

        What is fetched is checked and decoded first; then the new bits are written, when no forward
        is running (see `serving`). If anything fails, the model is bit for bit what it was, and the
        next call tries again. Lost connections are made again within the timeout. Where something
        else has written to the weights, so that a delta does not fit them, a full version is taken.

        Args:
            at_least: Wait for this version or a newer one.
            timeout: Seconds, instead of the subscriber's own.

        Returns:
            What was done; None if there was nothing newer.

        Raises:
            StaleError: There was no version of `at_least` in time.
            CorruptError: What came is not what the publisher signed.
            MismatchError: The model does not fit the trainer's weights.
            WireError: There is no connection to the publisher, or no common token.
            DeadlineError: The time was not enough.
        """
        deadline = Deadline(self._timeout if timeout is None else timeout)
        if not self._updating.acquire(timeout=deadline.timeout()):
            raise deadline.error("another thread's update to end")
        try:
            return self._update(at_least, deadline)
        finally:
            self._updating.release()

    def _update(self, at_least: int | None, deadline: Deadline) -> UpdateReport | None:
        wanted = at_least if self._version is None or at_least is None else \
            (at_least if at_least > self._version else None)  # fmt: skip
        self._wait_for_head(wanted, deadline)
        head = self._head
        ahead = head is not None and (self._version is None or head.version > self._version)
        if head is None or not (ahead or self._differs(head)):
            return None
        with telemetry.span("rl.update", worker=self.worker) as span:
            try:
                report = self._follow(deadline)
            finally:
                self._ahead = None
            if report is None:
                return None
            span.set(version=report.version, bytes=report.bytes, codec=report.codec)
        telemetry.count("rl.update.bytes", report.bytes, version=report.version)
        if at_least is not None and report.version < at_least:
            raise StaleError(f"version {at_least} was wanted; the newest is {report.version}")
        return report

    def poll(self) -> int:
        """Asks for the newest version's number without fetching it; returns the lag."""
        self._wait_for_head(None, Deadline(self._timeout))
        return self.lag

    @contextmanager
    def serving(self, timeout: float | None = None) -> Iterator[int]:
        """Inside, the weights are those of one version: around a forward, or around a request.

        Yields:
            The version, to stamp the rollout with.

        Raises:
            StaleError: Nothing is served yet, or it is older than `max_staleness` allows.
            DeadlineError: A swap took too long.
        """
        with self.gate.serving(Deadline(self._timeout if timeout is None else timeout)):
            if self._version is None:
                raise StaleError("no version is served yet; call update() first")
            if self._max_staleness is not None and self.lag > self._max_staleness:
                raise StaleError(
                    f"version {self._version} is {self.lag} behind, and max_staleness is "
                    f"{self._max_staleness}; call update() first"
                )
            yield self._version

    def guard(self, module: nn.Module | None = None) -> Callable[[], None]:
        """Keeps swaps out of each forward of a module (this model's by default): between tokens.

        Returns:
            A function that undoes it.
        """
        target = module if module is not None else self._model
        if not isinstance(target, nn.Module):
            raise ConfigError("guard() needs a module; this subscriber has tensors only")
        return self.gate.guard(target, self._timeout)

    def audit(self) -> bool:
        """Hashes all weights; where they are not the version's, the next update is a full one.

        Returns:
            Whether they are the version's.
        """
        if self._tensors is None or self._digest is None:
            return False
        if staging.full_digest(self._tensors) == self._digest:
            return True
        self._version = self._digest = None
        return False

    def close(self) -> None:
        """Ends the connection, and the relay."""
        if self._server is not None:
            self._server.close()
        self._feed.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, url: str | Feed, relay: str | None, relay_bytes: int) -> Feed:
        if relay is None:
            return open_feed(url, self._token, worker=self.worker) if isinstance(url, str) else url
        host, port = parse_address(relay)
        late = _Late()
        cache = RelayFeed(late, relay_bytes)
        self._server = FeedServer(cache, host, port, token=self._token, fan_out=2)
        late.source = (
            open_feed(url, self._token, worker=self.worker, relay=self._server.url)
            if isinstance(url, str)
            else url
        )
        return cache

    def _differs(self, head: Head) -> bool:
        """Whether the newest version has the number of the one that is served, and other bits."""
        at_it = head.version == self._version and self._shard < len(head.digest)
        return at_it and head.digest[self._shard] != str(self._digest)

    def _wait_for_head(self, wanted: int | None, deadline: Deadline) -> None:
        if wanted is None:
            found = self._feed.head(None, deadline, 0.0)
            self._head = found or self._head
            return
        while self._head is None or self._head.version < wanted:
            if self._version is not None and self._tensors is not None:
                have = self._version, str(self._digest)
                self._ahead = read_ahead(self._feed, self._tensors, have, deadline, self._speeds)
            found = self._feed.head(wanted - 1, deadline)
            if found is None:
                raise StaleError(
                    f"version {wanted} was not published within {deadline.budget:g} s; the newest "
                    f"is {self._head.version if self._head else 'none'}"
                )
            self._head = found

    def _follow(self, deadline: Deadline) -> UpdateReport | None:
        started = time.perf_counter()
        if self._audit_every and self._version is not None:
            self._updates += 1
            if self._updates % self._audit_every == 0:
                self.audit()
        pause, repaired = 0.02, False
        while True:
            have = None if self._version is None else (self._version, str(self._digest))
            try:
                offers = self._feed.chain(have, self._shard, deadline)
                return self._take(offers, started, deadline)
            except (NotCommittedError, WireError) as error:
                # Forgotten meanwhile, not there yet on a rank, or a connection that was lost.
                hopeless = OTHER_JOB in str(error)
                if hopeless or deadline.remaining() < pause:
                    raise
                time.sleep(pause)
                pause = min(2 * pause, 1.0)
            except CorruptError:
                # Perhaps the weights here are not those of the version any more.
                if repaired or self._version is None or self.audit():
                    raise
                repaired = True
                _log.warning(
                    "the weights here are not those of version %s, which was served: something "
                    "else has written to them; a full version is fetched", have and have[0]
                )  # fmt: skip

    def _take(self, offers: list[Offer], started: float, deadline: Deadline) -> UpdateReport | None:
        if not offers:
            return None
        before = self._version
        steps = [self._step(offer, deadline) for offer in offers]
        nbytes, changed, swap = 0, 0, 0.0
        codecs: dict[str, int] = {}
        reading = _Clock()
        for key, group in groupby(steps, key=lambda s: s.manifest.table):
            part = [staging.Step(s.manifest, reading.timed(s.read)) for s in group]
            tensors = self._fitting(key, deadline)
            staging.check_chain(part, self._version, self._digest, tensors)
            staged = staging.stage(part, tensors, self._digest, None, self._ahead, self._speeds)
            deadline.check("the version to be fetched")
            swap_started = time.perf_counter()
            with self.gate.swapping(deadline):
                try:
                    staging.apply(staged, tensors)
                finally:  # whatever interrupts it: what is said to be served is what is there
                    if staged.applied:
                        self._tensors = tensors
                        self._version, self._digest = staged.version, staged.digest
                    elif staged.torn:
                        self._version = self._digest = None
            swap += time.perf_counter() - swap_started
            nbytes += staged.nbytes
            changed += staged.changed
            for codec, size in staged.codecs.items():
                codecs[codec] = codecs.get(codec, 0) + size
        assert self._version is not None
        assert self._tensors is not None
        nbytes += sum(len(offer.manifest) for offer in offers)
        early = self._ahead.nbytes if self._ahead is not None else 0
        nbytes += early
        reading.seconds += self._ahead.seconds if self._ahead is not None else 0.0
        seconds = time.perf_counter() - started
        link = nbytes / reading.seconds if nbytes >= _LINK_BYTES and reading.seconds else 0.0
        report = UpdateReport(
            self._version, before, nbytes, self._tensors.table.dense_bytes(self._shard), changed,
            main_codec(codecs), seconds, len(steps), any(s.manifest.full for s in steps), swap,
            early,
        )  # fmt: skip
        self._acknowledge(report, link, deadline)
        return report

    def _step(self, offer: Offer, deadline: Deadline) -> staging.Step:
        manifest = Manifest.verify(offer.manifest, self._token)
        return staging.Step(manifest, lambda numbers: offer.read(numbers, deadline))

    def _fitting(self, key: str, deadline: Deadline) -> RolloutTensors:
        if self._tensors is not None and self._tensors.table.key == key:
            return self._tensors
        table = BlockTable.decode(self._feed.table(key, deadline), key)
        return RolloutTensors(self._model, table, self._shard, self._only)

    def _acknowledge(self, report: UpdateReport, link: float, deadline: Deadline) -> None:
        ack = Ack(
            self.worker, self._shard, report.version, str(self._digest), report.bytes,
            report.seconds, link, report.codec, socket.gethostname(), self._speeds.known(),
        )  # fmt: skip
        # The weights are there; the publisher hears of it with the next update at the latest.
        with suppress(PlanariaError, OSError):
            self._feed.acknowledge(ack, deadline.sub(10.0))


class _Clock:
    """Adds up the time that reads take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, read: staging.Read) -> staging.Read:
        def timed(numbers: Sequence[int]) -> list[bytes]:
            started = time.perf_counter()
            try:
                return read(numbers)
            finally:
                self.seconds += time.perf_counter() - started

        return timed


class _Late:
    """A feed whose source is known a moment later: a relay's address goes to it as it connects."""

    source: Feed

    def head(self, after: int | None, deadline: Deadline, wait: float | None = None) -> Head | None:
        return self.source.head(after, deadline, wait)

    def chain(self, have: tuple[int, str] | None, shard: int, deadline: Deadline) -> list[Offer]:
        return self.source.chain(have, shard, deadline)

    def ahead(
        self, have: tuple[int, str], shard: int, seen: tuple[str, int] | None, deadline: Deadline,
        wait: float,
    ) -> Ahead:  # fmt: skip
        return self.source.ahead(have, shard, seen, deadline, wait)

    def table(self, key: str, deadline: Deadline) -> bytes:
        return self.source.table(key, deadline)

    def acknowledge(self, ack: Ack, deadline: Deadline) -> None:
        self.source.acknowledge(ack, deadline)

    def close(self) -> None:
        self.source.close()
