"""The signed description of a version.

A manifest is JSON, wrapped with its HMAC-SHA256 under a key that is derived from the job's token.
It names what it applies to (base version and digest), what comes out (version and digest), and hash
and size of everything else: whoever holds a manifest that verifies can take block table and payload
from anywhere, a relay or a bucket.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from planaria.errors import ConfigError, CorruptError, FormatError, WireError

FORMAT = 1
MAX_MANIFEST_BYTES = 256 << 20
_HASH_BYTES = 16


def content_hash(data: bytes | bytearray | memoryview) -> str:
    """BLAKE2b (RFC 7693) of a payload, 128 bits in hexadecimal."""
    return hashlib.blake2b(data, digest_size=_HASH_BYTES).hexdigest()


@dataclass(frozen=True)
class Entry:
    """One block of a version: what it is coded by, and its payload's size and hash.

    Attributes:
        block: Its number in the block table.
        codec: Name of the codec.
        model: Number of the model that it is decoded with; -1 for none.
        nbytes: Bytes of its payload.
        changed: Elements that it changes; -1 in a full version, where that is not said.
        hash: `content_hash` of its payload.
    """

    block: int
    codec: str
    model: int
    nbytes: int
    changed: int
    hash: str

    def with_model(self, model: int) -> Entry:
        """The same with another number of its model."""
        return self if model == self.model else replace(self, model=model)

    def to_json(self) -> list[Any]:
        """As JSON data."""
        return [self.block, self.codec, self.model, self.nbytes, self.changed, self.hash]

    @classmethod
    def from_json(cls, raw: Any) -> Entry:
        """From JSON data.

        Raises:
            ValueError: It is not an entry.
        """
        block, codec, model, nbytes, changed, digest = raw
        return cls(
            _count(block), str(codec), _count(model, -1), _count(nbytes), _count(changed, -1),
            _hex(digest, _HASH_BYTES),
        )  # fmt: skip


def too_large(entry: Entry, elements: int) -> bool:
    """Whether no codec makes so much of a block: of every element its position and value."""
    return entry.nbytes > 16 * elements + 4096 or entry.changed > elements


@dataclass(frozen=True)
class Manifest:
    """What a version is.

    Attributes:
        version: Its number.
        base_version: The version that it applies to; None for a full one.
        base_digest: Digest of that version by shard; None for a full one.
        digest: Digest of this version by shard.
        table: Key of the block table.
        models: (bytes, hash) of each model.
        entries: The blocks; in a delta those that changed, in a full version all of them.
        lineage: Name of the publisher's life that made it, for people.
    """

    version: int
    base_version: int | None
    base_digest: tuple[str, ...] | None
    digest: tuple[str, ...]
    table: str
    models: tuple[tuple[int, str], ...]
    entries: tuple[Entry, ...]
    lineage: str = ""

    @property
    def full(self) -> bool:
        """Whether it applies to any weights."""
        return self.base_version is None

    @property
    def nbytes(self) -> int:
        """Bytes of all payloads."""
        return sum(size for size, _ in self.models) + sum(e.nbytes for e in self.entries)

    @property
    def changed(self) -> int:
        """Elements that change; 0 in a full version."""
        return sum(max(e.changed, 0) for e in self.entries)

    def items(self) -> list[tuple[int, str]]:
        """Size and hash of each payload: the models, then the blocks."""
        return [*self.models, *((e.nbytes, e.hash) for e in self.entries)]

    def needed(self, blocks: Sequence[int]) -> list[int]:
        """Which payloads a receiver of these blocks needs, in order."""
        wanted = set(blocks)
        entries = [(i, e) for i, e in enumerate(self.entries) if e.block in wanted]
        models = sorted({e.model for _, e in entries if e.model >= 0})
        return models + [len(self.models) + i for i, _ in entries]

    def sign(self, token: bytes | None) -> bytes:
        """The manifest as JSON with its HMAC."""
        data = asdict(self)
        data["entries"] = [e.to_json() for e in self.entries]
        data["format"] = FORMAT
        body = _canonical(data)
        mac = hmac.digest(_key(token), body, "sha256").hex()
        return b'{"hmac":"' + mac.encode() + b'","manifest":' + body + b"}"

    @classmethod
    def verify(cls, data: bytes | bytearray, token: bytes | None) -> Manifest:
        """Reads a signed manifest.

        Raises:
            WireError: It was not signed by a holder of the job's token, or changed since.
            FormatError: It is of another version.
            CorruptError: What it says cannot be.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise CorruptError(f"a manifest of {len(data)} bytes is refused; it is not one of ours")
        data = bytes(data)
        head, tail = b'{"hmac":"', b'","manifest":'
        mac, rest = data[len(head) : len(head) + 64], data[len(head) + 64 :]
        body = rest[len(tail) : -1]
        wanted = hmac.digest(_key(token), body, "sha256").hex().encode()
        framed = data.startswith(head) and rest.startswith(tail) and rest.endswith(b"}")
        if not framed or not hmac.compare_digest(mac, wanted):
            raise WireError(
                "a weight version's manifest was not signed with this job's token, or was changed "
                "since; give both sides the same PLANARIA_TOKEN or token file"
            )
        try:
            return cls._read(json.loads(body))
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptError(f"a weight version's manifest is malformed ({error!r})") from error

    @classmethod
    def _read(cls, raw: dict[str, Any]) -> Manifest:
        if raw["format"] != FORMAT:
            raise FormatError(
                f"a weight version is of format {raw['format']!r}; this Planaria reads {FORMAT}: "
                "run the same version on both sides"
            )
        entries = tuple(map(Entry.from_json, raw["entries"]))
        models = tuple((_count(n), _hex(h, _HASH_BYTES)) for n, h in raw["models"])
        base = raw["base_version"]
        digest = tuple(_hex(d, 16) for d in raw["digest"])
        base_digest = None if base is None else tuple(_hex(d, 16) for d in raw["base_digest"])
        made = cls(
            _count(raw["version"]), None if base is None else _count(base), base_digest, digest,
            _hex(raw["table"], 32), models, entries, str(raw["lineage"]),
        )  # fmt: skip
        blocks = [e.block for e in entries]
        if len(set(blocks)) != len(blocks) or any(e.model >= len(models) for e in entries):
            raise ValueError("a block twice, or a model that is not there")
        if base_digest is not None and len(base_digest) != len(digest):
            raise ValueError("base and version have different numbers of shards")
        if base is not None and base >= made.version:
            raise ValueError(f"version {made.version} applies to version {base}")
        return made


def version_number(raw: Any) -> int:
    """A version's number as it can be signed.

    Raises:
        ConfigError: It is none.
    """
    try:
        return _count(operator.index(raw))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a version is a whole number from 0 to 2^62, not {raw!r}") from error


def _key(token: bytes | None) -> bytes:
    return hmac.digest(token or b"", b"planaria-rl/1 manifest", "sha256")


def _canonical(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _count(raw: Any, least: int = 0) -> int:
    if type(raw) is not int or not least <= raw < 1 << 62:
        raise ValueError(f"{raw!r} is no count")
    return raw


def _hex(raw: Any, size: int) -> str:
    if not isinstance(raw, str) or len(raw) != 2 * size or set(raw) - set("0123456789abcdef"):
        raise ValueError(f"{raw!r} is no hash")
    return raw
