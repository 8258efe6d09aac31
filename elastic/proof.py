"""What a member claims to hold, and the certificate that a generation begins with."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from planaria.elastic.certificate import Certificate, Claim, certify
from planaria.elastic.membership.view import View
from planaria.elastic.replicated import Replicated, digest_tensor
from planaria.elastic.updates import BlockUpdater, ReplicaUpdater

#: Elements of a tensor that a digest of samples looks at, evenly spread; copies that differ because
#: an update was made on one alone differ in nearly all.
SAMPLE = 1024
#: Models of so many bytes have every byte looked at: that takes some hundredths of a second.
FULL_BYTES = 64 << 20
#: Of larger ones so many generations, the others samples.
FULL_EVERY = 8


@dataclass(frozen=True)
class _Members:
    generation: int
    members: tuple[int, ...]


def digest_blocks(
    view: View, updater: BlockUpdater | ReplicaUpdater, indices: Collection[int]
) -> dict[int, str]:
    """Digests of blocks that are here: a master copy and its slots.

    Args:
        view: The generation; what of a tensor is looked at depends on it.
        updater: What has the blocks.
        indices: Which ones.
    """
    if not isinstance(updater, BlockUpdater):
        return {}
    count = _count(view, updater)
    return {index: _digest(updater.sharded.export(index), count) for index in sorted(indices)}


def make_claim(
    view: View,
    step: int,
    updater: BlockUpdater | ReplicaUpdater,
    micro_batches: Sequence[int],
    replicated: Replicated,
    known: Mapping[int, str] | None = None,
) -> Claim:
    """What this member holds, computes, and believes that all have alike.

    Args:
        view: The generation.
        step: Steps committed.
        updater: What has the blocks.
        micro_batches: Those that this member computes.
        replicated: What all have alike.
        known: Digests of blocks that have not changed since, by :func:`digest_blocks`.
    """
    placement, known = updater.placement, known or {}
    owned = placement.partition.of(view.me)
    held = set(placement.of(view.me))
    digests = {i: digest for i, digest in known.items() if i in held}
    digests |= digest_blocks(view, updater, held.difference(digests))
    return Claim(
        view.me,
        view.generation,
        step,
        owns={"block": owned, "stream": list(micro_batches)},
        shadows={"block": sorted(held.difference(owned))},
        same={"position": step, "parameters": replicated.sample(_count(view, updater))},
        digests={"block": {str(i): digests[i] for i in sorted(digests)}} if digests else {},
    )


def certify_members(
    view: View,
    members: Sequence[int],
    claims: Sequence[Claim],
    updater: BlockUpdater | ReplicaUpdater,
    micro_batches: int,
) -> Certificate:
    """Certifies that each block and micro-batch has one owner among those that take part.

    Raises:
        CertificateError: It is not so; names what is wrong.
    """
    expected = {"block": range(len(updater.blocks)), "stream": range(micro_batches)}
    return certify(_Members(view.generation, tuple(members)), claims, expected)


def _count(view: View, updater: BlockUpdater | ReplicaUpdater) -> int | None:
    """How much of a tensor is looked at. The same on all members: they compare what comes of it."""
    size = sum(block.nbytes for block in updater.blocks)
    return None if size <= FULL_BYTES or view.generation % FULL_EVERY == 0 else SAMPLE


def _digest(state: dict[str, Any], count: int | None) -> str:
    import torch

    found = hashlib.blake2b(digest_size=8)
    for slot, value in sorted(state.items()):
        found.update(slot.encode())
        found.update(digest_tensor(value, count) if isinstance(value, torch.Tensor)
                     else repr(value).encode())  # fmt: skip
    return found.hexdigest()
