"""The trainer's side: makes versions of a module's weights and serves them."""

from __future__ import annotations

import functools
import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from typing import Any, Self

import torch
from torch import nn

from planaria import telemetry
from planaria.checkpoint.capture import gate as step_gate
from planaria.core.collective import Ranks
from planaria.core.deadline import Deadline
from planaria.core.token import load_token
from planaria.errors import ConfigError, PlanariaError, StateError, SyncError
from planaria.rl_sync.bits import chosen_formats
from planaria.rl_sync.diff.device import DeviceScan
from planaria.rl_sync.diff.digest import Digest
from planaria.rl_sync.layout.rollout import BLOCK_ELEMENTS, RolloutLayout, plan_sync
from planaria.rl_sync.layout.source import TrainerTensors
from planaria.rl_sync.links import RankHub, RankLink
from planaria.rl_sync.reports import PublishReport, main_codec
from planaria.rl_sync.transports.urls import Outlet, open_outlet
from planaria.rl_sync.versions.choice import Learnt
from planaria.rl_sync.versions.encoding import Encoded
from planaria.rl_sync.versions.log import KEEP, VersionLog
from planaria.rl_sync.versions.manifest import Entry, content_hash, version_number
from planaria.rl_sync.versions.owner import LocalOwner, Prepared

_log = logging.getLogger("planaria.rl_sync")

Part = tuple[list[tuple[int, str]], list[Entry]]


class Publisher:
    """Publishes versions of a module: plain, DDP, FSDP2, or FSDP2 with tensor parallelism.

    On several ranks every rank makes one and calls `publish` alike. Each finds and encodes the
    changes of the boxes that it holds; only those travel to rank 0, which signs and serves them.
    """

    def __init__(
        self,
        model: nn.Module,
        url: str | Sequence[str],
        token: bytes | None = None,
        *,
        dtype: torch.dtype | Callable[[str], torch.dtype] | None = None,
        layout: RolloutLayout | None = None,
        only: Callable[[str], bool] | None = None,
        codec: str = "auto",
        block_elements: int = BLOCK_ELEMENTS,
        rate: float | None = None,
        fan_out: int | None = None,
        history_bytes: int = 1 << 30,
        threads: int | None = None,
        timeout: float = 600.0,
        process_group: Any = None,
        rank_host: str = "127.0.0.1",
        device_baseline: bool | None = None,
    ) -> None:
        """Plans what is sent, and starts to serve; nothing is published yet.

        Args:
            model: The trainer's module.
            url: Where rollouts get the versions, one or several: ``tcp://host:port`` (port 0 for a
                free one, see `url`), a folder or fsspec URL, ``shm://name``.
            token: The job's token; by default what ``PLANARIA_TOKEN`` says.
            dtype: Format to send in: one for all floating-point tensors, or a function of the
                rollout's name; by default that of each tensor.
            layout: How the rollout names and cuts the weights; by default as the trainer's module.
            only: Which tensors to send, by the trainer's names.
            codec: ``auto``, or one codec for everything.
            block_elements: Elements of a block, about.
            rate: Bytes a second to send, over all receivers; None for no limit.
            fan_out: Receivers that are served directly; others are sent to relays among them.
            history_bytes: What each rank keeps of older versions, at most.
            threads: Threads of each rank that look for changes and encode; as many as torch's, up
                to 4, by default.
            timeout: Seconds that `publish` waits for other ranks.
            process_group: Ranks that take part; the default group if None.
            rank_host: Address of rank 0 for the other ranks; anything but loopback needs a token.
            device_baseline: Whether weights are compared where they are, with a baseline there (2
                bytes an element in bf16), so that only changes cross to the host. By default on
                GPUs with room for twice as much. True does it on CPUs, too (slower).

        Raises:
            ConfigError: The URL or layout cannot be used, or a token is missing.
        """
        self._started = time.monotonic()
        self._timeout, self._history_bytes = timeout, history_bytes
        self._token = token if token is not None else load_token()
        self._ranks = Ranks(process_group, timeout_s=timeout)
        self.rank = self._ranks.rank
        self._tensors = TrainerTensors(model, only)
        announcements = self._ranks.all_gather(self._tensors.announcement())
        self.plan = plan_sync(
            announcements, layout or RolloutLayout(), chosen_formats(dtype), block_elements
        )
        self.table = self.plan.table
        self._device = DeviceScan(self._live, device_baseline)
        used = threads or min(torch.get_num_threads(), 4)
        self._owner = LocalOwner(
            self.plan, self.rank, self._device, codec, threads=used, parts=self._ranks.size
        )
        self._owner.learn(Learnt(rate or 0.0))
        self._lineage = str(self._ranks.broadcast(secrets.token_hex(4)))
        self._hub: RankHub | None = None
        self._link: RankLink | None = None
        self.log: VersionLog | None = None
        self._outlets: list[Outlet] = []
        self._lock = threading.Lock()
        self._scanned: threading.Event | None = None
        self._worker: Future[PublishReport] | None = None
        self._version: int | None = None
        self._digest: tuple[str, ...] = ()
        self._closed = False
        try:
            self._connect(rank_host)
            if self.rank == 0:
                self._serve([url] if isinstance(url, str) else list(url), rate, fan_out)
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """Where rollouts connect to: the first URL with the port that is in use; rank 0 only."""
        if not self._outlets:
            raise ConfigError("only rank 0 serves versions")
        return self._outlets[0].url

    @property
    def version(self) -> int | None:
        """The newest version; None before the first."""
        return self._version

    @property
    def sent_bytes(self) -> int:
        """Payload bytes that this rank has sent to receivers."""
        return sum(outlet.sent_bytes for outlet in self._outlets)

    def publish(
        self, version: int, *, wait_for: int = 0, timeout: float | None = None
    ) -> PublishReport:
        """Makes the weights as they are now the newest version.

        The first version is a full one; each later one is what changed since the one before. If
        this fails, nothing was published and the next call includes the changes. Call it between
        two optimizer steps, on all ranks.

        Args:
            version: Its number, 0 or more and larger than the last; the trainer's step, usually.
            wait_for: Wait until so many receivers serve it; after the timeout it goes on.
            timeout: Seconds, instead of the publisher's own.

        Returns:
            What was published.

        Raises:
            SyncError: The version is not newer, or another rank failed.
            DeadlineError: Another rank did not prepare it in time.
            StateError: The module holds other tensors than before.
            ConfigError: The version is no such number.
        """
        version = version_number(version)
        self.before_update()
        self._device.streams.mark(self._tensors.devices())
        deadline = Deadline(self._timeout if timeout is None else timeout)
        with self._lock, telemetry.span("rl.publish", version=version) as span:
            report = self._published(version, deadline)
            if wait_for and self.log is not None:
                self.log.wait_acknowledged(version, wait_for, deadline)
                report = replace(report, acknowledged=self.log.acknowledged(version))
            span.set(bytes=report.bytes, changed=report.changed, codec=report.codec)
        telemetry.count("rl.publish.bytes", report.bytes, version=version)
        return report

    def publish_async(self, version: int) -> Future[PublishReport]:
        """Like `publish`, in the background, beside the next forward and backward.

        The next optimizer step, of any optimizer of this process, waits by itself until the
        weights were looked at; encoding and sending go on beside it.
        """
        version = version_number(version)
        self.before_update()
        self._device.streams.mark(self._tensors.devices())
        scanned = self._scanned = threading.Event()
        result: Future[PublishReport] = Future()
        step_gate.close_gate_for(self)

        def work() -> None:
            try:
                with self._lock:
                    result.set_result(self._published(version, Deadline(self._timeout), scanned))
            except BaseException as error:
                result.set_exception(error)
            finally:
                scanned.set()

        threading.Thread(target=work, name="planaria-rl-publish", daemon=True).start()
        self._worker = result
        return result

    def before_update(self) -> None:
        """Returns once nothing reads the weights any more; an optimizer step calls it by itself."""
        scanned = self._scanned
        if scanned is not None:
            Deadline(self._timeout).wait(scanned, "changed weights to be found")

    def resume(self, version: int, digest: Sequence[str] | None = None) -> bool:
        """Takes the weights as they are for a version that was published in an earlier life.

        Receivers at that version go on with deltas; the trainer's layout may be another one.
        On all ranks.

        Args:
            version: The version that these weights are.
            digest: What it was published with; nothing is resumed if these weights have another.

        Returns:
            Whether they are the weights of that version.
        """
        version = version_number(version)
        with self._lock:
            self._tensors.refresh()
            self._device.streams.mark(self._tensors.devices())
            own = self._owner.begin(version)
            found = tuple(map(str, self._sum(self._ranks.all_gather([str(d) for d in own]))))
            if digest is not None and tuple(digest) != found:
                self._owner.history.version = None
                self._version = None
                return False
            self._version, self._digest = version, found
            if self.log is not None:
                self.log.add(version, found)
                for outlet in self._outlets:
                    outlet.resumed(version, found)
            return True

    def state_dict(self) -> dict[str, Any]:
        """Version and digest, to go into a checkpoint of the weights just published."""
        return {"version": self._version, "digest": list(self._digest)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes the chain from a checkpoint whose weights were restored already.

        Where the weights are not the version's (a checkpoint of a step that was not published),
        the next version is a full one; that is logged.
        """
        if state["version"] is not None and not self.resume(state["version"], state["digest"]):
            _log.warning(
                "the restored weights are not those of version %s; the next one is sent in full",
                state["version"],
            )

    def attach(self, outlet: Outlet) -> None:
        """Adds a way out, such as a `GroupOutlet`; on rank 0, before the first `publish`."""
        self._outlets.append(outlet)

    def workers(self) -> list[dict[str, Any]]:
        """Version, lag, link, bytes and codec of each receiver; rank 0 only."""
        return [] if self.log is None else self.log.status()["workers"]

    def close(self) -> None:
        """Stops serving."""
        self._closed = True
        step_gate.forget(self)
        worker = self._worker
        if worker is not None and not worker.done():
            worker.exception(timeout=self._timeout)
        for outlet in self._outlets:
            outlet.close()
        for each in (self._hub, self._link):
            if each is not None:
                each.close()
        self._ranks.close()
        self._device.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _live(self, number: int) -> list[torch.Tensor]:
        return self._tensors.live(self.table.blocks[number], self.plan.origins[number])

    def _connect(self, rank_host: str) -> None:
        world = self._ranks.size
        if world == 1:
            return
        address = None
        if self.rank == 0:
            self._hub = RankHub(world, rank_host, self._token, self._timeout)
            address = self._hub.address
        host, port = self._ranks.broadcast(address)
        if self.rank:
            self._link = RankLink(self.rank, (host, port), self._token, Deadline(self._timeout))
            self._link.serve(self._owner)

    def _serve(self, urls: list[str], rate: float | None, fan_out: int | None) -> None:
        owners = [self._owner, *(self._hub.owners.values() if self._hub else ())]
        self.log = VersionLog(self.table, owners, self._token, self._lineage)
        for url in urls:
            self._outlets.append(
                open_outlet(url, self.log, self.table, self._token, rate=rate, fan_out=fan_out)
            )

    def _published(
        self, version: int, deadline: Deadline, scanned: threading.Event | None = None
    ) -> PublishReport:
        started = time.perf_counter()
        try:
            return self._finish(self._prepared(version, deadline, scanned), started, deadline)
        finally:
            if self.log is not None:
                self.log.drafts.end()

    def _prepared(
        self, version: int, deadline: Deadline, scanned: threading.Event | None
    ) -> Prepared:
        """This rank's part; a failure is told to the other ranks."""
        try:
            if self._closed:
                raise SyncError("this publisher was closed")
            if self._version is not None and version <= self._version:
                raise SyncError(
                    f"version {version} is not newer than {self._version}, the last one published"
                )
            self._tensors.refresh()
            if self._owner.history.version is None:
                prepared = Prepared(version, None)
                prepared.moves = self._owner.begin(version)
                if scanned is not None:
                    scanned.set()
                return prepared
            given = self._on_their_way(version, deadline)
            return self._owner.prepare(version, given, None if scanned is None else scanned.set)
        except PlanariaError as error:
            self._tell_failure(version, str(error))
            raise
        except Exception as error:
            self._tell_failure(version, repr(error))
            raise

    def _on_their_way(self, version: int, deadline: Deadline) -> Callable[[Encoded], None]:
        """What takes this rank's parts to receivers that wait for the version."""
        what = f"version {version}"
        if self._link is None:
            assert self.log is not None
            drafts = self.log.drafts
            drafts.begin(int(self._version or 0), self._digest)
            if self._hub is not None:
                self._hub.follow(what, drafts.add)
            return drafts.add
        link, numbers = self._link, itertools.count()

        def given(part: Encoded) -> None:
            link.part(what, next(numbers), part, deadline)

        return given

    def _tell_failure(self, version: int, why: str) -> None:
        what = f"version {version}"
        try:
            if self._link is not None:
                self._link.say(what, {"failed": why}, Deadline(min(self._timeout, 30.0)))
            elif self._hub is not None:
                self._hub.decide(what, {"refused": f"rank 0: {why}"})
        except PlanariaError:
            pass  # the failure itself is about to be raised

    def _finish(self, prepared: Prepared, started: float, deadline: Deadline) -> PublishReport:
        try:
            if self._link is not None:
                answer = self._say(prepared, deadline)
                report = PublishReport(**answer["report"])
                needed, learnt = [int(v) for v in answer["needed"]], Learnt(*answer["learnt"])
                if prepared.base is not None:
                    self._owner.commit(prepared)
            else:
                report, needed, learnt = self._decide(prepared, started, deadline)
        except BaseException:
            if prepared.base is None:
                self._owner.history.version = None  # what was taken for the first one is not
            raise
        self._version, self._digest = report.version, tuple(report.digest)
        self._owner.learn(learnt)
        left = self._owner.forget(needed, KEEP, self._history_bytes)
        if self.log is not None:
            self.log.forget_all_but(left)
            self._hand_out(report.version, deadline)
        return replace(report, digest=tuple(report.digest))

    def _hand_out(self, version: int, deadline: Deadline) -> None:
        """Has the version written where it is not fetched; that is made up for if it fails."""
        for outlet in self._outlets:
            try:
                outlet.published(version, deadline)
            except (OSError, PlanariaError) as error:
                raise SyncError(
                    f"version {version} was published, but could not be put to {outlet.url}: "
                    f"{error}. The next publish puts it there too, with what is new then"
                ) from error

    def _say(self, prepared: Prepared, deadline: Deadline) -> dict[str, Any]:
        assert self._link is not None
        header = {
            "base": prepared.base,
            "moves": [str(d) for d in prepared.moves],
            "times": [prepared.scan_seconds, prepared.encode_seconds],
            "parts": prepared.parts,
        }
        return self._link.say(f"version {prepared.version}", header, deadline)

    def _decide(
        self, prepared: Prepared, started: float, deadline: Deadline
    ) -> tuple[PublishReport, list[int], Learnt]:
        """Rank 0: puts the parts together, publishes, and tells the other ranks."""
        assert self.log is not None
        what, base = f"version {prepared.version}", prepared.base
        encoded = prepared.encoded
        parts: list[Part] = [([(len(m), content_hash(m)) for m in encoded.models], encoded.entries)]
        codecs: dict[str, int] = {}
        moves, times = (
            [[str(d) for d in prepared.moves]],
            [(prepared.scan_seconds, prepared.encode_seconds)],
        )
        try:
            said = self._hub.collect(what, deadline) if self._hub is not None else {}
            for rank, (header, part) in sorted(said.items()):
                if header["base"] != base:
                    raise StateError(
                        f"rank {rank} is at version {header['base']}, rank 0 at {base}"
                    )
                parts.append(([(len(m), content_hash(m)) for m in part.models], part.entries))
                moves.append(header["moves"])
                times.append(tuple(header["times"]))
                if base is not None and self._hub is not None:
                    payloads = [*part.models, *part.payloads]
                    self._hub.owners[rank].keep(base, prepared.version, payloads)
            totals = self._sum(moves)
            if base is not None:
                before = [Digest(int(d, 16)) for d in self._digest]
                totals = [a + b for a, b in zip(before, totals, strict=True)]
            digest = tuple(map(str, totals))
            made = None
            if base is None:
                self.log.add(prepared.version, digest)
            else:
                made = self.log.compose(base, prepared.version, digest, parts)
                for e in made[0].entries:
                    codecs[e.codec] = codecs.get(e.codec, 0) + e.nbytes
                add = functools.partial(self.log.add, prepared.version, digest, made)
                self._owner.commit(prepared, add)
        except BaseException as error:
            if self._hub is not None:
                self._hub.decide(what, {"refused": f"rank 0: {error}"})
            raise
        dense = self.table.dense_bytes()
        report = PublishReport(
            version=prepared.version,
            base_version=base,
            bytes=dense if made is None else made[0].nbytes + len(made[1]),
            dense_bytes=dense,
            changed=0 if made is None else made[0].changed,
            codec="dense" if made is None else main_codec(codecs),
            seconds=time.perf_counter() - started,
            scan_seconds=max(t[0] for t in times),
            encode_seconds=max(t[1] for t in times),
            codecs=codecs,
            acknowledged=self.log.acknowledged(prepared.version),
            digest=digest,
        )
        needed, learnt = self.log.needed(), self.log.learnt()
        if self._hub is not None:
            answer = {"report": asdict(report), "needed": needed, "learnt": list(learnt)}
            self._hub.decide(what, answer)
        return report, needed, learnt

    def _sum(self, moves: Sequence[Sequence[str]]) -> list[Digest]:
        totals = [Digest() for _ in range(self.table.shards)]
        for each in moves:
            totals = [t + Digest(int(d, 16)) for t, d in zip(totals, each, strict=True)]
        return totals
