"""Feeds through a folder: any file system that fsspec knows, or the host's shared memory.

::

    tables/<key>.json                      a block table
    weight_v000000123/manifest.json        signed; written last, and so what makes a version count
    weight_v000000123/payload.bin          models, then blocks, one after the other
    weight_v000000120.full/...             a full version, at which late joiners begin
    acks/<worker>.json                     what a receiver serves, signed

A version folder says all that is needed to check and apply it, so it can be copied to another site.
Full versions are written now and then; deltas before the last but one full version are deleted.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import mmap
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec

from planaria.core import points
from planaria.core.deadline import Deadline
from planaria.core.pacing import TokenBucket
from planaria.errors import ConfigError, CorruptError, NotCommittedError, PlanariaError
from planaria.rl_sync.layout.table import BlockTable
from planaria.rl_sync.transports.feed import Ack, Ahead, Head, Offer
from planaria.rl_sync.versions.log import VersionLog
from planaria.rl_sync.versions.manifest import MAX_MANIFEST_BYTES, Manifest

#: Deltas between two full versions.
FULL_EVERY = 32
POLL_S = 0.05
_NAME = re.compile(r"weight_v(\d{9,})(\.full)?$")
_CHUNK = 16 << 20
WRITE = points.declare("rl.folder.write", "before each piece of a payload is written to a folder")
COMMIT = points.declare("rl.folder.commit", "before the manifest makes a folder's version count")


def _open(url: str) -> tuple[Any, str, bool]:
    """File system, path, and whether it is of this host."""
    if url.startswith("shm://"):
        name = url.removeprefix("shm://")
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise ConfigError(f"{url!r}: a name in shared memory has letters, digits, _, . and -")
        url = f"/dev/shm/planaria-{name}"
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{url!r} cannot be opened: {error}") from error
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return fs, path.rstrip("/"), "file" in protocols


class FolderOutlet:
    """Writes the versions of a log to a folder; it is one more receiver of the log."""

    def __init__(
        self,
        url: str,
        log: VersionLog,
        table: BlockTable,
        token: bytes | None,
        *,
        rate: float | None = None,
        full_every: int = FULL_EVERY,
    ) -> None:
        """Opens or makes the folder; what an earlier life left unfinished is deleted.

        Raises:
            ConfigError: The folder cannot be made.
        """
        self.url, self.sent_bytes = url, 0
        self._log, self._table, self._token, self._full_every = log, table, token, full_every
        self._bucket = TokenBucket(rate, _CHUNK) if rate else None
        self._fs, self._root, self._local = _open(url)
        self._at: Head | None = None
        self._since_full = 0
        self._tabled = False
        try:
            self._fs.makedirs(self._root, exist_ok=True)
            if self._local:
                os.chmod(self._root, 0o700)
            for path in _versions(self._fs, self._root).values():
                if not self._fs.exists(f"{path}/manifest.json"):
                    self._fs.rm(path, recursive=True)
        except OSError as error:
            raise ConfigError(f"the folder {url} cannot be used: {error}") from error

    def published(self, version: int, deadline: Deadline) -> None:
        """See `Outlet.published`.

        Raises:
            OSError: It could not be written; what is there is whole, and the next call goes on.
        """
        self._read_acks()
        at = self._at
        have = None if at is None else (at.version, at.digest[0])
        if at is None:
            self._drop_later(-1)
        for offer in self._log.chain(have, 0, deadline):
            manifest = Manifest.verify(offer.manifest, self._token)
            self._write(manifest, offer, deadline)
            self._at = Head(manifest.version, manifest.digest)
            self._since_full = 0 if manifest.full else self._since_full + 1
        if self._since_full >= self._full_every:
            (offer,) = self._log.chain(None, 0, deadline)
            self._write(Manifest.verify(offer.manifest, self._token), offer, deadline)
            self._since_full = 0
            self._prune()

    def resumed(self, version: int, digest: tuple[str, ...]) -> None:
        """See `Outlet.resumed`: later versions are of a past that did not happen."""
        feed = FolderFeed(self.url, self._token)
        known = feed.manifest(version)
        if known is not None and known.digest == digest:
            self._at = Head(version, digest)
            self._drop_later(version)

    def close(self) -> None:
        """See `Outlet.close`."""

    def _write(self, manifest: Manifest, offer: Offer, deadline: Deadline) -> None:
        path = _path(self._root, manifest.version, manifest.full)
        if self._fs.exists(f"{path}/manifest.json"):
            return
        if not self._tabled:  # what is there under its name may be damaged
            self._put(f"{self._root}/tables/{manifest.table}.json", self._table.encoded)
            self._tabled = True
        self._fs.makedirs(path, exist_ok=True)
        sizes = [size for size, _ in manifest.items()]
        try:
            with self._fs.open(f"{path}/payload.bin", "wb") as file:
                for numbers in _grouped(sizes, _CHUNK):
                    for data in offer.read(numbers, deadline):
                        points.point(WRITE, step=manifest.version)
                        if self._bucket is not None:
                            self._bucket.take(len(data), deadline)
                        file.write(data)
                        self.sent_bytes += len(data)
            points.point(COMMIT, step=manifest.version)
            self._put(f"{path}/manifest.json", offer.manifest)
        except BaseException:
            with contextlib.suppress(OSError):
                self._fs.rm(path, recursive=True)
            raise

    def _put(self, path: str, data: bytes) -> None:
        """Writes a small file whole: by rename here, in one request elsewhere."""
        if not self._local:
            self._fs.pipe_file(path, data)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        temporary.write_bytes(data)
        os.replace(temporary, target)

    def _drop_later(self, version: int) -> None:
        for (number, _), path in _versions(self._fs, self._root).items():
            if number > version:
                # The manifest first: what is half deleted does not count.
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(f"{path}/manifest.json")
                self._fs.rm(path, recursive=True)

    def _prune(self) -> None:
        found = _versions(self._fs, self._root)
        fulls = sorted(number for number, full in found if full)
        if len(fulls) >= 2:
            for (number, _), path in found.items():
                if number < fulls[-2]:
                    with contextlib.suppress(FileNotFoundError):
                        self._fs.rm_file(f"{path}/manifest.json")
                        self._fs.rm(path, recursive=True)

    def _read_acks(self) -> None:
        for ack in _acks(self._fs, self._root, self._token):
            self._log.acknowledge(ack, Deadline(1.0))


class FolderFeed:
    """Reads versions from a folder."""

    def __init__(self, url: str, token: bytes | None) -> None:
        """Opens it; it need not exist yet."""
        self._fs, self._root, self._local = _open(url)
        self._token = token
        self._lock = threading.Lock()
        self._known: dict[str, tuple[bytes, Manifest]] = {}

    def head(self, after: int | None, deadline: Deadline, wait: float | None = None) -> Head | None:
        """See `Feed.head`."""
        waiting = deadline if wait is None else deadline.sub(wait)
        while True:
            found = self._committed()
            if found and (after is None or max(found)[0] > after):
                newest = self._manifest(found[max(found)])[1]
                return Head(newest.version, newest.digest)
            if waiting.expired:
                return None
            time.sleep(min(POLL_S, waiting.remaining()))

    def chain(self, have: tuple[int, str] | None, shard: int, deadline: Deadline) -> list[Offer]:
        """See `Feed.chain`."""
        found = self._committed()
        if not found:
            return []
        newest = max(found)[0]
        if have is not None and have[0] > newest:
            return []
        if have is not None:
            known = [self.manifest(have[0])]
            same = known[0] is not None and shard < len(known[0].digest) \
                and known[0].digest[shard] == have[1]  # fmt: skip
            deltas = self._deltas(found, have[0], newest)
            if deltas is None and have[0] == newest and same:
                return []
            if deltas:
                first = self._manifest(deltas[0])[1]
                base = first.base_digest
                if base is not None and shard < len(base) and base[shard] == have[1]:
                    return [self._offer(path) for path in deltas]
            if have[0] == newest and same:
                return []
        for number in sorted({n for n, full in found if full}, reverse=True):
            deltas = self._deltas(found, number, newest)
            if deltas is not None or number == newest:
                return [self._offer(found[number, True]), *map(self._offer, deltas or [])]
        raise NotCommittedError(f"{self._root} has no full version that leads to version {newest}")

    def ahead(
        self, have: tuple[int, str], shard: int, seen: tuple[str, int] | None, deadline: Deadline,
        wait: float,
    ) -> Ahead:  # fmt: skip
        """See `Feed.ahead`: versions come whole here."""
        return Ahead(None, over=True)

    def table(self, key: str, deadline: Deadline) -> bytes:
        """See `Feed.table`."""
        if not re.fullmatch(r"[0-9a-f]{64}", key):
            raise CorruptError(f"{key!r} is no key of a block table")
        return self._fs.cat_file(f"{self._root}/tables/{key}.json")

    def acknowledge(self, ack: Ack, deadline: Deadline) -> None:
        """See `Feed.acknowledge`."""
        body = json.dumps(ack.to_json(), sort_keys=True).encode()
        data = json.dumps({"ack": ack.to_json(), "hmac": _ack_mac(self._token, body)}).encode()
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", ack.worker)
        self._fs.makedirs(f"{self._root}/acks", exist_ok=True)
        self._fs.pipe_file(f"{self._root}/acks/{name}.json", data)

    def close(self) -> None:
        """See `Feed.close`."""

    def status(self, deadline: Deadline) -> dict[str, Any]:
        """The newest version and what each receiver acknowledged, see `VersionLog.status`."""
        head = self.head(None, deadline, 0.0)
        version = None if head is None else head.version
        acks = sorted(_acks(self._fs, self._root, self._token), key=lambda a: a.worker)
        rows = [a.to_json() | {"lag": (version or 0) - a.version} for a in acks]
        return {"version": version, "workers": rows}

    def manifest(self, version: int) -> Manifest | None:
        """The manifest of a version, of its delta where there is one; None if it is not there."""
        for full in (False, True):
            with contextlib.suppress(NotCommittedError):
                return self._manifest(_path(self._root, version, full))[1]
        return None

    def _committed(self) -> dict[tuple[int, bool], str]:
        return {
            key: path for key, path in _versions(self._fs, self._root).items()
            if path in self._known or self._fs.exists(f"{path}/manifest.json")
        }  # fmt: skip

    def _deltas(
        self, found: dict[tuple[int, bool], str], base: int, newest: int
    ) -> list[str] | None:
        """The deltas that lead from one version to the newest one; None if they do not."""
        way: list[str] = []
        at = newest
        while at > base:
            path = found.get((at, False))
            if path is None:
                return None
            way.append(path)
            manifest = self._manifest(path)[1]
            if manifest.base_version is None:
                return None
            at = manifest.base_version
        return way[::-1] if at == base and way else None

    def _manifest(self, path: str) -> tuple[bytes, Manifest]:
        with self._lock:
            known = self._known.get(path)
        if known is None:
            try:
                data = self._fs.cat_file(f"{path}/manifest.json", 0, MAX_MANIFEST_BYTES)
            except FileNotFoundError:
                raise NotCommittedError(f"{path} is not there any more; ask again") from None
            known = data, Manifest.verify(data, self._token)
            with self._lock:
                if len(self._known) > 256:
                    self._known.clear()
                self._known[path] = known
        return known

    def _offer(self, path: str) -> Offer:
        data, manifest = self._manifest(path)
        ends = [0]
        for size, _ in manifest.items():
            ends.append(ends[-1] + size)

        def read(numbers: Sequence[int], deadline: Deadline) -> list[bytes]:
            deadline.check(f"{path} to be read")
            file = f"{path}/payload.bin"
            if any(not 0 <= n < len(ends) - 1 for n in numbers):
                raise NotCommittedError(f"{path} has no such payload; ask for the chain again")
            spans = [(ends[n], ends[n + 1]) for n in numbers]
            try:
                if self._local:
                    return _mapped(file, spans)
                starts, stops = [a for a, _ in spans], [b for _, b in spans]
                got = self._fs.cat_ranges([file] * len(spans), starts, stops, on_error="raise")
                return [bytes(each) for each in got]
            except FileNotFoundError:
                raise NotCommittedError(f"{path} is not there any more; ask again") from None

        return Offer(data, read)


def _mapped(path: str, spans: list[tuple[int, int]]) -> list[bytes]:
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return [b"" for _ in spans]
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return [view[a:b] for a, b in spans]


def _acks(fs: Any, root: str, token: bytes | None) -> Iterator[Ack]:
    """The acknowledgements in a folder that were signed with the job's token."""
    if not fs.exists(f"{root}/acks"):
        return
    for path in fs.ls(f"{root}/acks", detail=False):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, PlanariaError):
            raw = json.loads(fs.cat_file(path))
            body = json.dumps(raw["ack"], sort_keys=True).encode()
            if hmac.compare_digest(str(raw["hmac"]), _ack_mac(token, body)):
                yield Ack.from_json(raw["ack"])


def _ack_mac(token: bytes | None, body: bytes) -> str:
    key = hmac.digest(token or b"", b"planaria-rl/1 ack", "sha256")
    return hmac.digest(key, body, "sha256").hex()


def _path(root: str, version: int, full: bool) -> str:
    return f"{root}/weight_v{version:09d}" + (".full" if full else "")


def _versions(fs: Any, root: str) -> dict[tuple[int, bool], str]:
    """Path of every version folder, committed or not, by number and whether it is a full one."""
    fs.invalidate_cache()
    try:
        paths = fs.ls(root, detail=False)
    except FileNotFoundError:
        return {}
    found = {}
    for path in paths:
        match = _NAME.search(path.rstrip("/"))
        if match:
            found[int(match[1]), match[2] is not None] = path.rstrip("/")
    return found


def _grouped(sizes: Sequence[int], limit: int) -> list[list[int]]:
    groups: list[list[int]] = []
    room = 0
    for number, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(number)
        room -= size
    return groups
