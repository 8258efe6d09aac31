"""What publishing and updating report."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PublishReport:
    """One version, as published.

    Attributes:
        version: Its number.
        base_version: The version before; None for a first one, which is sent in full.
        bytes: Payload bytes that one receiver of everything needs.
        dense_bytes: Bytes of all weights in the rollout's format.
        changed: Elements that changed.
        codec: The codec of most of the bytes.
        seconds: The whole call.
        scan_seconds: Looking for changes, of the slowest rank.
        encode_seconds: Encoding, of the slowest rank.
        codecs: Bytes by codec.
        acknowledged: Receivers that served it when the call returned.
        digest: Digest by shard.
    """

    version: int
    base_version: int | None
    bytes: int
    dense_bytes: int
    changed: int
    codec: str
    seconds: float
    scan_seconds: float = 0.0
    encode_seconds: float = 0.0
    codecs: dict[str, int] = field(default_factory=dict)
    acknowledged: int = 0
    digest: tuple[str, ...] = ()


@dataclass(frozen=True)
class UpdateReport:
    """One update of a rollout's weights.

    Attributes:
        version: The version that is served now.
        base_version: The one that was served before; None for nothing.
        bytes: Payload bytes that came.
        dense_bytes: Bytes of all weights of this shard.
        changed: Elements that changed.
        codec: The codec of most of the bytes.
        seconds: The whole call, without waiting for a version to appear.
        steps: Versions that were applied one after the other.
        full: Whether a full version was among them.
        swap_seconds: Writing the new bits, when no forward may run.
        ahead_bytes: Payload bytes that came while the version was still being made.
    """

    version: int
    base_version: int | None
    bytes: int
    dense_bytes: int
    changed: int
    codec: str
    seconds: float
    steps: int = 1
    full: bool = False
    swap_seconds: float = 0.0
    ahead_bytes: int = 0


def main_codec(codecs: dict[str, int]) -> str:
    """The codec of most of the bytes."""
    return max(codecs, key=codecs.__getitem__) if codecs else "none"
